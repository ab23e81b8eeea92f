"""Score a packaged model: ``python packaged/score.py tiny`` (or a folder) writes ``scores.json`` into its folder.

Perplexity a token on all of the packaged held-out text (windows of 512), word problems answered exactly by greedy
generation in the plain form and in the chat form, and the load of every layer's experts by domain.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from namex_hf.checkpoint.resolve import local_folder
from namex_hf.evaluation.arithmetic import exact_answers, held_out_problems
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts, perplexities


@torch.no_grad()
def loads(model: Any, tokenizer: Any, texts: dict[str, str], tokens: int = 4096) -> dict[str, torch.Tensor]:
    """Share of the top-k slots that each expert of each layer gets in each domain, ``[layers, experts]``."""
    found = {}
    for name, text in texts.items():
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, :tokens].view(-1, 256)
        logits = model(input_ids=ids, output_router_logits=True).router_logits
        chosen = [layer.topk(model.config.num_experts_per_tok).indices.flatten() for layer in logits]
        counts = [torch.bincount(layer, minlength=logits[0].shape[-1]).double() for layer in chosen]
        found[name] = torch.stack([count / count.sum() for count in counts])
    return found


def specialisation(load: dict[str, torch.Tensor]) -> list[float]:
    """Mutual information between expert and domain, in bits, a layer."""
    joint = torch.stack(list(load.values())) / len(load)
    mean = joint.sum(0, keepdim=True)
    terms = joint * (joint * len(load) / mean).clamp(min=1e-12).log2()
    return [round(float(bits), 3) for bits in terms.sum((0, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    arguments = parser.parse_args()
    folder = local_folder(arguments.model)
    if folder is None:
        parser.error(f"{arguments.model} is neither a folder nor a packaged model")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    texts, problems = held_out_texts(), held_out_problems()
    plain = exact_answers(model, tokenizer, problems)
    chat = exact_answers(model, tokenizer, problems, chat=True)
    load_by_domain = loads(model, tokenizer, texts)
    overall = torch.stack(list(load_by_domain.values())).mean(0)
    scores = {
        "parameters": model.num_parameters(),
        "perplexity": {name: round(value, 3) for name, value in perplexities(model, tokenizer, texts).items()},
        "word_problems": len(problems),
        "exact": sum(plain),
        "exact_in_chat_form": sum(chat),
        "exact_standard_error": round(math.sqrt(sum(plain) * (len(plain) - sum(plain)) / len(plain)), 2),
        "expert_domain_bits": specialisation(load_by_domain),
        "smallest_load_by_layer": [round(float(layer.min()), 4) for layer in overall],
    }
    Path(folder, "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
