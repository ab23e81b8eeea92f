"""The model card of a patched folder, plain."""

from typing import Any

import yaml
from huggingface_hub import ModelCardData

from .report import Report, layer_table

TITLES = {
    "residual": "top-k experts as they were, and a base expert for the mass that top-k leaves over",
    "soft": "one merged expert processes the tokens of a causal segment",
    "grouped": "fewer experts: each is made of a group of the original's",
}
ROUTINGS = {
    "cosine": "tokens find experts by the angle between hidden state and expert embedding",
    "stable": "a token's id decides which experts it gets; the linear router does for ids not in the calibration text",
}


def card(report: Report, config: dict[str, Any]) -> str:
    """Markdown with the Hub's metadata block on top."""
    recipe, name = report.run["recipe"], report.source["name"]
    hub_id = name if report.source["commit"] else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=hub_id,
        tags=["namex", "moe", "merge", report.family],
    )
    titles, rows = layer_table(report, "seconds")
    what = "the sparse original" if recipe["method"] == "smoe" else TITLES[recipe["merge"]]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {name.rsplit('/', 1)[-1]}, patched by namex_hf",
        "",
        f"`{recipe['method']}`, `{recipe['merge']}`: {what}.",
        *(
            []
            if recipe["routing"] == "linear"
            else ["", f"Routing `{recipe['routing']}`: {ROUTINGS[recipe['routing']]}."]
        ),
        "",
        "## Load it",
        "",
        "```python",
        *_loading(config),
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
        "## Layers",
        "",
        _row(titles),
        "|---" * len(titles) + "|",
        *map(_row, rows),
    ]
    if report.perplexity:
        lines += ["", "## Perplexity on held-out text", "", "| domain | before | after |", "|---|---|---|"]
        lines += [f"| {d} | {v['before']:.2f} | {v['after']:.2f} |" for d, v in report.perplexity.items()]
    lines += [
        "",
        "Made with `namex_hf` " + report.versions["namex_hf"] + "; method: Nguyen et al., *Expert Merging in Sparse "
        "Mixture of Experts with Nash Bargaining*. Details in `namex_report.json`.",
        "",
    ]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _loading(config: dict[str, Any]) -> list[str]:
    remote = ", trust_remote_code=True" if "auto_map" in config else ""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID"{remote})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")',
    ]
