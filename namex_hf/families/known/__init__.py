"""What is known of each family: a file defines ``FAMILY``."""

from importlib import import_module
from pkgutil import iter_modules

from ..family import Family

FAMILIES: dict[str, Family] = {
    info.name: import_module(f"{__name__}.{info.name}").FAMILY for info in iter_modules(__path__)
}
"""By ``model_type``, which is the name of the file."""
