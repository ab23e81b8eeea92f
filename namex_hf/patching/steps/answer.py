"""What the result's own block answers to the text, where its class is not the source's."""

import torch

from ...merging.curvature import sums_memory
from ...merging.experts import ExpertWeights
from ...recipe import Grouped, Soft
from ..blocks import Blocks, block_tensors, merged_memory
from .step import LayerWork, Sizes, Step


class Answer(Step):
    """The last step: computes the routed output with the block of the patched class.

    Memory: two thirds of a layer's experts again in the layout of the class, and outputs, twice ``[tokens, hidden]``
    in float32.
    """

    blocks: Blocks | None = None

    def __call__(self, work: LayerWork) -> None:
        text, device = work.required_text, work.recipe.device
        assert work.ids is not None
        keeps = work.experts is None
        if keeps:
            work.target = work.mixture.output(text.inputs, text.routing)
        experts = work.mixture.experts if work.experts is None else work.experts
        assert isinstance(experts, ExpertWeights)
        if self.blocks is None:
            self.blocks = Blocks(work.config, work.source.outline)
        tensors = block_tensors(experts, work.new_router, work.added)
        with self.blocks.filled(work.layer, tensors, device) as block:
            work.output = self.blocks.output(block, text.inputs, work.ids)
            routing = self.blocks.compared(block, text, work.ids)
        if work.shared_delta is not None:
            work.output += work.shared_delta
        work.record |= routing
        if keeps:
            assert work.target is not None
            missed, energy = (part.square().sum() for part in (work.output - work.target, work.target))
            error = float(missed / energy.clamp(min=torch.finfo().tiny))
            work.record["errors"] = [{"stage": work.merge.kind, "error": error}]

    def memory(self, sizes: Sizes) -> int:
        merge, shape = self.recipe.merge, sizes.shape
        if isinstance(merge, Grouped):
            return 0  # less than what made the smaller layer held
        merged = merged_memory(merge.segment, sizes.layer // shape.experts) if isinstance(merge, Soft) else 0
        return sizes.layer + sizes.layer // 2 + merged + sums_memory(shape.hidden, shape.width)


STEP = Answer
