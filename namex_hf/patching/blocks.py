"""The MoE blocks of the patched model itself, at work on calibration text while the checkpoint is still being made."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..calibration.decoder import BATCH_TOKENS
from ..families import Config
from ..families.outline import Outline, build
from ..merging.experts import Experts
from ..merging.moe_layer import Text
from ..models.configuration_namex import soft_choice
from ..models.soft import LARGEST, SoftRouting
from ..models.soft_segments import History, plan_segments
from .compared import compared


def block_tensors(experts: Experts, router: torch.Tensor, added: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a block of the patched class, by their names in it, in one dtype as in a loaded model."""
    gate, up, down = map(torch.as_tensor, experts.values())
    return {
        "gate.weight": router.to(down.dtype),
        "experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "experts.down_proj": down,
        **{block_name(n): t.to(down.dtype) if t.is_floating_point() else t for n, t in added.items()},
    }


def block_name(name: str) -> str:
    """Where in a block an added tensor belongs that is called ``base.gate_proj``, ``curvature.usage`` ..."""
    kind, _, part = name.partition(".")
    return f"base_expert.{part}.weight" if kind == "base" else name


def merged_memory(segment: int | None, expert: int) -> int:
    """Bytes of the merged experts of a batch's segments, and their copy; 0 where every token has its own.

    Args:
        expert: bytes of one.
    """
    return 0 if segment is None else min(2 * LARGEST, 2 * -(-BATCH_TOKENS // segment) * expert)


class Blocks:
    """One block with tensors at a time.

    Memory: nothing but the tensors that it is given, and what a batch takes: under ``soft`` its merged experts.
    """

    def __init__(self, config: Config, outline: Outline) -> None:
        """
        Args:
            config: ``config.json`` of the patched model.
            outline: of the original, whose blocks are in the same places.
        """
        self.model, self.outline, self.choice = build(config, "sdpa"), outline, soft_choice(config["namex"])

    @contextmanager
    def filled(self, layer: int, tensors: dict[str, torch.Tensor], device: str) -> Iterator[Any]:
        """The block of a layer, with `block_tensors`, on a device."""
        block: Any = self.model.get_submodule(self.outline.blocks[layer])
        block.load_state_dict({name: t.to(device) for name, t in tensors.items()}, strict=False, assign=True)
        try:
            yield block
        finally:
            block.to("meta")

    @torch.no_grad()
    def output(self, block: Any, inputs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The routed output to sequences, ``[tokens, hidden]`` as `inputs`, which are float32.

        Args:
            block: from `filled`; the dtype of its tensors is that of the arithmetic.
            ids: ``[sequences, length]``.
        """
        count, length = max(1, BATCH_TOKENS // ids.shape[1]), ids.shape[1]
        output = torch.empty_like(inputs)
        parts = zip(inputs.split(count * length), output.split(count * length), ids.split(count), strict=True)
        for some, answer, rows in parts:
            rows = rows.to(inputs.device)
            answer.copy_(block.routed(some.to(block.gate.weight.dtype), rows, *self._layout(block, rows)))
        return output

    def _layout(self, block: Any, ids: torch.Tensor) -> tuple[Any, ...]:
        """What a block that merges by segments takes besides."""
        if self.choice is None or self.choice.segment is None or not isinstance(block, SoftRouting):
            return ()
        real = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        history = History.empty(len(ids), ids.device)
        return plan_segments(history, real, None, self.choice.segment, self.choice.span, keep=False)[0], None

    def compared(self, block: Any, text: Text, ids: torch.Tensor) -> dict[str, Any]:
        """``routing``, for the layer's record; nothing where it is linear.

        Under ``stable`` on the sequences that are held out; a cosine router learns one number of the text, so on all.

        Args:
            ids: ``[sequences, length]``.
        """
        if block.routing == "linear":
            return {}
        inputs, ids = text.inputs, ids.to(text.inputs.device)
        if block.routing == "stable":
            inputs = inputs[text.held_out.repeat_interleave(ids.shape[1])]
            ids = ids[text.held_out]
        return {"routing": compared(block, inputs, ids.flatten())}
