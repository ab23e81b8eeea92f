"""The plan of a training run, complete before a tensor is read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trl import SFTConfig

from ..defaults import SMALL_BYTES
from ..errors import TrainingError
from ..files import hash_file
from .choice import check_present, lora
from .live import check_first_base
from .start import Start

SAVING = ("save_strategy", "save_steps")
"""When checkpoints are written; a result depends on it if it is a checkpoint."""
VOLATILE = {
    *(*SAVING, "save_total_limit", "dataset_num_proc", "dataloader_num_workers", "hub_token", "push_to_hub"),
    *("output_dir", "run_name", "report_to", "project", "trackio_space_id", "resume_from_checkpoint", "disable_tqdm"),
    *("log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step", "local_rank"),
    *("logging_nan_inf_filter", "hub_model_id", "do_train", "do_eval", "do_predict", "use_cpu"),
}
"""Arguments that are not part of a run's identity."""


@dataclass(frozen=True)
class Choice:
    """The user's choice of trained parameters and of scores."""

    kinds: tuple[str, ...]
    adapter: Any
    """Keyword arguments of `lora`: a low-rank adapter is trained in place of the parameters; or None."""
    bargain_every: int
    measures: tuple[str, ...]
    model_options: dict[str, Any]
    """Options of `from_pretrained`."""
    live: bool = False
    """Whether the base expert is propagated in the forward pass."""
    stage_one: bool = False
    """Whether this is StableMoE's first stage (`stable_moe`)."""

    def record(self) -> dict[str, Any]:
        """The choice as plain values, for the identity of a run."""
        options = {name: str(option) for name, option in self.model_options.items()}
        more = {name: True for name in ("live", "stage_one") if getattr(self, name)}
        return {
            "kinds": list(self.kinds),
            "adapter": self.adapter,
            "bargain_every": self.bargain_every,
            **more,
            **options,
        }


def changed_arguments(arguments: SFTConfig, live: bool = False) -> dict[str, Any]:
    """Training arguments that differ from the defaults and that the result depends on.

    Args:
        live: whether a bargain follows every checkpoint (`BargainCallback`).
    """
    stock = SFTConfig(output_dir="x", use_cpu=arguments.use_cpu, bf16=False)
    values, defaults = (json.loads(json.dumps(one.to_dict(), default=str)) for one in (arguments, stock))
    if (template := arguments.chat_template_path) is not None and Path(template).is_file():
        values["chat_template_path"] = hash_file(Path(template))  # its content matters, not its place
    saving = SAVING if live or arguments.load_best_model_at_end else ()
    names = {field.name for field in fields(SFTConfig)} - VOLATILE | set(saving)
    return {name: values[name] for name in sorted(names & set(values)) if values[name] != defaults.get(name)}


def plan_training(start: Start, choice: Choice) -> Choice:
    """The choice, applied to a model before a tensor is read: what is not possible in it is off.

    Its `adapter` becomes PEFT's configuration.

    Raises:
        TrainingError: the model has no parameters of a kind, or the adapter cannot act on them; StableMoE's first stage
            with another router; or live propagation of a model whose first MoE layer has no base.
    """
    if choice.stage_one and start.recipe.routing.kind != "stable":
        raise TrainingError(
            f"StableMoE's first stage trains routing 'stable'; found routing {start.recipe.routing.kind!r}"
        )
    outline = start.outline(choice.model_options.get("attn_implementation"))
    kinds = check_present(outline, choice.kinds)
    propagates = bool(start.recipe.merge.propagates and {"experts", "base"} & set(kinds))
    every, live, adapter = choice.bargain_every if propagates else 0, choice.live and propagates, None
    if live:
        check_first_base(start.recipe)
    if choice.adapter is not None:
        kinds = tuple(kind for kind in kinds if kind not in ("embeddings", "norms"))
        adapter = lora(outline, kinds, **choice.adapter, carry_base=bool(every) or live)
    return replace(choice, kinds=kinds, adapter=adapter, bargain_every=every, live=live)


def measures_for(size: int, requested: Sequence[str] | None) -> tuple[str, ...]:
    """The measures of a run: those requested; by default all for a small model, else chats alone."""
    if requested is not None:
        return () if list(requested) == ["none"] else tuple(requested)
    return ("chats", "text", "problems") if size <= SMALL_BYTES else ("chats",)
