"""Where the arithmetic runs: ``device: auto`` is settled here, at the start of a run."""

from collections.abc import Collection
from dataclasses import replace

import torch

from ..errors import RecipeError
from ..recipe import Recipe

ACCELERATORS = ("cuda", "mps")


def on_device(recipe: Recipe) -> Recipe:
    """The recipe with the device of its arithmetic in the place of ``auto``.

    Raises:
        RecipeError: this machine has no such device.
    """
    device = resolved(recipe.device)
    if not is_there(device):
        raise RecipeError(
            f"recipe field 'device' is {device!r}; accepted: a torch device that this machine has, such as cpu, or auto"
        )
    return replace(recipe, device=device)


def is_there(device: str) -> bool:
    """Whether this machine has a torch device."""
    try:
        torch.ones((), device=device).item()
    except (RuntimeError, AssertionError):  # torch's answers to a device it has not
        return False
    return True


def resolved(device: str) -> str:
    """A torch device: itself, or for ``auto`` what `best_of` finds here."""
    return best_of(available()) if device == "auto" else device


def best_of(kinds: Collection[str]) -> str:
    """The first of `ACCELERATORS` that is among the available kinds, else the CPU."""
    return next((kind for kind in ACCELERATORS if kind in kinds), "cpu")


def available() -> list[str]:
    """Kinds of accelerators of this machine that have float64, which sums need."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [kind for kind, is_there in there.items() if is_there and _has_float64(kind)]


def _has_float64(kind: str) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True
