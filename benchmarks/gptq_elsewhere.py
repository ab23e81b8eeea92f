"""GPTQ of this package beside that of llm-compressor: ``python benchmarks/gptq_elsewhere.py``, where that is installed.

Gate and up of three experts in each layer of `tiny`, on the tokens that each expert receives of 8,192 held-out ones.
Printed for each number of bits: squared error of their outputs, as a share of the outputs' squares. All grids have the
same form: asymmetric, 32 inputs a group. llm-compressor is given the grids of the original's numbers; GPTQ here takes
grids of what the numbers have become.
"""

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from namex_hf.evaluation.loading import load, tokenizer_of
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.quantising.gptq import gptq, output_error
from namex_hf.quantising.grid import best_grid, rounded_to_nearest
from namex_hf.resources import PACKAGED

EXPERTS, BITS, SEQUENCES, LENGTH = (0, 5, 11), (4, 3, 2), 16, 512


def elsewhere(matrix: torch.Tensor, moment: torch.Tensor, bits: int) -> torch.Tensor:
    """By llm-compressor, whose levels begin at ``-2**(bits - 1)``."""
    grid, groups = best_grid(matrix.reshape(-1, 32), bits), (1, len(matrix), matrix.shape[1] // 32)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=32)
    zero = (grid.zero.view(groups) - 2 ** (bits - 1)).to(torch.int8)
    made, _, rounded = quantize_weight(
        matrix.clone()[None], moment.clone()[None], grid.scale.view(groups), zero, None, args
    )
    assert not rounded.any()
    return made[0]


def given(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the experts of each layer receive: inputs ``[tokens, hidden]``, and the experts that the router chose."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: found.append(inputs[:2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    model, tokenizer = load(PACKAGED / "tiny"), tokenizer_of(PACKAGED / "tiny")
    texts = list(held_out_texts().values())
    each = [tokenizer(text, verbose=False, return_tensors="pt").input_ids[0] for text in texts]
    share = SEQUENCES * LENGTH // len(texts) + 1
    ids = torch.cat([one[:share] for one in each])[: SEQUENCES * LENGTH].view(SEQUENCES, LENGTH)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "round to nearest": lambda matrix, _, bits: rounded_to_nearest(matrix, bits),
        "GPTQ here": gptq,
        "GPTQ of llm-compressor": elsewhere,
    }
    errors, whole = {(bits, name): 0.0 for bits in BITS for name in ways}, 0.0
    for layer, (inputs, index) in zip(model.model.layers, given(model, ids), strict=True):
        for number in EXPERTS:
            own, matrix = inputs[(index == number).any(1)], layer.mlp.experts.gate_up_proj[number].detach()
            moment = own.T @ own
            whole += float(output_error(matrix, moment).sum())
            for bits, name in errors:
                change = ways[name](matrix, moment, bits) - matrix
                errors[bits, name] += float(output_error(change, moment).sum())
    for (bits, name), error in errors.items():
        print(f"{bits} bit, {name}: {error / whole:.5f}")


if __name__ == "__main__":
    main()
