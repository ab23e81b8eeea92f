"""The models to score: resolved and checked before any is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ..checkpoint.folder import check_whole
from ..checkpoint.identity import differing
from ..checkpoint.layout import outline_in, per_expert, tensors_of
from ..checkpoint.resolve import Check, resolve
from ..checkpoint.source import Checkpoint
from ..checkpoint.tokenizer_code import lack_of_tokenizer
from ..defaults import SHARD_SIZE
from ..errors import CheckpointError, FamilyError
from ..families import original_family
from ..families.others import check_loading
from ..families.outline import check_counts
from ..files import REPORT, locate, read_json
from ..patching.plan import Plan, make_plan
from ..recipe import Recipe, read_yaml
from .baseline import is_baseline


@dataclass(frozen=True)
class Candidate:
    """One row of the report: a model as it is, or a stock model with a recipe to be applied to it."""

    label: str
    """Of its row and its folder in the output."""
    checkpoint: Checkpoint
    """What is scored or, where there is a plan, what is patched."""
    plan: Plan | None = None
    """Of the patch that is made first."""
    original: str | None = None
    """Label of the model it was made of."""
    baseline: str | None = None
    """Label of the model that it is compared with: the original, or the same router without merging."""

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe that made it; None of a model that is not patched."""
        if self.plan is not None:
            return self.plan.recipe.to_dict()
        recipe = self.checkpoint.config.get("namex")
        return recipe if isinstance(recipe, dict) else None

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the model, plain and without local paths."""
        return {
            "model": self.checkpoint.fingerprint(),
            "files": self.checkpoint.identity.record(),
            "patch": None if self.plan is None else self.plan.options,
        }


def resolve_model(name: str, revision: str | None = None, check: Check = lambda config: None) -> Checkpoint:
    """The checkpoint that a folder, a packaged model's name or a Hub id names, patched or not.

    Args:
        check: of the configuration of a Hub id, before weights are fetched (default: any family is accepted).

    Raises:
        CheckpointError: no such model, no tokenizer, no network, or a damaged checkpoint.
        FamilyError: as of `check`.
    """
    checkpoint = resolve(name, revision, check)
    if checkpoint.commit is None:  # not every file of a Hub id is fetched, and the client checks those that are
        check_whole(checkpoint.folder)
    if lack := lack_of_tokenizer(checkpoint.folder):
        raise CheckpointError(f"{name} has {lack}; without one no text can be scored")
    return checkpoint


def check_code(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Refuse a model whose class is not at hand.

    Raises:
        CheckpointError: the class comes with the model and its code is not to be trusted, or is not there.
        FamilyError: nobody knows the ``model_type``.
    """
    config = checkpoint.config
    auto_map = config.get("auto_map")
    references = [text for text in (auto_map.values() if isinstance(auto_map, dict) else ()) if isinstance(text, str)]
    files = sorted({text.split(".")[0] + ".py" for text in references if "--" not in text})
    missing = [file for file in files if not (checkpoint.folder / file).is_file()]
    if trust_remote_code and missing:
        raise CheckpointError(
            f"{checkpoint.name}/config.json: auto_map names {', '.join(missing)}, which the folder lacks; "
            "--trust_remote_code needs every file that it names"
        )
    known = config.get("model_type") in CONFIG_MAPPING
    if not known and not references:
        raise FamilyError(
            f"{checkpoint.name}/config.json: model_type {config.get('model_type')!r} is known neither to transformers "
            "nor to namex_hf, and there is no auto_map"
        )
    if not known and not trust_remote_code:
        raise CheckpointError(
            f"{checkpoint.name}/config.json: model_type {config.get('model_type')!r} comes with code of its own "
            f"({', '.join(files) or references[0]}); read it, then say --trust_remote_code"
        )


def check_tensors(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Refuse a model whose class has tensors that no file has: they would be random.

    Raises:
        CheckpointError, FamilyError: naming the tensor, or the field of ``config.json``.
    """
    try:
        original_family(checkpoint.config)
    except FamilyError:
        tensors = tensors_of(checkpoint.spans)
        check_counts(checkpoint.config, tensors)
        check_loading(checkpoint.folder, tensors, trust_remote_code)
        return
    per_expert(checkpoint, outline_in(checkpoint))


def candidates(
    names: list[str], recipes: list[Path], revision: str | None = None, trust_remote_code: bool = False
) -> list[Candidate]:
    """Every model as it is and, where there are recipes, each of them applied to it.

    A patched folder is compared with the model it was made of, patched or not, if that is among them; where its router
    is no linear one, with the model of the same router, made of the same one without merging, if that is among them.

    Raises:
        CheckpointError, FamilyError, RecipeError: as of `resolve_model`, `check_code`, `make_plan`.
    """
    given = {path: Recipe.from_dict(read_yaml(path)) for path in recipes}
    labels = _recipe_labels(recipes)
    rows: list[Candidate] = []
    for name in dict.fromkeys(names):
        checkpoint = resolve_model(name, revision)
        check_code(checkpoint, trust_remote_code)
        check_tensors(checkpoint, trust_remote_code)
        label = _label(checkpoint.name, {row.label for row in rows})
        rows.append(Candidate(label, checkpoint))
        rows += [
            Candidate(f"{label}+{labels[path]}", checkpoint, make_plan(checkpoint, recipe, SHARD_SIZE), label)
            for path, recipe in given.items()
        ]
    models = [row for row in rows if row.plan is None]
    rows = [row if row.original else replace(row, original=_original_of(row, models)) for row in rows]
    return [replace(row, baseline=_unmerged_of(row, rows) or row.original) for row in rows]


@dataclass(frozen=True)
class Origin:
    """What a model was made of, and how it was trained since."""

    fingerprint: Any
    files: Any
    """As of `Identity.record`; None where a release before 0.2.0 made the model."""
    training: tuple[Any, ...]
    """Data and settings; Nones of a model that was not trained."""

    def is_of(self, other: Checkpoint) -> bool:
        """Whether the model was made of `other`; by bytes where they are on record."""
        if other.fingerprint() != self.fingerprint:
            return False
        now = {"files": other.identity.record()}
        return self.files is None or not differing({"files": self.files}, now, other.identity)

    def is_same(self, other: "Origin") -> bool:
        if (self.fingerprint, self.training) != (other.fingerprint, other.training):
            return False
        return None in (self.files, other.files) or not differing({"files": self.files}, {"files": other.files})


def _origin(row: Candidate) -> Origin | None:
    """Of a folder; None where it does not say."""
    path = locate(row.checkpoint.folder, REPORT)
    if not path.is_file():
        return None
    report = read_json(path)
    source, run = (value if isinstance(value := report.get(name), dict) else {} for name in ("source", "run"))
    return Origin(source.get("fingerprint"), run.get("files"), (run.get("data"), run.get("training")))


def lacking_originals(rows: list[Candidate]) -> list[str]:
    """Names of the models that some of the rows were made of and that are in no row."""
    folders = [row.checkpoint.folder for row in rows if row.plan is None and row.original is None]
    reports = [read_json(path) for folder in folders if (path := locate(folder, REPORT)).is_file()]
    sources = [source for report in reports if isinstance(source := report.get("source"), dict)]
    return list(dict.fromkeys(name for source in sources if isinstance(name := source.get("name"), str)))


def _original_of(row: Candidate, models: list[Candidate]) -> str | None:
    """Label of the model that a folder was made of, as its report says."""
    origin = _origin(row)
    if origin is None:
        return None
    return next((other.label for other in models if other is not row and origin.is_of(other.checkpoint)), None)


def _unmerged_of(row: Candidate, rows: list[Candidate]) -> str | None:
    """Label of the model that routes as `row` does, merges nothing, and was made of the same model."""
    for other in rows:
        if is_baseline(other.recipe, row.recipe) and _has_same_source(row, other):
            return other.label
    return None


def _has_same_source(row: Candidate, other: Candidate) -> bool:
    if row.plan is not None or other.plan is not None:  # recipes are applied to stock models alone, each row beside it
        return row.plan is not None and row.original == other.original
    origin, others = _origin(row), _origin(other)
    return origin is not None and others is not None and origin.is_same(others)


def _recipe_labels(paths: list[Path]) -> dict[Path, str]:
    """File names, with the folder's where two are equal."""
    stems = [path.stem for path in paths]
    return {path: path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}-{path.stem}" for path in paths}


def _label(name: str, taken: set[str]) -> str:
    """A folder's name that tells the model; a number where another has it."""
    label = name.replace("/", "--")
    number = next(n for n in range(1, len(taken) + 2) if (label if n == 1 else f"{label}-{n}") not in taken)
    return label if number == 1 else f"{label}-{number}"


def shape_of(config: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """Family, layers and width, which tell published models apart; None of a family that is not known."""
    try:
        family = original_family(config).model_type
    except FamilyError:
        return None
    return family, config["num_hidden_layers"], config["hidden_size"]


def bytes_in(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of the weights once loaded. Args: dtype, as lm-eval takes it; ``auto``: the configuration's."""
    name = (checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")) if dtype == "auto" else dtype
    loaded = getattr(torch, str(name), None)
    size = loaded.itemsize if isinstance(loaded, torch.dtype) else None
    return sum(
        span.size // span.dtype.itemsize * (size if size and span.dtype.is_floating_point else span.dtype.itemsize)
        for span in checkpoint.spans.values()
    )
