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
        FamilyError: the ``model_type`` is not supported, or is that of a patched model.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    supported = ", ".join(sorted(FAMILIES))
    if any(model_type == family.patched_type for family in FAMILIES.values()):
        raise FamilyError(
            f"model_type {model_type!r}: this model is patched already; accepted: the original, of {supported}"
        )
    raise FamilyError(f"model_type {model_type!r} is not a supported family; accepted: {supported}")


def original_family(config: Config) -> Family:
    """The family of a raw ``config.json``, original or patched. Raises FamilyError as `family_of`."""
    originals = {family.patched_type: family.model_type for family in FAMILIES.values()}
    model_type = config.get("model_type")
    return family_of({**config, "model_type": originals.get(str(model_type), model_type)})


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
