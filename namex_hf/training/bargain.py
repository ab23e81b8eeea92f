"""Bargaining during the training of a patched model: the base expert is propagated again through current experts."""

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
from ..families.outline import outline_of
from ..merging.experts import NotFiniteError
from ..merging.propagation import PropagationState, PropagationStep, propagate
from ..merging.weightings import FALLBACK
from ..patching.threads import shared_out
from ..recipe import AroundBase, Recipe
from .gathered import base_of, curvature_of, experts_of, gathered, of_first_process, own_base_of, write_base
from .live_blocks import LiveBlock
from .live_step import curved_step


@dataclass(frozen=True)
class LayerBargain:
    """The games of a layer over its current experts."""

    layer: int
    record: list[dict[str, Any]]
    """The entry of every game in a report."""
    cosines: torch.Tensor
    """Cosines between the players of every game, float32 ``[games, N, N]``."""
    drift: float | None
    """Distance of the trained base from the propagated base, relative to the latter's norm; None without a change."""


@torch.no_grad()
def rebargain(model: Any, recipe: Recipe, write: bool = True) -> list[LayerBargain]:
    """Solve the games of all layers again, and propagate the base expert through them (paper eq. 3, 6 and 9).

    The propagation begins with the trained base of the first MoE layer. Under ``first_layer: sparse`` it begins with
    the recipe's `base` of this layer's current parameters, which is not written. Every later layer's base is
    overwritten with the propagated base. Its drift reports the update by gradients that is lost by this. Adapters on
    experts are included. Under ``method: camex`` there is no propagation, and no base changes. A live model
    (`live.go_live`) propagates its base in every pass and gets the new weights. Its bases are written too; their drift
    is the distance of the propagation since they were last written.

    Args:
        model: a patched transformers model from the trainer: also under an adapter, or sharded (FSDP2, DeepSpeed
            ZeRO-3; call on every process, after the first pass).
        recipe: recipe of the model.
        write: False: solve the games around the current bases, and change no base.

    Memory: a whole decoder layer if it is sharded; a copy of its experts if an adapter acts on them; the base three
    times in float32, and chunks.

    Raises:
        TrainingError: an expert has a value that is not finite.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    merge, outline = recipe.merge, outline_of(model.config.to_dict())
    assert isinstance(merge, AroundBase)
    shape, shared = outline.shape, outline.family.shared_name or ""
    own_of = partial(own_base_of, choice=merge.base, shared_name=shared, width=shape.width)
    bargains: list[LayerBargain] = []
    walk = None
    with shared_out():
        for position, index in enumerate(shape.layers):
            block = model.get_submodule(outline.blocks[index])
            with gathered(model.get_submodule(outline.decoder_layers[index])):
                trained = own_of(block) if merge.stays_sparse(index, shape.layers) else base_of(block)
                if keeps_base := walk is None or not write:
                    walk = PropagationState(trained)
                assert walk is not None
                device = str(trained.down.device)
                try:
                    step = _propagate_layer(block, walk, merge, position, device)
                except NotFiniteError as error:
                    raise TrainingError(f"layer {index}, {error}: training has diverged") from error
            drift = None if keeps_base else distance(trained, walk.base)
            if not keeps_base:
                write_base(block, walk.base)
            if write and isinstance(block, LiveBlock) and step.weights is not None:
                block.weights = of_first_process(step.weights, device).cpu()
            bargains.append(LayerBargain(index, step.record, step.cosines, drift))
            walk = step.state
    return bargains


def _propagate_layer(
    block: Any, walk: PropagationState, merge: AroundBase, position: int, device: str
) -> PropagationStep:
    """Propagate the base through a layer; under `AroundBase.curved_step` with the current M_i."""
    experts, curvature = experts_of(block), curvature_of(block) if merge.curved_step else None
    if curvature is None:
        return propagate(experts, walk, merge, position, device=device)

    @torch.no_grad()  # again, because each projection has its own thread
    def step_of(name: str, base: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return curved_step(experts[name], base, weights, curvature[name])

    return propagate(experts, walk, merge, position, step_of, device)


def distance(base: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> float:
    """``|base - target| / |target|`` over all projections; infinite if the target is zero."""
    squared = sum(float((base[name] - matrix).square().sum()) for name, matrix in target.items())
    norm = sum(float(matrix.square().sum()) for matrix in target.values())
    return math.sqrt(squared / norm) if norm else math.inf


def summary(bargains: list[LayerBargain]) -> dict[str, float]:
    """The state of the bargain in a few numbers, for a log.

    The largest spread of a game's weights (standard deviation over mean) and the largest residual, over all games; the
    mean drift over layers; the share of games without agreement, and of games that fell back to the plain mean.
    """
    games = [game for layer in bargains for game in layer.record]
    found = {key: [game[key] for game in games if game[key] is not None] for key in ("spread", "residual")}
    drifts = [layer.drift for layer in bargains if layer.drift is not None]
    values = {f"bargain/{key}": max(numbers) for key, numbers in found.items() if numbers}
    if drifts:
        values["bargain/drift"] = sum(drifts) / len(drifts)
    for word in (NO_AGREEMENT, FALLBACK):
        values[f"bargain/{word}"] = sum(game["status"] == word for game in games) / len(games)
    return values


def is_live(model: Any) -> bool:
    """Whether a model propagates its base expert in the forward pass (`live.go_live`)."""
    return any(isinstance(module, LiveBlock) for module in model.modules())


class BargainCallback(TrainerCallback):
    """Solves the games and propagates the base again after every n-th optimiser step.

    It has no state for a checkpoint: the number of the step determines when it acts, and the parameters what it does. A
    live model's weights are not in a checkpoint. So they are solved for after a checkpoint is saved and when training
    resumes from it, with the same result.

    Args:
        recipe: recipe of the trained model.
        every: n, at least 1.

    Attributes:
        state: `summary` of the last bargain, until it is logged.
        seconds: time of all bargains so far.
    """

    def __init__(self, recipe: Recipe, every: int):
        self.recipe, self.every = recipe, every
        self.state: Mapping[str, float] = {}
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Act after the optimiser, before logging and saving."""
        if state.global_step % self.every == 0:
            self._act(model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Act after a checkpoint was written."""
        if is_live(model):
            self._act(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Act after training resumed from a checkpoint."""
        if state.global_step and is_live(model):
            self._act(model)

    def _act(self, model: Any) -> None:
        start = time.perf_counter()
        self.state = summary(rebargain(model, self.recipe))
        self.seconds += time.perf_counter() - start
