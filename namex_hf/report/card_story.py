"""What a card says in words: what was merged and how, how to load it, what it is not good for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..checkpoint.companions import has_tokenizer
from ..checkpoint.tokenizer_code import tokenizer_code
from ..files import PICTURES, REPORT, locate
from ..recipe import Grouped, Recipe
from ..scoring.baseline import is_unmerged
from .card_text import plain
from .report import Report

MERGES = {
    "residual": "top-k experts as they were, and a base expert for the mass that top-k leaves over",
    "soft": "the router merges experts into one, which takes their place",
    "grouped": "fewer experts: each is made of a group of the original's",
    "narrow": "every expert and the router, with fewer neurons in each expert: those that mattered least went",
}
METHODS = {
    "namex-full": "the experts of every layer bargain (Nash) over the step by which it walks on",
    "namex": "the experts of the first layer bargain (Nash), and by their weights it walks through all layers",
    "ep-camex": "it walks on by the plain mean of the experts' differences to it",
    "camex": "every layer has one of its own, moved by the plain mean of the experts' differences to it",
    "smear": "there is no base: the router alone merges all experts",
    "smoe": "nothing is merged",
}
FITS = {
    "none": "",
    "router": ", and the router fitted to the original on calibration text",
    "layer": ", and router, experts and shared expert fitted to the original on calibration text, layer by layer",
}
NEURONS = {
    "second_order": "chosen by second order on calibration text, and the others' `down_proj` makes up for them",
    "energy": "chosen by what they put out on calibration text, and the others' `down_proj` makes up for them",
}
ROUTINGS = {
    "cosine": "tokens find experts by the angle between hidden state and expert embedding",
    "stable": "a token's id decides which experts it gets; the linear router does for ids not in the calibration text",
}
PLACE = "PATH_OR_ID"
"""Stands for the folder or Hub id in the snippet until it is known."""


def story_lines(report: Report) -> list[str]:
    """Two sentences: what this was made of, and what became of the experts."""
    recipe = report.run["recipe"]
    what = "the sparse original" if is_unmerged(recipe) else MERGES[recipe["merge"]]
    named = "`narrow`" if recipe["merge"] == "narrow" else f"`{recipe['method']}`, `{recipe['merge']}`"
    lines = [
        f"Made of {_source(report)}, a Mixture-of-Experts model (`{report.family}`). {named}: {what}{_how(recipe)}."
    ]
    if recipe["routing"] != "linear":
        lines += ["", f"Routing `{recipe['routing']}`: {ROUTINGS[recipe['routing']]}."]
    return lines


def _how(recipe: dict[str, Any]) -> str:
    if is_unmerged(recipe):
        return ""
    if recipe["merge"] == "narrow":
        return f"; {NEURONS[recipe['neurons']]}{FITS[recipe['fit']]}"
    if recipe["merge"] == "grouped":
        made = Recipe.from_stored(recipe).merge
        assert isinstance(made, Grouped)
        how = {
            "merge": f", weighted by `{made.weights_by}`",
            "keep": f"; of each the expert stays that is heaviest by `{made.weights_by}`, the others are pruned",
            "random": "; a control, which begins at random experts",
            "shared": "; a control, which begins at slices of the shared expert",
        }
        return how[made.operator] + FITS[made.fit.kind]
    first = "; the first MoE layer stays sparse" if recipe.get("first_layer") == "sparse" else ""
    return f"; {METHODS[recipe['method']]}{first}"


def _source(report: Report) -> str:
    name, commit = report.source["name"], report.source["commit"]
    if name is None:
        return "a model that is not known"
    if commit is None:
        return f"**{plain(name) or 'a model'}** (a local copy; its hash is in `{REPORT}`)"
    address = f"https://huggingface.co/{quote(name)}/tree/{quote(commit, safe='')}"
    return f"[{plain(name)}]({address}) at commit {plain(commit[:12])}"


def loading_lines(config: dict[str, Any], folder: Path | None, place: str = PLACE) -> list[str]:
    """A snippet that loads the model and, where a tokenizer opens without code, lets it go on with a text."""
    remote = ", trust_remote_code=True" if "auto_map" in config else ""
    foreign = [] if folder is None else tokenizer_code(folder)
    talks = folder is None or (has_tokenizer(folder) and not foreign)
    lines = [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if talks else ''}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{place}"{remote})',
    ]
    if talks:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{place}"{remote})',
            'inputs = tokenizer("The first thing to know", return_tensors="pt", return_token_type_ids=False)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
        ]
    after = "" if talks else "The folder holds no tokenizer: that of the original is needed."
    if foreign:
        names = ", ".join(f"`{path.name}`" for path in foreign)
        after = (
            f"The tokenizer needs code of the original ({names}), which was carried over and not run. Read it, then "
            "open the tokenizer with `trust_remote_code=True`; where the code is missing, take that of the original."
        )
    code = (
        "The model's class comes as code with the folder; with `namex_hf` imported that code is not run."
        if remote
        else ""
    )
    return ["```python", *lines, "```", *(["", text] if (text := " ".join(filter(None, (after, code)))) else [])]


def picture_lines(folder: Path | None) -> list[str]:
    """The pictures of the folder's report, linked; nothing where there are none."""
    files = sorted(locate(folder, PICTURES).glob("*.png")) if folder is not None else []
    return linked([path.relative_to(folder).as_posix() for path in files]) if folder is not None else []


def linked(names: Sequence[str]) -> list[str]:
    """Args: names, of pictures: paths below the card's folder, with slashes."""
    if not names:
        return []
    shown = [f"![{plain(Path(name).stem.replace('_', ' '))}]({quote(name)})" for name in names]
    return ["## Pictures", "", *"\n\n".join(shown).split("\n")]


def limit_lines(report: Report, licence: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What is not known and what to look out for."""
    recipe = report.run["recipe"]
    limits = []
    if report.run.get("rebuilt"):
        limits.append(
            f"Another program saved these weights. `{REPORT}` was rebuilt from the recipe in `config.json` and from "
            "the tensors. The source, and what the model was trained on, are not recorded."
        )
    if not report.perplexity and not (report.training or {}).get("scores"):
        limits.append("How well it does was not measured when this was written.")
    elif report.perplexity:
        limits.append("A small loss in perplexity can hide a large one in exact answers: score it on your own task.")
    if recipe["merge"] == "soft":
        limits.append(
            "A merged expert does not replace a token's own experts; without training it is far behind the original."
        )
    if recipe["merge"] == "grouped":
        limits.append("Experts that went took what they alone knew along; arithmetic suffers first.")
    if not is_unmerged(recipe):
        limits.append("Only `transformers` was tried; other loaders may not know this form.")
    if report.run.get("export_as"):
        limits.append("llama.cpp does not take this form of a DeepSeek-MoE, but the one without `--export-as`.")
    elif str(config.get("model_type")).startswith("namex_"):
        limits.append("llama.cpp cannot open it: the class is not among those that it knows.")
    limits.append("Biases, gaps and terms of the original are those of this model too.")
    if "license" not in licence:
        limits.append("The licence of the original could not be told: look it up before you pass this on.")
    return [f"* {one}" for one in limits]
