"""The bargain goes on while a patched model is trained: its base expert walks again through the experts as they are."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from ..bargaining import NO_AGREEMENT
from ..errors import TrainingError
from ..families import original_family
from ..merging.experts import NotFiniteError
from ..merging.propagation import PropagationState, Step, propagate
from ..merging.weightings import FALLBACK
from ..patching.threads import shared_out
from ..recipe import AroundBase, Recipe
from .gathered import base_of, curvature_of, experts_of, gathered, of_first_process, own_base_of, write_base
from .live_blocks import LiveBlock
from .live_step import curved_step


@dataclass(frozen=True)
class Settled:
    """One layer's games over the experts as they are now."""

    layer: int
    record: list[dict[str, Any]]
    """Of every game, as a report has it."""
    cosines: torch.Tensor
    """Between the players of every game, float32 ``[games, N, N]``."""
    drift: float | None
    """How far training had taken the layer's base from where it now is, relative to its norm; None where it stayed."""


@torch.no_grad()
def rebargain(model: Any, recipe: Recipe, write: bool = True) -> list[Settled]:
    """Solve the games of all layers again, and let the base expert walk on through them (paper eq. 3, 6 and 9).

    The walk begins with the first MoE layer's base as it was trained. Under ``first_layer: sparse`` it begins with the
    one that the recipe's `base` makes of this layer's parameters as they are now, and none is written there. Every
    later layer's base is overwritten with what the walk brings; what gradients had made of it is gone, and reported as
    its drift. What adapters add to experts counts. Under ``method: camex`` nothing walks, and no base changes. A live
    model (`live.go_live`), whose base walks in every pass, goes on with the weights that are found here; its bases are
    written all the same, and their drift is how far the walk has come since they were written last.

    Args:
        model: a patched one of transformers, as the trainer has it: under an adapter, sharded (FSDP2, DeepSpeed
            ZeRO-3; on every process, and not before the first pass) or not.
        recipe: of the model.
        write: False: the games are played around the bases as they are, and none is changed.

    Memory: one decoder layer whole, where it is sharded; a copy of its experts, where an adapter acts on them; the base
    three times in float32, and chunks.

    Raises:
        TrainingError: an expert is not finite any more.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    config = model.config.to_dict()
    merge, family = recipe.merge, original_family(config)
    assert isinstance(merge, AroundBase)
    shape = family.shape(config)
    own_of = partial(own_base_of, choice=merge.base, shared_name=family.shared_name, width=shape.width)
    settled: list[Settled] = []
    walk = None
    with shared_out():
        for position, index in enumerate(shape.layers):
            layer = model.model.layers[index]
            with gathered(layer):
                trained = own_of(layer.mlp) if merge.stays_sparse(index, shape.layers) else base_of(layer.mlp)
                own = walk is None or not write
                if walk is None or not write:
                    walk = PropagationState(trained)
                device = str(trained.down.device)
                try:
                    step = _pass_layer(layer.mlp, walk, merge, position, device)
                except NotFiniteError as error:
                    raise TrainingError(f"layer {index}, {error}: training has diverged") from error
            drift = None if own else distance(trained, walk.base)
            if not own:
                write_base(layer.mlp, walk.base)
            if write and isinstance(layer.mlp, LiveBlock) and step.weights is not None:
                layer.mlp.weights = of_first_process(step.weights, device).cpu()
            settled.append(Settled(index, step.record, step.cosines, drift))
            walk = step.state
    return settled


def _pass_layer(block: Any, walk: PropagationState, merge: AroundBase, position: int, device: str) -> Step:
    """One layer passed, under `AroundBase.curved_step` with M_i as it is now."""
    experts, curvature = experts_of(block), curvature_of(block) if merge.curved_step else None
    if curvature is None:
        return propagate(experts, walk, merge, position, device=device)

    @torch.no_grad()  # here too: each projection has a thread of its own
    def step_of(name: str, base: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return curved_step(experts[name], base, weights, curvature[name])

    return propagate(experts, walk, merge, position, step_of, device)


def distance(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """``|found - wanted| / |wanted|`` over all projections; infinite where nothing but zeros is wanted."""
    moved = sum(float((found[name] - matrix).square().sum()) for name, matrix in wanted.items())
    norm = sum(float(matrix.square().sum()) for matrix in wanted.values())
    return math.sqrt(moved / norm) if norm else math.inf


def summary(settled: list[Settled]) -> dict[str, float]:
    """The state of the bargain in a few numbers, for a log.

    The largest spread of a game's weights (standard deviation over mean) and the largest residual, over all games; the
    mean drift over layers; the share of games without agreement, and of games that fell back to the plain mean.
    """
    games = [game for layer in settled for game in layer.record]
    found: dict[str, list[float]] = {
        "bargain/spread": [game["spread"] for game in games if game["spread"] is not None],
        "bargain/residual": [game["residual"] for game in games if game["residual"] is not None],
    }
    drifts = [layer.drift for layer in settled if layer.drift is not None]
    values = {name: max(numbers) for name, numbers in found.items() if numbers}
    if drifts:
        values["bargain/drift"] = sum(drifts) / len(drifts)
    for word in (NO_AGREEMENT, FALLBACK):
        values[f"bargain/{word}"] = sum(game["status"] == word for game in games) / len(games)
    return values


def is_live(model: Any) -> bool:
    """Whether a model's base expert walks in the forward pass (`live.go_live`)."""
    return any(isinstance(module, LiveBlock) for module in model.modules())


class BargainCallback(TrainerCallback):
    """Solves and propagates again after every n-th optimiser step.

    It holds no state that a checkpoint would have to keep: where it acts follows from the number of the step, and what
    it does from the parameters. A live model's weights are such a state, so they are also solved for after a checkpoint
    was saved, and where training goes on from one: both find the same.

    Args:
        recipe: of the model that is trained.
        every: n, at least 1.

    Attributes:
        state: numbers of the last time, see `summary`, until they are logged.
        seconds: spent so far.
    """

    def __init__(self, recipe: Recipe, every: int):
        self.recipe, self.every = recipe, every
        self.state: Mapping[str, float] = {}
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the optimiser, before what is logged and saved."""
        if state.global_step % self.every == 0:
            self._act(model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After a checkpoint was written."""
        if is_live(model):
            self._act(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Once a checkpoint has been read, where there is one."""
        if state.global_step and is_live(model):
            self._act(model)

    def _act(self, model: Any) -> None:
        start = time.perf_counter()
        self.state = summary(rebargain(model, self.recipe))
        self.seconds += time.perf_counter() - start
