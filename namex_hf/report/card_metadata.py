"""The metadata block of a card, in the Hub's vocabulary; what is carried from the source's card is checked first."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.companions import companions, is_inside, is_licence
from ..files import open_regular
from ..plain_yaml import parse_yaml
from ..record import Report
from .card_text import one_line

BLOCK = re.compile(r"\A\s*---[\r\n]+(.*?)[\r\n]+---(?:\r\n|\n|\Z)", re.DOTALL)
LICENCE = re.compile(r"[a-z0-9.+-]{1,60}")
"""An identifier of the Hub's list of licences; also a name beside ``other``."""
LINK = re.compile(r"(?i:LICENSE)[\w.-]*|https://[\w./#-]{1,200}")
LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
KNOWN_TEXTS = {
    "apache-2.0": re.compile(r"\s*Apache License\s+Version 2\.0"),
    "mit": re.compile(r"\s*(?:The )?MIT License"),
}
"""Beginnings of licence texts that leave no doubt."""
CARRIED = ("license", "license_name", "license_link", "language")
LONGEST = 1 << 20
"""Bytes of a card or licence that are looked at."""


def metadata(report: Report, *folders: Path | None) -> ModelCardData:
    """The metadata of a patched folder.

    Args:
        folders: where card and licence of the source may lie, the first that knows goes before the others.
    """
    name, commit = report.source["name"], report.source["commit"]
    on_hub = commit is not None and _is_repo_id(name)
    fields = carried(*folders)
    recipe = report.run["recipe"]
    prunes = recipe["merge"] == "narrow" or recipe.get("operator") == "keep"
    own = ["namex", "moe", "pruning" if prunes else "merge", report.family]
    return ModelCardData(
        base_model=name if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        base_model_commit=one_line(commit) if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*own, *(tag for tag in fields.pop("tags", []) if tag not in own)],
        **fields,
    )


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def carried(*folders: Path | None) -> dict[str, Any]:
    """Licence, languages and tags that the source's card states, or the licence that its LICENSE is known to be."""
    there = [folder for folder in folders if folder is not None]
    stated = [usable(read_block(_text(folder / "README.md"))) for folder in there]
    fields: dict[str, Any] = {}
    for one in stated:
        for key in ("tags", "language"):
            if key in one:
                fields.setdefault(key, one[key])
        if "license" in one and "license" not in fields:
            fields |= {key: one[key] for key in CARRIED[:3] if key in one}
    if "license" not in fields:
        fields |= next(filter(None, map(_licence_file, there)), {})
    return fields


def usable(block: dict[str, Any]) -> dict[str, Any]:
    """Of a foreign metadata block what can be carried: values of the form that the Hub accepts, others left out."""
    fields: dict[str, Any] = {}
    if _matches(LICENCE, block.get("license")):
        fields["license"] = block["license"]
        for key, form in (("license_name", LICENCE), ("license_link", LINK)):
            if _matches(form, block.get(key)):
                fields[key] = block[key]
    languages = _strings(block.get("language"))
    if languages and all(LANGUAGE.fullmatch(one) for one in languages):
        fields["language"] = languages
    tags = [one_line(tag)[:100] for tag in _strings(block.get("tags"))]
    if tags := list(dict.fromkeys(tag for tag in tags if tag)):
        fields["tags"] = tags
    return fields


def _matches(form: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None


def _strings(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [one for one in values if isinstance(one, str)]


def _licence_file(folder: Path) -> dict[str, str]:
    files = [path.name for path in companions(folder) if is_licence(path.name) and LINK.fullmatch(path.name)]
    for file in files:
        text = _text(folder / file)
        for licence, beginning in KNOWN_TEXTS.items():
            if beginning.match(text):
                return {"license": licence}
    return {"license": "other", "license_name": "as-in-the-file", "license_link": files[0]} if files else {}


def _text(path: Path) -> str:
    if not is_inside(path, path.parent):
        return ""
    with open_regular(path) as file:
        return file.read(LONGEST).decode("utf-8", "replace")


def read_block(text: str) -> dict[str, Any]:
    """The metadata of a card; empty where there is none that can be read."""
    match = BLOCK.match(text)
    try:
        block = parse_yaml(match[1]) if match else None
    except (yaml.YAMLError, ValueError):
        return {}
    return block if isinstance(block, dict) else {}


def put_block(text: str, values: dict[str, Any]) -> str:
    """The card with another metadata block, or with one where it had none."""
    match = BLOCK.match(text)
    return f"---\n{as_yaml(values)}\n---\n{text[match.end() :] if match else text}"


def as_yaml(values: Any) -> str:
    """One key a line, no anchors, nothing that ends the block."""
    return yaml.dump(values, Dumper=_Plain, sort_keys=False, allow_unicode=False, width=10_000).strip()


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\n" in data else None)


_Plain.add_representer(str, _Plain.represent_str)


def model_index(name: str, results: Iterable[EvalResult]) -> list[dict[str, Any]]:
    """``model-index`` of a card, as the Hub reads it."""
    data = ModelCardData(model_name=one_line(name), eval_results=list(results))
    index: list[dict[str, Any]] = data.to_dict()["model-index"]
    return index
