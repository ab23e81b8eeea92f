"""NAMEx for Hugging Face checkpoints: merge the experts of Mixture-of-Experts models by Nash bargaining.

Importing registers the patched model types (and DeepSeek-MoE v1) with transformers' Auto classes; transformers' own
models are left as they are.
"""

from .commands import common  # noqa: F401  (the first: Ctrl-C is answered while the others take their seconds)

# isort: split
from .bargaining import NashSolution, nash_bargaining
from .models import load_patched
from .patching.live import patch_model
from .patching.patch import patch_checkpoint
from .recipe import Recipe
from .version import __version__

__all__ = [
    "NashSolution",
    "Recipe",
    "__version__",
    "load_patched",
    "nash_bargaining",
    "patch_checkpoint",
    "patch_model",
]
