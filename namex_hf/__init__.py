"""NAMEx for Hugging Face checkpoints: merge the experts of Mixture-of-Experts models by Nash bargaining.

After the import, transformers' Auto classes know the patched model types (and DeepSeek-MoE v1); transformers' own
models are left as they are. The import is cheap: the public names below are imported when they are first used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_models
from .version import __version__

if TYPE_CHECKING:
    from .bargaining import NashSolution, nash_bargaining
    from .families import register_family
    from .merging.weightings import register_weighting
    from .models import load_patched
    from .patching.live import patch_model
    from .patching.patch import patch_checkpoint
    from .progress import ProgressEvent
    from .recipe import Recipe

__all__ = [
    "NashSolution",
    "ProgressEvent",
    "Recipe",
    "__version__",
    "load_patched",
    "nash_bargaining",
    "patch_checkpoint",
    "patch_model",
    "register_family",
    "register_weighting",
]
_MODULES = {
    "NashSolution": ".bargaining",
    "ProgressEvent": ".progress",
    "Recipe": ".recipe",
    "load_patched": ".models",
    "nash_bargaining": ".bargaining",
    "patch_checkpoint": ".patching.patch",
    "patch_model": ".patching.live",
    "register_family": ".families",
    "register_weighting": ".merging.weightings",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


logging.getLogger(__name__).addHandler(logging.NullHandler())  # who wants the log installs a handler
register_models()
