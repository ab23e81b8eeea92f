"""namex-patch with recipes that read calibration text, on toy checkpoints and on a packaged one."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from namex_hf.checkpoint.bytes import Reader
from namex_hf.checkpoint.resolve import resolve
from namex_hf.commands import compare, patch, patch_screen
from namex_hf.patching import text as patching_text
from namex_hf.patching.estimate import peak_bytes
from namex_hf.patching.plan import make_plan
from namex_hf.recipe import Recipe
from namex_hf.resources import PACKAGED
from tests.helpers.checkpoints import change_config
from tests.helpers.own_tokenizer import FILES, add_own_tokenizer
from tests.helpers.toy_models import save_toy

FIT = ("--merge", "grouped", "--experts", "3", "--fit", "router", "--fit-steps", "20", "--calibration-tokens", "1024")
SOFT = ("--merge", "soft", "--routing-span", "all", "--method", "camex", "--base", "mean")
ALIGNED = (*SOFT, "--align", "activations", "--calibration-tokens", "4096")
CURVED = (*SOFT, "--curvature", "calibrated", "--calibration-tokens", "4096")
HINT = "merged without calibration text; --fit router"


@pytest.fixture(scope="session")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with a tokenizer, a token a byte, and sequences of 128; not to be changed."""
    folder = save_toy(tmp_path_factory.mktemp("speaking") / "model", tokenizer=True)
    change_config(folder, max_position_embeddings=128)
    return folder


@pytest.fixture
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text outside the folder in which `refused` looks for what was left."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text((PACKAGED / "calibration" / "prose.txt").read_text()[:20_000])
    return path


def ran(*arguments: object) -> int:
    return patch.main([str(argument) for argument in arguments])


def flat(text: str) -> str:
    return " ".join(text.split())


def test_what_it_tells(
    speaking: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The errors of the layers' outputs in table and card, and what the text cost; then that the folder is complete."""
    monkeypatch.setattr(patch_screen, "FORECAST_SECONDS", 0.001)
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 128)
    monkeypatch.setenv("COLUMNS", "200")
    command = (speaking, "--out", tmp_path / "out", *FIT, "--calibration-data", prose)
    assert ran(*command) == 0
    said, report = capsys.readouterr(), json.loads((tmp_path / "out" / "namex/report.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "error merged" in said.out
    assert "error fitted" in said.out
    for layer in report["layers"]:
        first, last = (f"{layer['errors'][place]['error']:.4f}" for place in (0, -1))
        assert f"{first} │ {last}" in flat(said.out)
        assert f"| {first} | {last} |" in card
    seconds = sum(layer["seconds"] for layer in report["layers"]) / 3
    line = f"calibrated on 1024 tokens of prose.txt: {seconds:.2f} s a layer, {seconds / 1.024:.3f} s for 1,000 tokens"
    assert line in said.out
    found = re.findall(r"layer 0: ([\d.]+) s, ([\d.]+) ms a token; about 0 min for the 2 layers to come", said.err)
    assert len(found) == said.err.count(" layers to come") == 1
    assert float(found[0][1]) == pytest.approx(1000 * float(found[0][0]) / 1024, abs=0.06)
    assert HINT not in said.err
    assert ran(*command) == 0
    assert "is complete: this model was patched with this recipe before" in flat(capsys.readouterr().err)


def test_soft_on_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """On a packaged model: the error of every layer is told, and what the text says brings the perplexity down."""
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 512)
    monkeypatch.setenv("COLUMNS", "200")
    means = []
    for flags in (SOFT, ALIGNED, CURVED):
        assert ran("tiny", "--out", tmp_path / "out", *flags, "--overwrite") == 0
        said, report = capsys.readouterr(), json.loads((tmp_path / "out" / "namex/report.json").read_text())
        card = (tmp_path / "out" / "README.md").read_text()
        for text in (said.out, card):
            assert ("error merged" in text) == (flags != SOFT)
            assert "error fitted" not in text
        assert ("calibrated on 4096 tokens of packaged: " in said.out) == (flags != SOFT)
        assert HINT not in said.err
        means.append(report["perplexity"]["mean"])
        assert f"{means[-1]['after']:.2f}" in said.out
        assert len(report["layers"]) == 5
        for layer in report["layers"] if flags != SOFT else ():
            assert f" {layer['errors'][0]['error']:.4f} " in said.out
            assert f" {layer['errors'][0]['error']:.4f} " in card
    plain, aligned, curved = means
    assert plain["before"] == aligned["before"] == curved["before"]
    assert aligned["after"] < 0.9 * plain["after"]
    assert curved["after"] < 0.8 * aligned["after"]


def test_the_dry_run_of_soft_on_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """It names the text, and counts what is added: of every expert 3 numbers, and 4 directions of 128 and of 80."""
    monkeypatch.setenv("COLUMNS", "200")
    said = []
    for flags in (CURVED, SOFT):
        assert ran("tiny", "--out", tmp_path / "out", *flags, "--dry-run") == 0
        said.append({line.split("│")[1].strip(): line.split("│")[2].strip() for line in _rows(capsys.readouterr().out)})
    curved, plain = said
    assert curved["calibration text"] == "4096 tokens of packaged, not read yet"
    assert "calibration text" not in plain
    assert curved["bytes in"] == plain["bytes in"]
    more = (float(one["bytes out"].removesuffix(" MB")) for one in said)
    assert next(more) - next(more) == pytest.approx(5 * 16 * (3 + 4 * (128 + 80)) * 2 / 1e6, abs=0.011)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--merge", "grouped", "--experts", "4"), True),
        (("--merge", "grouped", "--experts", "4", "--quiet"), False),
        (("--merge", "grouped", "--experts", "8"), False),
        (("--merge", "grouped", "--experts", "4", "--dry-run"), False),
        ((), False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_who_merges_without_text_is_told(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: bool
):
    assert ran(toy, "--out", tmp_path / "out", *flags) == 0
    assert (HINT in flat(capsys.readouterr().err)) == told


def test_the_bar_names_layer_and_stage(
    speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As a terminal shows it, drawn at every step."""
    update = patch_screen.Progress.update

    def drawn(self: patch_screen.Progress, *arguments: object, **fields: object) -> None:
        update(self, *arguments, **fields)  # type: ignore[arg-type]
        self.refresh()

    monkeypatch.setattr(patch_screen.Progress, "update", drawn)
    monkeypatch.setattr(patch_screen, "SCORED_BYTES", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert ran(speaking, "--out", tmp_path / "out", *FIT) == 0
    said = capsys.readouterr().err
    for stage in ("read", "merged", "router", "down"):
        assert f"layer 2: {stage} " in said


@pytest.mark.parametrize("own", [False, True], ids=["packaged text", "own text"])
def test_the_dry_run_reads_no_tensor_and_own_text_alone(
    speaking: Path,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own: bool,
):
    def no(*_: object, **__: object) -> None:
        raise AssertionError("something was read")

    for name in ("read", "read_into", "copy", "expect"):
        monkeypatch.setattr(Reader, name, no)
    if not own:
        monkeypatch.setattr(patching_text, "calibration_text", no)
        monkeypatch.setattr(patching_text.AutoTokenizer, "from_pretrained", no)
    monkeypatch.setenv("COLUMNS", "400")  # the temporary folder's name may be long
    before = set(tmp_path.rglob("*"))
    flags = ("--calibration-data", prose) if own else ()
    assert ran(speaking, "--out", tmp_path / "out", *FIT, *flags, "--dry-run") == 0
    said = flat(capsys.readouterr().out)
    assert "calibration text" in said
    assert ("1024 tokens of prose.txt │" if own else "1024 tokens of packaged, not read yet") in said
    assert set(tmp_path.rglob("*")) == before


def test_the_dry_run_counts_what_the_text_costs(
    speaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Memory and disk grow with the tokens; without a text there is no row for it."""
    monkeypatch.setenv("COLUMNS", "200")
    said = []
    for flags in (FIT, (*FIT, "--calibration-tokens", "1000000"), ("--merge", "grouped", "--experts", "3")):
        assert ran(speaking, "--out", tmp_path / "out", *flags, "--dry-run") == 0
        said.append({line.split("│")[1].strip(): line.split("│")[2] for line in _rows(capsys.readouterr().out)})
    few, many, none = said
    assert "1000000 tokens of packaged" in many["calibration text"]
    assert "calibration text" not in none
    rows = [row for row in few if few[row] != many[row]]
    assert rows == ["peak memory (estimate)", "calibration text", "disk needed / free"]


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("when", [(), ("--dry-run",)], ids=["", "dry-run"])
def test_no_tokenizer_and_no_text(
    refused, toys: dict[str, Path], speaking: Path, tmp_path: Path, when: tuple[str, ...]
):
    for family, toy in toys.items():
        says = f"{family} has no tokenizer, and this recipe reads calibration text; accepted: a checkpoint with its tok"
        assert says in refused(toy, *FIT, *when)
    says = "no.txt: no such file or folder; accepted: 'packaged', a text file, a .jsonl file"
    assert says in refused(speaking, *FIT, "--calibration-data", tmp_path / "no.txt", *when)
    assert "calibration data : no such file" in refused(speaking, *FIT, "--calibration-data", "", *when)


def test_token_ids_need_no_tokenizer(
    refused, toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The way out that the refusal names; what needs a tokenizer is left out, in a line each."""
    monkeypatch.setenv("COLUMNS", "400")  # the temporary folder's name may be long
    monkeypatch.setattr(patch_screen, "DRAWN_BYTES", patch_screen.SCORED_BYTES)
    toy, ids = toys["qwen2_moe"], tmp_path / "ids" / "ids.npy"
    ids.parent.mkdir()
    np.save(ids, np.random.default_rng(0).integers(0, 260, (40, 64)))
    command, out = (toy, *FIT, "--calibration-data", ids), tmp_path / "ids" / "out"
    assert "or token ids in place of text (--calibration-data ids.npy)\n" in refused(toy, *FIT)
    assert ran(*command, "--out", out, "--dry-run") == 0
    assert re.search(r"calibration text +│ 1024 tokens of .*ids\.npy, not read yet", capsys.readouterr().out)
    assert not out.exists()
    assert ran(*command, "--out", out) == 0
    said = capsys.readouterr()
    assert "calibrated on 1024 tokens of ids.npy: " in said.out
    assert "no tokenizer in the checkpoint: perplexity is skipped\n" in said.err
    assert "no tokenizer in the folder: the experts answer to no text\n" in said.err
    assert (out / "namex/pictures/6-damage.png").is_file()
    assert "The folder holds no tokenizer" in (out / "README.md").read_text()
    assert "no tokenizer; without one no text can be scored" in said_by_compare(toy, ids, tmp_path, capsys)
    np.save(ids, np.arange(1000) % 260)
    for when in ((), ("--dry-run",)):
        says = "ids.npy has 1000 tokens, and 1024 are asked for; accepted: up to 1000\n"
        assert says in refused(*command, *when)


def test_a_tokenizer_with_code_of_its_own(refused, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It is named wherever a tokenizer is needed or files are listed."""
    add_own_tokenizer(copied)
    lack = "copied has no tokenizer that opens without code of its own"
    said = refused(copied, *FIT)
    assert f"{lack}, and this recipe reads calibration text; accepted: " in said
    assert said.endswith("or token ids in place of text (--calibration-data ids.npy)\n")
    assert f"{lack}; without one no text can be scored" in said_by_compare(
        copied, tmp_path / "no.npy", tmp_path, capsys
    )
    assert ran(copied, "--out", tmp_path / "out", "--dry-run", "--json") == 0
    said = capsys.readouterr()
    assert {*FILES, "tokenizer_config.json", "vocab.txt"} <= {*json.loads(said.out)["carried"]}
    assert said.err == f"the tokenizer's code is carried over as it is, and was not run: {', '.join(FILES)}\n"


def said_by_compare(model: Path, ids: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What namex-compare says, which scores text and so needs a tokenizer."""
    flags = ("--merge", "grouped", "--experts", "3", "--fit", "router", "--calibration-data", ids)
    assert compare.main([str(one) for one in (model, "--out", folder / "compared", *flags)]) == 2
    return capsys.readouterr().err


def test_text_that_is_none(refused, speaking: Path, prose: Path):
    for text, says in (
        ("few words", "has 10 tokens of text; a sequence needs 128"),
        ("long enough for one sequence " * 7, "1 sequences, and no file or data set has two"),
    ):
        prose.write_text(text)
        assert says in refused(speaking, *FIT, "--calibration-data", prose)
    prose.write_bytes(b"\xff\xfe" * 1000)
    assert "is not UTF-8 text" in refused(speaking, *FIT, "--calibration-data", prose)
    assert "1 sequences, and no file" in refused(speaking, *FIT, "--calibration-tokens", "127")
    assert "accepted: a whole number from 1" in refused(speaking, *FIT, "--calibration-tokens", "0")


def test_a_broken_tokenizer(refused, speaking: Path, tmp_path: Path):
    model = Path(shutil.copytree(speaking, tmp_path / "model"))
    (model / "tokenizer.json").write_text("{]")
    assert "model has no tokenizer that transformers can open" in refused(model, *FIT)


def test_damage_that_only_reading_finds(refused, speaking: Path, tmp_path: Path):
    model = Path(shutil.copytree(speaking, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    for name in ("model.layers.2.mlp.experts.3.up_proj.weight", "model.norm.weight"):
        damaged = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
        save_file(damaged, model / "model.safetensors", {"format": "pt"})
        assert f"tensor {name} in model.safetensors holds NaN" in refused(model, *FIT)


def test_another_text_on_a_finished_folder(refused, speaking: Path, tmp_path: Path):
    assert ran(speaking, "--out", tmp_path / "out", *FIT, "--quiet") == 0
    assert "another calibration (sha256) and recipe (seed); use --overwrite" in refused(speaking, *FIT, "--seed", "1")
    assert ran(speaking, "--out", tmp_path / "out", *FIT, "--seed", "1", "--quiet", "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["namex"]["seed"] == 1


@pytest.mark.parametrize("when", [(), ("--dry-run",)], ids=["", "dry-run"])
def test_what_a_fit_of_layers_takes_is_said_beforehand(
    speaking: Path,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: tuple[str, ...],
):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(patch_screen, "SCORED_BYTES", 0)
    flags = (*FIT, "--calibration-data", prose, "--fit-steps", "3", *when)
    assert ran(speaking, "--out", tmp_path / "router", *flags) == 0
    assert "layers fitted" not in "".join(capsys.readouterr())
    assert ran(speaking, "--out", tmp_path / "layer", *flags, "--fit", "layer") == 0
    said = flat("".join(capsys.readouterr()))
    assert re.search(r"3 layers fitted, each in 3 steps and [\d.e-]+ T operations: at least 0 s a layer", said)
    recipe = Recipe(merge="grouped", experts=3, fit="layer", fit_steps=3, calibration_tokens=1024)
    peak = peak_bytes(make_plan(resolve(str(speaking)), recipe, "5GB", reads_text=False))
    assert f"about {peak / 1e6:.2f} MB of memory" in said
