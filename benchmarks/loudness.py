"""How large the routed output is on each kind of text: ``python benchmarks/loudness.py [MODEL]``.

Mean square of the routed experts' output to a token, by MoE layer and packaged held-out text, relative to the mean over
the texts. A saliency that counts norms of answers keeps the experts of the loudest text.
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch import nn

from namex_hf.checkpoint.resolve import resolve
from namex_hf.comparison.measure import tokenizer_of
from namex_hf.scoring.compare import load
from namex_hf.scoring.perplexity import held_out_texts


def hear(seen: list[float], module: nn.Module, given: Any, output: torch.Tensor) -> None:
    seen.append(float(output.square().sum(-1).mean()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny", help="tiny, tiny-deepseek or a folder")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text (default: %(default)s)")
    options = parser.parse_args()
    folder = resolve(options.model).folder
    model, tokenizer, texts = load(folder), tokenizer_of(folder), held_out_texts()
    seen: list[float] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_hook(partial(hear, seen))
    energy = {}
    for name, text in texts.items():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        model(ids[: options.tokens // 512 * 512].view(-1, 512))
        energy[name] = torch.tensor(seen)
        seen.clear()
    mean = torch.stack(list(energy.values())).mean(0)
    for name, found in energy.items():
        print(f"{name:12}", *(f"{value:6.2f}" for value in (found / mean).tolist()))


if __name__ == "__main__":
    main()
