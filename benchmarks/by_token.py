"""How far `residual` is from eq. 9 with a merged expert for every token: ``python benchmarks/by_token.py [MODEL ...]``.

By MoE layer, on the first tokens of each packaged held-out text, as the original hands them to the layer, NAMEx-Full's
base: the routed output of the `residual` block beside that of the merged experts E_m + eta sum_i s_i (E_i - E_m), s the
token's own top-k softmax values, not renormalised, eta = 1. The merge is linear in each matrix, so no merged matrix is
formed: gates and ups are mixed before the activation, downs after it. Root mean squares over all tokens; the cosine is
the mean over tokens.
"""

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from loudness import inputs_by_text, mixtures, root_mean_square

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.evaluation.loading import load, tokenizer_of
from namex_hf.evaluation.table import Table


def mixed(rows: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``(1 - sum_i w_i) E_m x + sum_i w_i E_i x`` of every token, by a loop over experts.

    Args:
        rows: ``[tokens, columns]``.
        weights: ``[tokens, experts]``, 0 where an expert does not count.
        experts: ``[experts, rows, columns]``.
        base: ``[rows, columns]``.
    """
    result = (1 - weights.sum(-1, keepdim=True)) * (rows @ base.T)
    for expert, weight in zip(experts, weights.T, strict=True):
        own = weight.nonzero()[:, 0]
        result[own] += weight[own, None] * (rows[own] @ expert.T)
    return result


def merged_by_token(block: Any, flat: torch.Tensor) -> torch.Tensor:
    """Eq. 9 with M_i = I and eta = 1, every token's own expert, ``[tokens, hidden] -> [tokens, hidden]``."""
    scores, chosen = block.route(flat, None)
    weights = flat.new_zeros(len(flat), len(block.experts.gate_up_proj)).scatter_(1, chosen, scores)
    base = block.base_expert
    gate_up = torch.cat([base.gate_proj.weight, base.up_proj.weight])
    gate, up = mixed(flat, weights, block.experts.gate_up_proj, gate_up).chunk(2, dim=-1)
    neurons = block.experts.act_fn(gate) * up
    return mixed(neurons, weights, block.experts.down_proj, base.down_proj.weight)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["tiny", "tiny-deepseek"], metavar="MODEL", help="a name or a folder"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of each text (default: %(default)s)")
    options = parser.parse_args()
    table = Table(["model", "layer", "sum of s", "eq. 9 over residual", "difference over residual", "cosine"], [])
    for name in options.models:
        folder = resolve(name).folder
        original, tokenizer = load(folder), tokenizer_of(folder)
        inputs = inputs_by_text(original, tokenizer, options.tokens)
        for layer, block in mixtures(patch_model(copy.deepcopy(original), Recipe(), tokenizer)).items():
            flat = torch.cat([here[layer] for here in inputs.values()])
            residual, merged = block.routed(flat), merged_by_token(block, flat)
            size = root_mean_square(residual)
            values = (
                float(block.route(flat, None)[0].sum(-1).mean()),
                root_mean_square(merged) / size,
                root_mean_square(merged - residual) / size,
                float(F.cosine_similarity(merged, residual, dim=-1).mean()),
            )
            table.rows.append([name, str(layer), *(f"{value:.3f}" for value in values)])
    print(*table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
