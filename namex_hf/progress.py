"""Progress of a run: one kind of event, one kind of callback."""

from collections.abc import Callable
from dataclasses import dataclass, replace

FINISHED = "finished"
"""The stage of a layer that needs no further work."""


@dataclass(frozen=True)
class ProgressEvent:
    """What a run has just done. `str` of it is the line for a bar: ``layer 3: fitted, step 50 of 1000``."""

    stage: str
    """What was done, such as ``fitted``."""
    layer: int | None = None
    """The decoder layer, where the stage is one of a layer."""
    step: int = 0
    """Of the ``steps`` of a fit; 0 where the stage is no fit."""
    steps: int = 0
    """Of a fit, at most."""
    amount: int = 0
    """What this event adds to ``done``."""
    done: int = 0
    """The part of ``total`` that is done, in bytes of a checkpoint, requests to a model, texts or problems."""
    total: int | None = None
    """All of the run's work; None where that is not known."""
    model: str = ""
    """Label of the model, where a run has several."""
    resumed: bool = False
    """Whether an earlier process did this work, so that it took no time now."""

    def __str__(self) -> str:
        parts = [] if self.layer is None else [f"layer {self.layer}"]
        if self.steps:
            parts.append(f"{self.stage}, step {self.step} of {self.steps}")
        elif self.stage != FINISHED:
            parts.append(self.stage)
        return ": ".join(parts)


ProgressCallback = Callable[[ProgressEvent], None]


def no_progress(event: ProgressEvent) -> None:
    """The callback of those who do not ask."""


def of_layer(progress: ProgressCallback, layer: int) -> ProgressCallback:
    """A callback for stages of one layer, from one that also asks for the layer."""
    return lambda event: progress(replace(event, layer=layer))
