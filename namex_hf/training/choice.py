"""What trains: kinds of parameters as a whole, or low-rank adapters on them."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ..errors import TrainingError
from ..families.kinds import KINDS, kind_of

EVERYTHING = "everything"
STUDENT = "student"
"""Parameters that a model has in StableMoE's first stage alone (`stable`), and that always train there."""
FUSED = {
    "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "router": ("mlp.gate.weight", "mlp.cosine_router.projection", "mlp.cosine_router.embeddings"),
}
"""Parameters that PEFT adapts as `target_parameters`, as they are in no `nn.Linear`."""
LINEAR = {
    "attention": r"self_attn\.[qkvo]_proj",
    "shared": r"mlp\.shared_experts?\.(gate|up|down)_proj",
    "dense": r"mlp\.(gate|up|down)_proj",
}
"""`target_modules`, as regular expressions of the ends of their names."""
WHOLE = {"base": "base_expert", "curvature": "curvature"}
"""`modules_to_save`: trained as they are, and kept in the adapter's file."""


def check_kinds(kinds: Sequence[str], adapter: bool) -> tuple[str, ...]:
    """The kinds that were named, `EVERYTHING` spelt out.

    Raises:
        TrainingError: an unknown kind, or one that an adapter cannot act on.
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
    """Numbers of a model by kind; only kinds that it has."""
    return {kind: every for kind, (_, every) in counts(model).items()}


def counts(model: Any) -> dict[str, tuple[int, int]]:
    """Trainable and all numbers of a model by kind; only kinds that it has.

    Of what an adapter trains as a whole its copy counts, not the frozen original.
    """
    found = dict.fromkeys((*KINDS, STUDENT), (0, 0))
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            kind, size = _kind_of(name), whole_size(parameter)
            trains, has = found[kind]
            found[kind] = trains + size * parameter.requires_grad, has + size
    return {kind: numbers for kind, numbers in found.items() if numbers[1]}


def _kind_of(name: str) -> str:
    return STUDENT if "stable_student." in name else kind_of(name)


def check_present(model: Any, kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds to train that `model` has: all that were named, or of `EVERYTHING` those that there are.

    Raises:
        TrainingError: a kind that was named has no parameters.
    """
    there = present(model)
    if EVERYTHING in kinds:
        return tuple(there)
    for kind in kinds:
        if kind not in there:
            raise TrainingError(
                f"'{kind}' is to be trained, and {type(model).__name__} has no such parameters ({KINDS[kind]}); it has "
                f"{', '.join(there)}"
            )
    return tuple(kinds)


def train_only(model: Any, kinds: Sequence[str]) -> None:
    """Freeze all parameters but those of some kinds."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind_of(name) in kinds)


def lora(model: Any, kinds: Sequence[str], rank: int, alpha: int, dropout: float, carry_base: bool) -> Any:
    """PEFT's configuration of an adapter on some kinds.

    Low-rank on experts, routers and linear layers; base expert and curvature are small, and train as a whole in the
    adapter. PEFT knows no dropout for experts and routers.

    Args:
        kinds: of those that the model has.
        carry_base: keep the base experts in the adapter although they do not train, since the bargain changes them.

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
    """Trainable and all numbers by kind, once everything is in place.

    Raises:
        TrainingError: nothing of a kind trains after all.
    """
    found = counts(model)
    for kind in kinds:
        if not found.get(kind, (0, 0))[0]:
            raise TrainingError(f"'{kind}' is to be trained, and no parameter of this kind would get a gradient")
    return found


def whole_size(parameter: Any) -> int:
    """Numbers in a parameter, of all its shards."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def table_of(trains: dict[str, tuple[int, int]]) -> Table:
    """Of what `check_trains` has found."""
    table = Table(title="what trains")
    for column in ("kind", "trainable", "all", "share"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    rows = {**trains, "together": tuple(map(sum, zip(*trains.values(), strict=True)))}
    for kind, (some, every) in rows.items():
        table.add_row(kind, f"{some:,}", f"{every:,}", f"{100 * some / every:.1f} %")
    return table
