"""Selection of the trainable parameters: whole kinds of parameters, or low-rank adapters on them."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table as ScreenTable

from ..errors import TrainingError
from ..evaluation.table import Table
from ..families.kinds import FUSED, KINDS, LINEAR, kind_of

EVERYTHING = "everything"
STUDENT = "student"
"""Parameters that exist, and always train, only in StableMoE's first stage (`stable_moe`)."""
WHOLE = {"base": "base_expert", "curvature": "curvature"}
"""`modules_to_save`: trained without an adapter, and saved in the adapter's file."""


def check_kinds(kinds: Sequence[str], adapter: bool) -> tuple[str, ...]:
    """The named kinds, with `EVERYTHING` replaced by all kinds.

    Raises:
        TrainingError: a kind is unknown, or an adapter cannot act on it.
    """
    accepted = (*FUSED, *LINEAR, *WHOLE) if adapter else tuple(KINDS)
    if not kinds:
        raise TrainingError(f"no kind of parameters is named; accepted: {EVERYTHING}, {', '.join(accepted)}")
    for kind in kinds:
        if kind != EVERYTHING and kind not in accepted:
            under = " under --use_peft" if adapter else ""
            raise TrainingError(f"'{kind}' cannot be trained; accepted{under}: {EVERYTHING}, {', '.join(accepted)}")
    return accepted if EVERYTHING in kinds else tuple(kinds)


def present(model: Any) -> dict[str, int]:
    """Number of parameters of a model by kind; only kinds that it has."""
    return {kind: every for kind, (_, every) in counts(model).items()}


def counts(model: Any) -> dict[str, tuple[int, int]]:
    """Numbers of trainable and of all parameters of a model by kind; only kinds that it has.

    Of modules that an adapter trains as a whole, the trained copy counts, not the frozen original.
    """
    totals = dict.fromkeys((*KINDS, STUDENT), (0, 0))
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            kind, size = _kind_of(name), whole_size(parameter)
            trainable, every = totals[kind]
            totals[kind] = trainable + size * parameter.requires_grad, every + size
    return {kind: numbers for kind, numbers in totals.items() if numbers[1]}


def _kind_of(name: str) -> str:
    return STUDENT if "stable_student." in name else kind_of(name)


def check_present(model: Any, kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds to train: all named kinds, or under `EVERYTHING` all kinds of the model.

    Raises:
        TrainingError: the model has no parameters of a named kind.
    """
    available = present(model)
    if EVERYTHING in kinds:
        return tuple(available)
    for kind in kinds:
        if kind not in available:
            raise TrainingError(
                f"'{kind}' is to be trained, and {type(model).__name__} has no such parameters ({KINDS[kind]}); it has "
                f"{', '.join(available)}"
            )
    return tuple(kinds)


def train_only(model: Any, kinds: Sequence[str]) -> None:
    """Freeze all parameters but those of some kinds."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind_of(name) in kinds)


def lora(model: Any, kinds: Sequence[str], rank: int, alpha: int, dropout: float, carry_base: bool) -> Any:
    """PEFT's configuration of an adapter on some kinds.

    Experts, routers and linear layers get low-rank adapters. Base expert and curvature are small, and train as a whole
    in the adapter. PEFT does not support dropout for experts and routers.

    Args:
        kinds: kinds of parameters of the model.
        carry_base: save the base experts in the adapter even if they do not train, because the bargain changes them.

    Raises:
        TrainingError: dropout with experts or routers.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    names = [name for name, _ in model.named_parameters()]
    fused = [end for kind in FUSED if kind in kinds for end in FUSED[kind] if any(n.endswith(end) for n in names)]
    linear = [LINEAR[kind] for kind in LINEAR if kind in kinds]
    whole = [WHOLE[kind] for kind in WHOLE if kind in kinds or (kind == "base" and carry_base)]
    if fused and dropout:
        raise TrainingError(f"lora_dropout is {dropout}; with experts or routers accepted: 0")
    targets: Any = rf".*\.({'|'.join(linear)})" if linear else []
    if not linear and not fused:
        targets = DUMMY_TARGET_MODULES
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        target_parameters=fused or None,
        modules_to_save=whole or None,
    )


def check_trains(model: Any, kinds: Sequence[str]) -> dict[str, tuple[int, int]]:
    """`counts` of the model that is ready for training.

    Raises:
        TrainingError: a kind has no trainable parameter.
    """
    totals = counts(model)
    for kind in kinds:
        if not totals.get(kind, (0, 0))[0]:
            raise TrainingError(f"'{kind}' is to be trained, and no parameter of this kind would get a gradient")
    return totals


def whole_size(parameter: Any) -> int:
    """Number of entries of a parameter, over all its shards."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def table_of(trains: dict[str, tuple[int, int]]) -> ScreenTable:
    """The result of `check_trains` as a table."""
    rows = {**trains, "together": tuple(map(sum, zip(*trains.values(), strict=True)))}
    cells = [[kind, f"{some:,}", f"{every:,}", f"{100 * some / every:.1f} %"] for kind, (some, every) in rows.items()]
    return Table(["kind", "trainable", "all", "share"], cells).screen("what trains")
