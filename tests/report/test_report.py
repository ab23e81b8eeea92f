"""The record and the card of patched folders."""

import json
import re
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from namex_hf.recipe import Recipe
from namex_hf.record import Report
from namex_hf.report.card import card
from namex_hf.report.layers import layer_summary, layer_table
from tests.helpers.forms import FORMS

STOCK = ("qwen2_moe grouped", "qwen2_moe calibrated", "qwen2_moe pruned", "qwen2_moe sparse", "deepseek as qwen2_moe")
NEEDS_CODE = [form for form in FORMS if form not in STOCK]
STATUS = {"agreement", "no_agreement", "no game", "own_base", "reused", "uniform"}


def forms() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", FORMS)


def report_of(folder: Path) -> Report:
    return Report.from_json((folder / "namex/report.json").read_text())


@forms()
def test_the_card_is_one_of_the_hub(patched: dict[str, Path], form: str):
    family, recipe, _ = FORMS[form]
    made = ModelCard.load(patched[form] / "README.md")
    assert made.data.library_name == "transformers"
    assert made.data.pipeline_tag == "text-generation"
    done = "pruning" if recipe.to_dict()["operator"] == "keep" else "merge"
    assert made.data.tags == ["namex", "moe", done, family]
    assert made.data.base_model is None  # a folder of this machine
    assert yaml.safe_load(made.text.split("```yaml\n")[1].split("```")[0]) == recipe.to_dict()
    assert recipe.merge.method in made.text
    rows = [line for line in made.text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == len(report_of(patched[form]).layers)


@forms()
def test_remote_code_is_asked_for_where_it_is_needed(patched: dict[str, Path], form: str):
    text, config = (patched[form] / "README.md").read_text(), json.loads((patched[form] / "config.json").read_text())
    assert ("trust_remote_code=True" in text) == ("auto_map" in config) == (form in NEEDS_CODE)
    assert bool(list(patched[form].glob("*.py"))) == (form in NEEDS_CODE)


@forms()
def test_the_report_holds_what_was_decided(patched: dict[str, Path], form: str):
    family, recipe, export_as = FORMS[form]
    report = report_of(patched[form])
    assert report.family == family
    assert report.run["recipe"] == recipe.to_dict()
    assert report.run["export_as"] == export_as
    assert report.source["name"] == family
    assert report.source["commit"] is None
    assert report.source["fingerprint"] == report.run["source"]
    untouched = recipe.merge.method in ("smoe", "smear") and recipe.routing.kind == "linear"
    layers = [] if untouched else [0, 1, 2] if family == "qwen2_moe" else [1, 2]
    assert [layer["layer"] for layer in report.layers] == layers
    assert {"namex_hf", "python", "torch", "transformers"} <= set(report.versions)
    assert report.totals["bytes_in"] == report.source["bytes"]
    weights = list(patched[form].glob("model*.safetensors"))
    assert report.totals["files"] == len(weights)
    assert report.totals["bytes_out"] == sum(path.stat().st_size for path in weights)
    assert Report.from_json(report.to_json()) == report
    for summary in map(layer_summary, report.layers):
        assert set(summary["status"].split(", ")) <= STATUS
        assert (summary["spread"] is None) == (summary["status"] in ("own_base", "no game"))
        assert summary["seconds"] >= 0


def headers(path: Path) -> str:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode()


@forms()
def test_no_local_path_is_left_anywhere(patched: dict[str, Path], root: Path, form: str):
    for path in filter(Path.is_file, patched[form].rglob("*")):
        text = headers(path) if path.suffix == ".safetensors" else path.read_text()
        assert root.name not in text, path.name
        assert str(Path.home()) + "/" not in text, path.name
    assert not (patched[form] / ".namex").exists()


def example(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "run": {"recipe": Recipe().to_dict()},
        "source": {"name": "somebody/model", "commit": "c" * 40},
        "family": "qwen2_moe",
        "layers": [],
        "totals": {},
    }
    return Report(**(values | changes))


def test_the_card_names_the_model_of_the_hub():
    made = ModelCard(card(example(), {"auto_map": {}}))
    assert made.data.base_model == "somebody/model"
    assert "# model, patched by namex_hf" in made.text


def test_the_card_shows_perplexity_where_it_was_measured():
    assert "Perplexity" not in card(example(), {})
    scored = example().with_perplexity({"prose": {"before": 12.345, "after": 13.0}})
    assert "| prose | 12.35 | 13.00 |" in card(scored, {}) or "| prose | 12.34 | 13.00 |" in card(scored, {})
    assert asdict(scored) | {"perplexity": None} == asdict(example())


def test_a_layer_in_a_line():
    games = [
        {"status": "agreement", "spread": 0.2, "residual": 1e-12},
        {"status": "no_agreement", "spread": 0.0, "residual": None},
        {"status": "agreement", "spread": 0.1, "residual": 1e-9},
    ]
    summary = layer_summary({"layer": 4, "games": games, "seconds": 0.5, "groups": [[0, 1], [2]]})
    assert (summary["layer"], summary["games"], summary["groups"]) == (4, 3, 2)
    assert summary["status"] == "agreement, no_agreement"
    assert (summary["spread"], summary["residual"]) == (0.2, 1e-9)
    empty = layer_summary({"layer": 0, "games": [], "seconds": 0.1})
    assert (empty["status"], empty["spread"], empty["residual"], empty["groups"]) == ("no game", None, None, None)


def test_errors_are_shown_where_there_are_any():
    plain = {"layer": 0, "games": [], "seconds": 0.126}
    merged = {**plain, "layer": 1, "errors": [{"stage": "merged", "error": 0.5}]}
    fitted = {**plain, "layer": 2, "errors": [{"stage": "merged", "error": 0.4}, {"stage": "down", "error": 0.1}]}
    names = ["layer", "games", "status", "spread of weights", "residual"]
    assert layer_table(example(layers=[plain])) == (
        [*names, "seconds"],
        [["0", "0", "no game", "", "", "0.13"]],
    )
    assert layer_table(example(layers=[plain, merged]), "seconds") == (
        [*names, "error merged"],
        [["0", "0", "no game", "", "", ""], ["1", "0", "no game", "", "", "0.5000"]],
    )
    titles, rows = layer_table(example(layers=[merged, fitted]), "seconds")
    assert titles == [*names, "error merged", "error fitted"]
    assert [row[-2:] for row in rows] == [["0.5000", ""], ["0.4000", "0.1000"]]
    assert "| 2 | 0 | no game |  |  | 0.4000 | 0.1000 |" in card(example(layers=[fitted]), {})
    assert not {"error merged", "error fitted"} & {*re.findall(r"error \w+", card(example(layers=[plain]), {}))}


def test_the_recipe_on_the_card_is_yaml_whatever_the_data_is_called():
    recipe = Recipe(merge="grouped", experts=5, fit="router", calibration_data="it's: mine #1.txt")
    made = card(example(run={"recipe": recipe.to_dict()}), {})
    assert yaml.safe_load(made.split("```yaml\n")[1].split("```")[0]) == recipe.to_dict()


def test_routing_is_in_the_card_and_in_the_table_where_it_was_compared(patched: dict[str, Path]):
    cards = {form: (folder / "README.md").read_text() for form, folder in patched.items()}
    assert [form for form, text in cards.items() if "Routing `" in text] == ["qwen2_moe stable", "deepseek cosine"]
    assert "a token's id decides" in cards["qwen2_moe stable"]
    told = {"agreement with linear", "load entropy, linear", "load entropy"}
    for form, folder in patched.items():
        titles, rows = layer_table(report_of(folder))
        assert told.intersection(titles) == (told if form == "qwen2_moe stable" else set()), form
        if form == "qwen2_moe stable":
            first = report_of(folder).layers[0]["routing"]
            assert rows[0][titles.index("agreement with linear")] == f"{first['agreement']:.3f}"
            assert rows[0][titles.index("load entropy")] == f"{first['load_entropy']:.3f}"
    records = [{"agreement": 0.25, "load_entropy_linear": 0.5, "load_entropy": 0.75}] * 2
    titles, rows = layer_table(report_of(patched["deepseek cosine"]).with_routing(records))
    assert [row[titles.index("agreement with linear")] for row in rows] == ["0.250", "0.250"]


def test_trainable_curvature_is_counted(patched: dict[str, Path]):
    """Hidden size and width of the toys, 16 = 4 x 4 and 8 = 2 x 4, twice: rank 2."""
    config = json.loads((patched["deepseek kronecker"] / "config.json").read_text())
    assert (config["hidden_size"], config["moe_intermediate_size"]) == (16, 8)
    each = 2 * 3 * (4**2 + 4**2 + 2**2 + 4**2)
    layers = report_of(patched["deepseek kronecker"]).layers
    counts = report_of(patched["deepseek kronecker"]).totals["curvature_parameters"]
    assert counts == {"an expert": each, "in all": each * config["n_routed_experts"] * len(layers)}
    assert all(
        "curvature_parameters" not in report_of(folder).totals
        for form, folder in patched.items()
        if form != "deepseek kronecker"
    )
