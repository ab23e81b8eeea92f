"""Model families by ``model_type``: those of the folder ``known``, and others that are registered."""

from importlib.metadata import entry_points

from ..errors import FamilyError, UsageError
from ..merging.gate import Gate
from .family import LAYER_EXPERTS, Config, Family, MoeShape, Reexpression, without_prediction
from .known import FAMILIES

OFFERED = "namex_hf.families"
"""Group of entry points: modules of other packages that register families when they are imported."""


def register_family(family: Family) -> None:
    """Add a family of another package: checkpoints of its ``model_type`` are opened from now on.

    A package that has an entry point of the group ``namex_hf.families``, a module that calls this, need not be imported
    by its users.

    Raises:
        UsageError: there is one for this ``model_type``.
    """
    if family.model_type in FAMILIES:
        raise UsageError(f"family '{family.model_type}' is there already; accepted: a model_type without a family")
    FAMILIES[family.model_type] = family


def family_of(config: Config) -> Family:
    """The family of a raw ``config.json``.

    Raises:
        FamilyError: the ``model_type`` is not supported, or is that of a patched model.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        if model_type not in FAMILIES:
            for offered in entry_points(group=OFFERED):
                offered.load()
        if model_type in FAMILIES:
            return FAMILIES[model_type]
    supported = ", ".join(sorted(FAMILIES))
    if model_type is not None and any(model_type == family.patched_type for family in FAMILIES.values()):
        raise FamilyError(
            f"model_type {model_type!r}: this model is patched already; accepted: the original, of {supported}"
        )
    raise FamilyError(
        f"model_type {model_type!r} is not a supported family: this is {_kind(config)}; accepted: {supported}; "
        "docs/families.md says how to add a family"
    )


def _kind(config: Config) -> str:
    """What a model without a family is, as far as its configuration says."""
    if "auto_map" in config:
        return "a class with code of its own, which is never run"
    text = config.get("text_config")
    if isinstance(text, dict):
        return "a model that reads more than text"
    counts = [value for name, value in config.items() if "expert" in name and type(value) is int]
    return "a mixture of experts" if any(count > 1 for count in counts) else "a dense model, without experts"


def original_family(config: Config) -> Family:
    """The family of a raw ``config.json``, original or patched. Raises FamilyError as `family_of`."""
    originals = {family.patched_type: family.model_type for family in FAMILIES.values() if family.patched_type}
    model_type = config.get("model_type")
    return family_of({**config, "model_type": originals.get(str(model_type), model_type)})


__all__ = [
    "FAMILIES",
    "LAYER_EXPERTS",
    "Config",
    "Family",
    "Gate",
    "MoeShape",
    "Reexpression",
    "family_of",
    "original_family",
    "register_family",
    "without_prediction",
]
