"""``curvature`` under ``soft``: measured on the text, or the start of one that is trained."""

import torch

from ...merging.directions import layer_curvature
from ...models.soft_kronecker import KroneckerCurvature
from ...progress import ProgressEvent
from ...recipe import Soft
from .step import LayerForm, LayerWork, Shapes, Step


class Curve(Step):
    """Nothing in a layer that stays sparse."""

    def __call__(self, work: LayerWork) -> None:
        assert isinstance(work.merge, Soft)
        curvature, dtype = work.merge.curvature, work.source.dtype(work.layer)
        if work.stays_sparse:
            return
        assert curvature.rank is not None
        if curvature.kind == "kronecker":
            trained = self._trained(work.source.shape.experts, work.source.shape.hidden, work.source.shape.width)
            trained.reset_parameters(torch.Generator().manual_seed((work.recipe.seed + work.layer) % (1 << 63)))
            work.add({f"curvature.{name}": tensor.to(dtype) for name, tensor in trained.state_dict().items()})
            return
        mixture, text = work.mixture, work.required_text
        measured = layer_curvature(
            mixture.experts, text.inputs, text.routing, mixture.activation, curvature.rank, curvature.ridge
        )
        work.add({f"curvature.{name}": tensor.to(dtype) for name, tensor in measured.tensors().items()})
        work.record["explained"] = [round(part.explained, 4) for part in (measured.inputs, measured.neurons)]
        work.progress(ProgressEvent("curvature"))

    def added(self, form: LayerForm) -> Shapes:
        assert isinstance(self.recipe.merge, Soft)
        curvature, shape = self.recipe.merge.curvature, form.shape
        assert curvature.rank is not None
        if form.sparse:
            return {}
        if curvature.kind == "kronecker":
            with torch.device("meta"):
                trained = self._trained(shape.experts, shape.hidden, shape.width)
            return {
                f"curvature.{name}": (tuple(t.shape), form.expert_dtype) for name, t in trained.state_dict().items()
            }
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("usage", "input_floor", "neuron_floor"), (shape.experts,))
        shapes |= {"input_directions": (shape.experts, shape.hidden, curvature.rank)}
        shapes |= {"neuron_directions": (shape.experts, shape.width, curvature.rank)}
        return {f"curvature.{name}": (numbers, form.expert_dtype) for name, numbers in shapes.items()}

    def _trained(self, experts: int, hidden: int, width: int) -> KroneckerCurvature:
        assert isinstance(self.recipe.merge, Soft)
        assert self.recipe.merge.curvature.rank is not None
        return KroneckerCurvature(experts, hidden, width, self.recipe.merge.curvature.rank)


STEP = Curve
