"""Model families by ``model_type``. A file in this folder that defines ``FAMILY`` is a family."""

import importlib
import pkgutil

from ..errors import FamilyError
from .family import EMBEDDING, HEAD, LAYER_EXPERTS, PROJECTIONS, Config, Family, MoeShape, Reexpression

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    if hasattr(module, "FAMILY")
}


def family_of(config: Config) -> Family:
    """The family of a raw ``config.json``.

    Raises:
        FamilyError: naming the ``model_type`` found and the supported ones.
    """
    found = config.get("model_type")
    if isinstance(found, str) and found in FAMILIES:
        return FAMILIES[found]
    supported = ", ".join(sorted(FAMILIES))
    if any(found == family.patched_type for family in FAMILIES.values()):
        raise FamilyError(
            f"model_type {found!r}: this model is patched already; accepted: the original, of {supported}"
        )
    raise FamilyError(f"model_type {found!r} is not a supported family; accepted: {supported}")


def original_family(config: Config) -> Family:
    """As `family_of`, of a model that may be patched."""
    originals = {family.patched_type: family.model_type for family in FAMILIES.values()}
    found = config.get("model_type")
    return family_of({**config, "model_type": originals.get(str(found), found)})


__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "HEAD",
    "LAYER_EXPERTS",
    "PROJECTIONS",
    "Config",
    "Family",
    "MoeShape",
    "Reexpression",
    "family_of",
    "original_family",
]
