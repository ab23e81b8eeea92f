"""Checks before a push: the folder is complete, its model loads, its tokenizer works, its card is valid."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoTokenizer

from ..checkpoint.companions import has_tokenizer
from ..checkpoint.folder import STATE, check_whole
from ..checkpoint.layout import left_out, left_out_line, outline_in, per_expert
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..checkpoint.tokenizer_code import tokenizer_code
from ..errors import CheckpointError, PublishError
from ..files import CARD, REPORT, locate, read_text
from ..models import load_patched, remote_code
from ..models.loading import without_bar
from ..record import Report
from ..report.card_metadata import read_block
from ..report.rebuild import has_recipe_alone, rebuild
from .files import current_code

RUN_BYTES = 256 << 20
"""A model up to this size is run on a few tokens; of a larger model only names and shapes of tensors are checked."""
LARGEST_FILE = 50 * 10**9
"""Largest size of a file, in bytes, that the Hub recommends."""


@dataclass(frozen=True)
class CheckedFolder:
    """A folder that can be pushed."""

    checkpoint: Checkpoint
    card: str
    ran: bool
    """Whether the model was run, not only compared with its class."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user that do not stop a push."""
    left_out: tuple[str, ...] = ()
    """Tensors that the model's class does not have; they are not pushed."""


def check_folder(folder: Path, verify: bool = False) -> CheckedFolder:
    """Check a folder completely, without a network.

    Args:
        verify: read all files, and compare their hashes with those in the report.

    Raises:
        PublishError: the folder is unfinished, foreign, or lacks code, or the Hub would refuse its card.
        CheckpointError: the folder is damaged, or its model does not load.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder; needed: one that namex-patch or sft_smoltalk.py has written")
    if (folder / STATE).exists():
        raise PublishError(f"{folder} is unfinished ({STATE} is there); the command that made it finishes it")
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    if not isinstance(config.get("namex"), dict):
        raise PublishError(
            f"{folder}: config.json has no recipe under 'namex'; needed: a folder that namex-patch or sft_smoltalk.py "
            "has written"
        )
    notes = _with_report(folder)
    check_whole(folder, verify)
    _check_code(checkpoint)
    if current_code(checkpoint):
        notes.append("the code of the model's class is from an earlier release; the current code replaces it")
    card = read_text(folder / CARD, PublishError)
    check_metadata(card, folder / CARD)
    large = [shard.name for shard in checkpoint.shards if shard.stat().st_size > LARGEST_FILE]
    if large:
        raise PublishError(f"{large[0]} is larger than 50 GB, which the Hub does not take; patch with --shard-size 5GB")
    rows = _check_loads(checkpoint)
    foreign = left_out(checkpoint, per_expert(checkpoint, outline_in(checkpoint)))
    if line := left_out_line(foreign):
        notes.append(line)
    if code := [path.name for path in tokenizer_code(folder)]:
        notes.append(f"the tokenizer's code stays here ({', '.join(code)}): users need the tokenizer of the original")
    elif has_tokenizer(folder):
        _check_tokenizer(folder, rows)
    else:
        notes.append("no tokenizer: users of the model need the tokenizer of the original")
    if "license" not in read_block(card):
        notes.append("the card states no licence")
    return CheckedFolder(checkpoint, card, checkpoint.size <= RUN_BYTES, notes, tuple(foreign))


def _with_report(folder: Path) -> list[str]:
    """Notes on the report, which is rebuilt if another training loop wrote none."""
    if not has_recipe_alone(folder):
        Report.from_file(locate(folder, REPORT))
        return []
    rebuild(folder)
    return [f"{REPORT} was missing and is rebuilt; the source of the model is not known"]


def _check_code(checkpoint: Checkpoint) -> None:
    """Require all code files of the model's class, and an ``auto_map`` that names only them."""
    code = remote_code(str(checkpoint.config.get("model_type")))
    value = checkpoint.config.get("auto_map") or {}
    if current_code(checkpoint):
        return
    if value != code.auto_map:
        raise PublishError(
            f"config.json: auto_map is {value}; accepted for this model_type: {code.auto_map or 'none'}; patch it again"
        )
    for file in code.files:
        if not (checkpoint.folder / file.name).is_file():
            raise PublishError(f"{checkpoint.folder} lacks {file.name}, which the model's class needs without namex_hf")


def check_metadata(text: str, path: Path) -> None:
    """Raises:
    PublishError: the metadata block is missing, no YAML, or has a field that the Hub cannot read.
    """
    block = read_block(text)
    if not block:
        raise PublishError(f"{path}: no metadata block (YAML between two lines '---') that can be read")
    kinds: dict[str, Any] = {"license": str, "library_name": str, "pipeline_tag": str, "tags": list}
    for name, kind in kinds.items():
        if name in block and not isinstance(block[name], kind):
            actual = type(block[name]).__name__
            raise PublishError(f"{path}: metadata field '{name}' is {actual}; accepted: {kind.__name__}")
    try:
        ModelCardData(**block)
        if "model-index" in block:
            model_index_to_eval_results(block["model-index"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PublishError(f"{path}: metadata that the Hub cannot read ({reason})") from error


def _check_loads(checkpoint: Checkpoint) -> int:
    """Load the model as its class; returns the number of rows of its embedding."""
    small = checkpoint.size <= RUN_BYTES
    try:
        with without_bar():
            model = load_patched(checkpoint.folder, device_map=None if small else "meta", local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # transformers can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{checkpoint.folder} does not load ({reason})") from error
    if small:
        _check_runs(model, checkpoint.folder)
    return int(model.get_input_embeddings().weight.shape[0])


@torch.no_grad()
def _check_runs(model: Any, folder: Path) -> None:
    ids = torch.arange(min(8, model.config.vocab_size))[None]
    if not model.eval()(input_ids=ids, use_cache=False).logits.isfinite().all():
        raise CheckpointError(f"{folder}: the model gives NaN or infinity on its first {ids.numel()} tokens")


def _check_tokenizer(folder: Path, rows: int) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer("A test, 1 2 3.", return_attention_mask=False)["input_ids"], default=0)
        largest = max([largest, *tokenizer.get_vocab().values()])
    except Exception as error:  # a foreign tokenizer can raise any error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{folder}: its tokenizer does not load ({reason})") from error
    if largest >= rows:
        raise CheckpointError(f"{folder}: its tokenizer has token {largest}; the model has rows for {rows}")
