"""Weightings by name. A file in this folder that defines ``weighting`` is one."""

import importlib
import pkgutil

from .weighting import FALLBACK, ExpertStatistics, Weighting, Weights

WEIGHTINGS: dict[str, Weighting] = {
    info.name: module.weighting
    for info in pkgutil.iter_modules(__path__)
    if hasattr(module := importlib.import_module(f"{__name__}.{info.name}"), "weighting") and info.name != "weighting"
}

__all__ = ["FALLBACK", "WEIGHTINGS", "ExpertStatistics", "Weighting", "Weights"]
