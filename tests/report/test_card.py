"""The model card: what it carries, what it says, and that no string of a checkpoint can break it."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from namex_hf import patch_checkpoint
from namex_hf.evaluation.statistics import MEASURES, standard_error, value
from namex_hf.recipe import Recipe
from namex_hf.record import Report
from namex_hf.report.card import card
from namex_hf.report.card_measured import change
from namex_hf.report.card_metadata import carried, put_block, read_block
from namex_hf.report.card_text import fenced, one_line, plain, put_section, section
from tests.helpers.toy_models import save_toy

NASTY = (
    "a](javascript:x)|<img src=x onerror=alert(1)>\n---\nlicense: mit\n# b `c` **d** &amp; @all www.e.de http://f.de"
)
TRAINED: dict[str, Any] = {
    "steps": 1400,
    "tokens": 204800,
    "trainable": {"experts": 12345, "router": 67},
    "parameters": {"experts": 12345, "router": 67},
    "loss": [{"step": 5, "loss": 2.5}, {"step": 10, "loss": 1.25}],
    "bargain_seconds": 1.5,
    "seconds": 61.4,
    "scores": {"before": {"text": 20.0, "problems": 50.0}, "after": {"text": 18.0, "problems": 75.0}},
}


def report(name: str = "somebody/model", commit: str | None = "c" * 40, **changes: Any) -> Report:
    recipe = {**Recipe().to_dict(), **changes.pop("recipe", {})}
    run = {"recipe": recipe, "data": {"name": name, "chats": 600}, "training": {"bargain_every": 10, "adapter": None}}
    layer = {"layer": 0, "games": [], "seconds": 0.1}
    return Report(run, {"name": name, "commit": commit}, "qwen2_moe", [layer], {}, **changes)


def structure(text: str) -> list[tuple[str, list[str]]]:
    """What Markdown makes of a card: blocks, and within them everything but text."""
    tokens = MarkdownIt("commonmark").enable("table").parse(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))
    return [
        (token.type, [one.type for one in token.children or [] if one.type not in ("text", "text_special")])
        for token in tokens
    ]


def heading(text: str) -> str:
    tokens = MarkdownIt("commonmark").parse(read_after_block(text))
    at = next(index for index, token in enumerate(tokens) if token.tag == "h1")
    return "".join(one.content for one in tokens[at + 1].children or [])


def read_after_block(text: str) -> str:
    return text.split("\n---\n", 1)[1]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.booleans())
@example(NASTY, True)
@example(NASTY, False)
@example("```\n# out of the fence", False)
@example("<!-- namex:scores -->", False)
@example(" ", False)
@example("\x85---\u2028---\u202ex", True)
def test_no_name_breaks_a_card(name: str, on_hub: bool):
    def made(name: str) -> str:
        one = report(name, "c" * 40 if on_hub else None, training=TRAINED, recipe={"calibration_data": name})
        return card(one.with_perplexity({name: {"before": 2.0, "after": 3.0}}), {})

    tame, wild = made("a model"), made(name)
    assert structure(wild) == structure(tame)
    assert set(read_block(wild)) - {"base_model", "base_model_relation", "base_model_commit"} == set(read_block(tame))
    assert wild.count("\n---\n") == 1
    last = one_line(name.rsplit("/", 1)[-1])
    assert heading(wild).strip(" ") == f"{last}, patched by namex_hf".strip(" ")
    fence = re.search(r"\n(`{3,})yaml\n(.*?)\n\1\n", wild, re.DOTALL)
    assert fence is not None
    assert yaml.safe_load(fence[2])["calibration_data"] == name


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40) | st.integers() | st.none(), max_size=4), st.text(max_size=40))
@example([NASTY], NASTY)
def test_no_metadata_of_the_source_breaks_that_of_the_card(tmp_path_factory, tags: list[Any], licence: str):
    folder = tmp_path_factory.mktemp("source")
    block = {"license": licence, "license_link": licence, "tags": tags, "language": [licence], "datasets": [NASTY]}
    (folder / "README.md").write_text(put_block("# Model\n", block))
    made = ModelCard(card(report(), {}, source=folder))
    found = made.data.to_dict()
    assert "datasets" not in found
    assert re.fullmatch(r"[a-z0-9.+-]{1,60}", found.get("license", "x"))
    assert found["tags"][:4] == ["namex", "moe", "merge", "qwen2_moe"]
    assert all("\n" not in tag for tag in found["tags"])
    assert structure(made.content) in (structure(card(report(), {})), structure(card(report(), {}, source=apache())))


def apache() -> Path:
    """A folder whose licence is known: the repository's own."""
    return Path(__file__).parents[2]


def test_plain_text_reads_as_it_was():
    assert plain("Qwen/Qwen1.5-MoE-A2.7B") == "Qwen/Qwen1.5-MoE-A2.7B"
    assert plain("tiny_deepseek _x_") == "tiny_deepseek &#95;x&#95;"
    assert plain("a|b\n\tc") == "a&#124;b c"
    rendered = MarkdownIt("commonmark").renderInline(plain("<b> & `c` [d](e) \\ *f*"))
    assert rendered == "&lt;b&gt; &amp; `c` [d](e) \\ *f*"
    assert fenced("a\n````\nb", "yaml")[0] == "`````yaml"


def test_what_a_source_says_is_carried(tmp_path: Path):
    block = {
        "license": "other",
        "license_name": "tongyi",
        "license_link": "LICENSE",
        "language": "en",
        "tags": ["chat"],
    }
    (tmp_path / "README.md").write_text(put_block("# Model", block))
    assert carried(None, tmp_path) == block | {"language": ["en"]}
    data = ModelCard(card(report(), {}, source=tmp_path)).data
    assert (data.base_model, data.base_model_commit, data.base_model_relation) == (
        "somebody/model",
        "c" * 40,
        "finetune",
    )
    assert data.tags == ["namex", "moe", "merge", "qwen2_moe", "chat"]
    assert data.license_name == "tongyi"
    again = tmp_path / "again"
    again.mkdir()
    (again / "README.md").write_text(card(report(), {}, source=tmp_path))
    data = ModelCard(card(report(training=TRAINED), {}, again)).data  # of its own earlier card
    assert (data.license, data.language, data.base_model_relation) == ("other", ["en"], "finetune")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\n    Apache License\n    Version 2.0, January 2004\n", {"license": "apache-2.0"}),
        ("MIT License\n\nCopyright", {"license": "mit"}),
        ("Some terms. MIT License", {"license": "other", "license_name": "as-in-the-file", "license_link": "LICENSE"}),
    ],
)
def test_a_licence_file_is_known_by_its_beginning(tmp_path: Path, text: str, found: dict[str, str]):
    assert carried(tmp_path) == {}
    assert "could not be told" in card(report(), {}, tmp_path)
    (tmp_path / "LICENSE").write_text(text)
    assert carried(tmp_path) == found
    assert "could not be told" not in card(report(), {}, tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: [1\n---\n")
    assert carried(tmp_path) == found, "a card that is no YAML says nothing"
    (tmp_path / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    assert carried(tmp_path) == {"license": "bsd-3-clause"}


def test_only_an_id_of_the_hub_is_a_base_model():
    assert read_block(card(report("out/some model"), {})).get("base_model") is None
    assert read_block(card(report("model", None), {})).get("base_model") is None
    assert "**model** (a local copy" in card(report("model", None), {})
    linked = "[somebody/model](https://huggingface.co/somebody/model/tree/cccc"
    assert linked in card(report(), {})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ", weighted by `nash`."),
        ({"method": "ep-camex", "fit": "router"}, ", weighted by `uniform`, and the router fitted to the original on"),
        ({"operator": "keep"}, "of each the expert stays that is heaviest by `usage`, the others are pruned."),
        ({"operator": "keep", "weighting": "saliency", "fit": "layer"}, "by `saliency`, the others are pruned, and"),
        (
            {"operator": "random", "fit": "layer"},
            "begins at random experts, and router, experts and shared expert fitted to the",
        ),
        (
            {"operator": "shared", "fit": "layer"},
            "begins at slices of the shared expert, and router, experts and shared",
        ),
    ],
)
def test_what_became_of_the_groups_is_told(fields: dict[str, Any], said: str):
    made = Recipe(merge="grouped", experts=2, **fields)
    assert said in card(report(recipe=made.to_dict()), {})


def test_perplexity_comes_with_its_noise_where_it_is_known():
    plainly = {"prose": {"before": 10.0, "after": 11.0}}
    assert "| prose | 10.00 | 11.00 | 1.100 |" in card(report().with_perplexity(plainly), {})
    noisy = {"prose": {**plainly["prose"], "before_stderr": 0.5, "after_stderr": 0.25, "ratio_stderr": 0.002}}
    text = card(report().with_perplexity(noisy), {})
    assert "| prose | 10.00 ± 0.50 | 11.00 ± 0.25 | 1.100 ± 0.002 |" in text
    assert "± one standard error" in text


def test_a_ratio_over_another_router_says_what_it_holds():
    """Only where both the router and the experts are others than before."""
    known = {"prose": {"before": 10.0, "after": 11.0}}
    for fields, told in (({"routing": "cosine"}, True), ({}, False), ({"routing": "cosine", "method": "smoe"}, False)):
        text = card(report(recipe=Recipe(**fields).to_dict()).with_perplexity(known), {})
        assert ("so the ratio is of the change to cosine routing and of the merge together" in text) == told


def test_a_pruned_model_is_not_tagged_as_a_merge():
    pruned = Recipe(merge="grouped", operator="keep", experts=2), Recipe(merge="narrow", width=8)
    for recipe in pruned:
        assert read_block(card(report(recipe=recipe.to_dict()), {}))["tags"] == ["namex", "moe", "pruning", "qwen2_moe"]


@pytest.mark.parametrize(
    ("model_type", "export_as", "routes"),
    [
        ("qwen2_moe", None, {"llama-quantize --imatrix", "GPTQModifier("}),
        ("qwen2_moe", "qwen2_moe", {"GPTQModifier("}),
        ("namex_qwen2_moe", None, {"llama.cpp cannot convert this model"}),
    ],
    ids=["stock", "exported", "own class"],
)
def test_how_quantised_copies_are_made(model_type: str, export_as: str | None, routes: set[str]):
    one = report()
    one.run["export_as"] = export_as
    said = card(one, {"model_type": model_type}).split("## Quantised copies")[1].split("## Recipe")[0]
    known = ("llama-quantize --imatrix", "GPTQModifier(", "llama.cpp cannot convert this model")
    assert {route for route in known if route in said} == routes


def test_fine_tuning_is_told(tmp_path: Path):
    assert "Fine-tuning" not in card(report(), {})
    text = card(report("chats|x", training=TRAINED), {})
    assert "1,400 steps over 204,800 tokens of 600 chats (chats&#124;x) in 61 s." in text
    assert "Trained were: experts (12,345 parameters), router (67 parameters)." in text
    assert "Every 10 steps the experts bargained again" in text
    assert "Training loss: 2.500 at the first record, 1.250 at the last." in text
    assert f"| {MEASURES['problems']} | 50.00 | 75.00 |" in text
    assert "How well it does was not measured" not in text
    items = {
        "before": {"text": [[1.0, 3.0], [2.0, 2.0]], "problems": [[1, 0, 1, 0]]},
        "after": {"text": [[0.0, 3.0], [2.0, 2.0]], "problems": [[1, 1, 1, 0]]},
    }
    (tmp_path / "namex").mkdir()
    (tmp_path / "namex/scores.json").write_text(json.dumps(items))
    text = card(report(training=TRAINED), {}, tmp_path)
    spread, ratio = 100 * math.sqrt(1 / 3 / 4), math.exp(-0.25)
    assert f"| 50.00 ± {spread:.2f} | 75.00 ± {25:.2f} | +25.00 ± {25:.2f} |" in text
    assert f" | x {ratio:.3f} ± {ratio * math.sqrt(0.5 / 2) / 2:.3f} |" in text
    assert "± one standard error" in text
    without = {**TRAINED, "bargain_seconds": None, "loss": [], "scores": None}
    text = card(report(training=without), {})
    assert "bargained again" not in text
    assert "Training loss" not in text
    assert "score |" not in text


def test_the_standard_error_of_a_score():
    """By hand: variances 2 and 0 of groups of two; a perplexity moves by its own size times that of the loss."""
    groups = [[1.0, 3.0], [2.0, 2.0]]
    assert value("text", groups) == pytest.approx(math.exp(2))
    assert standard_error("text", groups) == pytest.approx(math.exp(2) * math.sqrt(2 / 2) / 2)
    assert standard_error("problems", [[1, 0, 1, 1]]) == pytest.approx(25.0)
    assert standard_error("text", [[1.0], [2.0, 3.0]]) is None
    assert standard_error("text", None) is None
    assert change("problems", [[1]], [[0]]) == "-100.00"
    assert change("text", [[2.0]], [[2.0]]) == "x 1.000"


def test_pictures_are_shown_where_there_are_some(tmp_path: Path):
    assert "## Pictures" not in card(report(), {}, tmp_path)
    (tmp_path / "namex/pictures").mkdir(parents=True)
    for name in ("cosine_similarity.png", "a](x) b.png", "page.html"):
        (tmp_path / "namex/pictures" / name).write_bytes(b"")
    text = card(report(), {}, tmp_path)
    assert "![cosine similarity](namex/pictures/cosine_similarity.png)" in text
    images = [kind for _, children in structure(text) for kind in children if kind == "image"]
    assert len(images) == 2
    assert "%28x%29" not in text.replace("a%5D%28x%29%20b.png", "")


def test_a_part_of_a_card_can_be_replaced():
    text = f"# A\n\n{section('scores', [])}\n\nend\n"
    filled = put_section(text, "scores", ["| a |"])
    assert filled == "# A\n\n<!-- namex:scores -->\n| a |\n<!-- /namex:scores -->\n\nend\n"
    assert put_section(filled, "scores", []) == text
    assert put_section("# A\n", "scores", ["b"]) == "# A\n\n<!-- namex:scores -->\nb\n<!-- /namex:scores -->\n"


def test_a_metadata_block_can_be_replaced():
    text = "---\r\nlicense: mit\r\n---\r\n# A\r\n"
    assert read_block(text) == {"license": "mit"}
    assert put_block(text, {"a": "---\nb", "c": [1]}) == '---\na: "---\\nb"\nc:\n- 1\n---\n# A\r\n'
    assert put_block("# A\n", {"a": 1}) == "---\na: 1\n---\n# A\n"
    for none in ("# A", "---\n- 1\n---\n", "---\n[\n---\n", "---\na: !!python/object:os.system {}\n---\n"):
        assert read_block(none) == {}


FORMS = ("stock", "silent", "code")
RUN = """
import contextlib, io, json, runpy, sys
said = {}
for script in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(script)
    said[script] = out.getvalue()
assert 'namex_hf' not in sys.modules
print(json.dumps(said))
"""


def texts_of(form: str, tmp_path: Path) -> tuple[str, str]:
    """The card of a folder that is made in `tmp_path`, and its snippet."""
    recipe = Recipe() if form == "code" else Recipe(merge="grouped", experts=5)
    folder = tmp_path / "out"
    patch_checkpoint(save_toy(tmp_path / "toy", tokenizer=form != "silent"), folder, recipe)
    text = card(report(), json.loads((folder / "config.json").read_text()), folder)
    return text, text.split("```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def snippets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, str]]:
    """Of every form the card, its snippet and what that prints, in a process where nothing of this package is imported:
    the folder's own code, or none at all."""
    root, texts, scripts = tmp_path_factory.mktemp("snippets"), {}, {}
    for form in FORMS:
        texts[form] = texts_of(form, root / form)
        scripts[form] = root / f"{form}.py"
        scripts[form].write_text(texts[form][1].replace("PATH_OR_ID", str(root / form / "out")))
    kept = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, *map(str, scripts.values())],
        env=kept | {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return {form: (*texts[form], said[str(scripts[form])]) for form in FORMS}


@pytest.mark.parametrize("form", ["code", "stock", "silent"])
def test_the_snippet_loads_the_model(snippets: dict[str, tuple[str, str, str]], form: str):
    text, snippet, said = snippets[form]
    assert ("AutoTokenizer" in snippet) == (form != "silent") == ("holds no tokenizer" not in text)
    assert said.startswith("The first thing to know") == (form != "silent")
