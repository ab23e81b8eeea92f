"""A router in another form than the linear one, with tensors of its own: cosine, or by token id."""

import torch

from ...families import Config
from ...merging.gate import Gate
from ...merging.routers import assignment, cosine_form, cosines, scale_by_entropy, scale_by_norms
from ...merging.routing import TokenRouting, route
from ...recipe import Soft
from .step import LayerForm, LayerWork, Shapes, Step, Tensors


class Reroute(Step):
    """Memory: float32 ``[tokens, experts]`` a few times."""

    def __call__(self, work: LayerWork) -> None:
        work.add(self._cosine(work) if self.recipe.routing.kind == "cosine" else self._stable(work))

    def added(self, form: LayerForm) -> Shapes:
        if self.recipe.routing.kind == "stable":
            shape = (form.config["vocab_size"], self._assigned_top_k(form.config, form.sparse))
            return {"stable_router.assignment": (shape, torch.int32)}
        rank = min(form.experts, form.shape.hidden)
        shapes = {"projection": (rank, form.shape.hidden), "embeddings": (form.experts, rank), "scale": (1,)}
        return {f"cosine_router.{name}": (shape, form.router_dtype) for name, shape in shapes.items()}

    def _cosine(self, work: LayerWork) -> Tensors:
        router = work.new_router
        projection, embeddings = cosine_form(router)
        if self.recipe.routing.temperature == "norms":
            scale = scale_by_norms(router, work.source.norm(work.layer))
        else:
            inputs = work.required_text.inputs
            scale = scale_by_entropy(inputs @ router.to(inputs).T, cosines(inputs, projection, embeddings))
        parts = {"projection": projection, "embeddings": embeddings, "scale": torch.tensor([scale])}
        return {f"cosine_router.{name}": tensor.to(router.dtype) for name, tensor in parts.items()}

    def _stable(self, work: LayerWork) -> Tensors:
        """From the sequences that are not held out."""
        text, router = work.required_text, work.new_router
        assert work.ids is not None
        top_k = self._assigned_top_k(work.config, work.stays_sparse)
        routing = route(text.inputs, router.to(text.inputs), Gate(top_k))
        ids, learnt = work.ids.to(routing.index.device), ~text.held_out.to(routing.index.device)
        tokens = learnt.repeat_interleave(ids.shape[1])
        learnt_routing = TokenRouting(routing.index[tokens], routing.value[tokens])
        table = assignment(ids[learnt].flatten(), learnt_routing, len(router), work.config["vocab_size"])
        return {"stable_router.assignment": table.cpu()}

    def _assigned_top_k(self, config: Config, sparse: bool) -> int:
        """How many experts an id gets; in a layer that stays sparse the model's own number."""
        top_k = self.recipe.merge.top_k if isinstance(self.recipe.merge, Soft) else None
        stated: int = config["num_experts_per_tok"]
        return stated if sparse or top_k is None else top_k


STEP = Reroute
