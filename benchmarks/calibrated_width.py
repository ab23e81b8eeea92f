"""Memory and time of a calibrated patch at true layer width: ``python benchmarks/calibrated_width.py``.

Makes Qwen2-MoE checkpoints of true width on the spot (hidden 2048, 60 experts of 1408, bf16; random weights, the
tokenizer of the packaged model), of four and of eight layers, merges each to half its experts with ``--fit``, or cuts
each expert to ``--width``, and prints the peak resident memory above that of a process that only imports, and seconds a
layer and a token. With ``--plain`` the same tokens also pass through the same layers by transformers, in bf16, and the
ratio of the two times is printed. Random experts say nothing about quality; memory and time do not depend on weights.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from true_width import HIDDEN, WIDTH, child, make

from namex_hf.calibration.decoder import BATCH_TOKENS
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.patching.text import LENGTH


@torch.no_grad()
def plain_pass(source: Path, tokens: int) -> float:
    """Seconds of the same number of tokens through all layers, in bf16, in batches as the patch makes them."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval().model
    ids = torch.randint(3, 4000, (max(1, BATCH_TOKENS // LENGTH), LENGTH))
    model(ids, use_cache=False)
    start = time.perf_counter()
    for _ in range(tokens // ids.numel()):
        model(ids, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--kept", type=int, default=30)
    parser.add_argument("--width", type=int, help="merge narrow, to this many neurons, in place of --kept")
    parser.add_argument("--plain", action="store_true", help="beside a plain forward pass")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration text")
    parser.add_argument("--fit", choices=("none", "router", "layer"), default="router")
    parser.add_argument("--fit-steps", type=int, default=1000, help="a layer and fit (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder), on a real disk")
    arguments = parser.parse_args()
    tiny = local_folder("tiny")
    assert tiny is not None
    layer = 3 * arguments.experts * HIDDEN * WIDTH * 2
    imports = child()[1]
    recipe = {"merge": "grouped", "experts": arguments.kept}
    if arguments.width:
        recipe = {"merge": "narrow", "width": arguments.width}
    recipe |= {"fit": arguments.fit, "calibration_tokens": arguments.tokens}
    if arguments.fit != "none":
        recipe["fit_steps"] = arguments.fit_steps
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
            source, out = Path(work) / "source", Path(work) / "out"
            make(source, layers, arguments.experts, 3, vocabulary=4096)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(tiny / name, source)
            seconds, peak = child(str(source), str(out), json.dumps(recipe))
            report = json.loads((out / "namex" / "report.json").read_text())
            each = [one["seconds"] for one in report["layers"]]
            print(
                f"{layers} layers: {seconds:.0f} s, {sum(each) / len(each):.1f} s a layer, "
                f"{1000 * sum(each) / len(each) / arguments.tokens:.1f} ms a layer and token; peak memory above "
                f"imports {(peak - imports) / 1e9:.2f} GB, {(peak - imports) / layer:.2f} layers",
                flush=True,
            )
            if arguments.plain:
                plain = plain_pass(source, arguments.tokens) / layers
                ratio = sum(each) / len(each) / plain
                print(f"a plain pass: {plain:.1f} s a layer; the patch takes {ratio:.1f} times that", flush=True)


if __name__ == "__main__":
    main()
