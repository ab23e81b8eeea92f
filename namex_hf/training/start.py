"""The start of training: a patched folder, or a stock checkpoint that is patched in memory."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..checkpoint.companions import has_tokenizer
from ..checkpoint.folder import check_whole
from ..checkpoint.layout import left_out, outline_in, per_expert
from ..checkpoint.resolve import resolve
from ..checkpoint.source import Checkpoint
from ..checkpoint.tokenizer import open_tokenizer
from ..errors import TrainingError, UsageError
from ..families import original_family
from ..families.family import context_of
from ..families.outline import outline_of
from ..models import load_patched
from ..models.loading import without_bar
from ..patching.check import check_fit
from ..patching.config import patched_config
from ..patching.live import fit_for_others, patch_model
from ..patching.sized import sized
from ..recipe import Recipe


@dataclass(frozen=True)
class Start:
    """A checkpoint and a recipe that fit together. No tensor has been read."""

    checkpoint: Checkpoint
    recipe: Recipe
    patched: bool
    """Whether the checkpoint is patched already."""
    left_out: tuple[str, ...] = ()
    """Tensors of the checkpoint that its class does not have."""

    @property
    def source(self) -> dict[str, Any]:
        """The entry ``source`` of a report."""
        checkpoint = self.checkpoint
        return {
            "name": checkpoint.name,
            "commit": checkpoint.commit,
            "fingerprint": checkpoint.fingerprint(),
            "bytes": checkpoint.size,
            "patched": self.patched,
        }

    @property
    def context(self) -> int | None:
        """Largest number of tokens in a sequence, if the configuration states it."""
        return context_of(self.checkpoint.config)

    def tokenizer(self) -> Any:
        """Raises:
        TrainingError: the checkpoint has no tokenizer.
        CheckpointError: it does not open, or does not fit the model.
        """
        if not has_tokenizer(self.checkpoint.folder):  # transformers may create an empty tokenizer
            raise TrainingError(f"{self.checkpoint.name} has no tokenizer, and chats cannot be read without one")
        rows = self.checkpoint.config.get("vocab_size")
        return open_tokenizer(self.checkpoint.folder, self.checkpoint.name, rows if isinstance(rows, int) else None)

    def outline(self, attention: str | None = None) -> Any:
        """The patched model on the meta device, without values.

        Args:
            attention: implementation of attention, as for `from_pretrained`.

        Raises:
            UsageError: the implementation is unknown, or needs a missing library.
        """
        config, family = self.checkpoint.config, original_family(self.checkpoint.config)
        if not self.patched:
            config = patched_config(config, outline_of(config), self.recipe)
        elif family.is_to_untie(config):
            config = {**config, "tie_word_embeddings": False}
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)
        except (ImportError, ValueError) as error:
            if attention is None:
                raise
            raise UsageError(f"--attn_implementation {attention}: {error}") from error

    def model(self, tokenizer: Any, **options: Any) -> Any:
        """The patched model.

        Args:
            tokenizer: for a recipe that reads calibration text.
            **options: options of `from_pretrained`.

        Raises:
            NamexError: tensors or text are missing.
        """
        folder = self.checkpoint.folder
        with without_bar():
            if self.patched:
                return self._untied(load_patched(folder, **options))
            if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
                raise TrainingError(
                    f"{self.checkpoint.name} is not patched, and cannot be where parameters are sharded while they are "
                    "read (zero3_init_flag, fsdp_cpu_ram_efficient_loading); accepted: a folder of namex-patch"
                )
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        patch_model(model, self.recipe, tokenizer if self.recipe.needs_text else None)
        model.name_or_path = model.config._name_or_path = self.checkpoint.name
        return model

    def _untied(self, model: Any) -> Any:
        family = original_family(self.checkpoint.config)
        if is_deepspeed_zero3_enabled() and family.is_to_untie(self.checkpoint.config):
            raise TrainingError(
                f"{self.checkpoint.name} has one tensor for embedding and head, which have to become two, and cannot "
                "where parameters are sharded while they are read (zero3_init_flag); accepted: a folder that "
                "namex-patch wrote since 0.2.0"
            )
        fit_for_others(model, family)
        return model


def start_from(name: str, revision: str | None = None, recipe: Recipe | None = None) -> Start:
    """Resolve the checkpoint to train, and its recipe.

    Args:
        name: a folder, a packaged model, or a Hub id.
        recipe: for a checkpoint that is not patched; None: the default, NAMEx-Full.

    Raises:
        CheckpointError, FamilyError: there is no such checkpoint, or its family is not supported.
        RecipeError: the recipe does not fit the checkpoint.
        TrainingError: there is a recipe for a checkpoint that is patched already.
    """
    checkpoint = resolve(name, revision, original_family)
    if checkpoint.commit is None:  # of a Hub id not all files are fetched, and the client checks them
        check_whole(checkpoint.folder)
    stored = checkpoint.config.get("namex")
    if patched := isinstance(stored, dict):
        if recipe is not None:
            raise TrainingError(f"{checkpoint.name} is patched already, so --recipe says nothing; accepted: none")
        recipe = Recipe.from_stored(stored)
    else:
        recipe = recipe or Recipe()
    outline = outline_in(checkpoint)
    if not patched:
        check_fit(recipe, outline)
        recipe = sized(recipe, outline.shape)
    foreign = left_out(checkpoint, per_expert(checkpoint, outline))
    return Start(checkpoint, recipe, patched, tuple(foreign))


def dtype_of(name: str) -> torch.dtype | str:
    """Raises:
    TrainingError: TRL does not accept this name.
    """
    accepted = ("auto", "bfloat16", "float16", "float32")
    if name not in accepted:
        raise TrainingError(f"dtype is {name!r}; accepted: {', '.join(accepted)}")
    return name if name == "auto" else getattr(torch, name)
