"""namex-patch and namex-report with ``merge: narrow``, on a packaged model and on toys."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import local_folder, resolve
from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.commands import patch, patch_screen, report
from namex_hf.evaluation.loading import load, tokenizer_of
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.files import read_json, size_text
from namex_hf.quantising.matrices import matrices_of
from tests.helpers.checkpoints import read_config, settled_files
from tests.helpers.toy_models import VOCAB

ON_PACKAGED = {"merge": "narrow", "calibration_tokens": 4096}
NARROW = ("--merge", "narrow", "--calibration-tokens", "4096")
Said = pytest.CaptureFixture[str]


def ran(*arguments: object) -> int:
    return patch.main([str(argument) for argument in arguments])


def rows_of(text: str) -> dict[str, str]:
    lines = [line.split("│") for line in text.splitlines() if line.startswith("│")]
    return {line[1].strip(): line[2].strip() for line in lines}


def test_from_beginning_to_end(tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of every expert of a packaged model: a stock folder, what it says of itself, and its pictures."""
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 1024)
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    assert ran("tiny", "--out", out, *NARROW, "--width", "40") == 0
    said, record = capsys.readouterr(), json.loads((out / "namex/report.json").read_text())
    assert "tiny: narrow, linear routing" in said.out
    assert "grouped products" not in said.err
    for layer in record["layers"]:
        assert 0 < layer["errors"][0]["error"] < 0.5
        assert f" {layer['errors'][0]['error']:.4f} " in said.out
    assert ("error narrowed" in said.out, "no game" in said.out) == (True, False)
    answers = record["answers"]
    assert 0 < answers["after"] < answers["before"] < answers["problems"] == 200
    line = f"It answers {answers['after']} of 200 word problems exactly, the original {answers['before']}: "
    assert line in said.out
    assert len(answers["examples"]) == 2
    for one in answers["examples"]:
        assert one["prompt"].splitlines()[0] in said.out
        assert f"original: {' '.join(one['before'].split())}\n" in said.out
        assert f"result: {' '.join(one['after'].split())}\n" in said.out
    assert answers["low"] < answers["value"] == pytest.approx((answers["after"] - answers["before"]) / 2)
    assert "less, in more time and with enough text: --fit layer." in said.out
    mean = record["perplexity"]["mean"]
    assert mean["before"] < mean["after"] < 1.6 * mean["before"]
    config = read_config(out)
    assert (config["model_type"], config["moe_intermediate_size"]) == ("qwen2_moe", 40)
    model = load(out)
    assert model.model.layers[0].mlp.experts.down_proj.shape == (16, 128, 40)
    card = (out / "README.md").read_text()
    assert "`narrow`: every expert and the router, with fewer neurons in each expert" in card
    assert "the sparse original" not in card
    assert report.main([str(out), "--tokens", "1024"]) == 0
    page = (out / "namex/pictures/report.html").read_text()
    assert "narrow, linear routing: every expert and the router, with fewer neurons in each expert" in page
    assert (out / "namex/pictures/6-damage.png").is_file()


def test_the_dry_run_tells_the_width(tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = []
    for flags in ((*NARROW, "--width", "40"), ("--merge", "grouped", "--experts", "8")):
        assert ran("tiny", "--out", tmp_path / "out", *flags, "--dry-run") == 0
        said.append(rows_of(capsys.readouterr().out))
    narrow, grouped = said
    assert narrow["neurons a routed expert"] == "80 -> 40"
    assert narrow["routed experts a layer"] == "16 -> 16"
    assert "neurons a routed expert" not in grouped
    gone = 5 * 16 * 3 * 128 * 40 * 2 / 1e6
    sizes = [float(narrow[f"bytes {way}"].removesuffix(" MB")) for way in ("in", "out")]
    assert sizes[0] - sizes[1] == pytest.approx(gone, abs=0.011)
    assert ran("tiny", "--out", tmp_path / "out", *NARROW, "--width", "40", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["width"] == 40
    assert not (tmp_path / "out").exists()


def test_several_shares_are_a_folder_each(tmp_path: Path, capsys: Said) -> None:
    """Each as the run of its width alone; what cannot be is refused before anything is written."""
    out, flags = tmp_path / "out", ("--quiet", "--calibration-tokens", "4096")
    assert ran("tiny", "--out", out, "--keep", "0.75", "0.5", *flags, "--json") == 0
    reports = json.loads(capsys.readouterr().out)
    assert ran("tiny", "--out", tmp_path / "alone", "--merge", "narrow", "--width", "60", *flags) == 0
    for share, width in (("0.75", 60), ("0.5", 40)):
        folder = out / f"keep-{share}"
        assert read_config(folder)["moe_intermediate_size"] == reports[share]["run"]["recipe"]["width"] == width
    assert settled_files(out / "keep-0.75") == settled_files(tmp_path / "alone")
    for wrong, answer in (
        (("0.5", "1.5"), "recipe field 'keep' is 1.5; accepted: a number above 0 and below 1"),
        (("0.5", "0.5"), "--keep 0.5 0.5: a share is stated twice"),
        (("0.5", "0.25", "--push-to-hub", "me/it"), "--push-to-hub pushes one result"),
    ):
        assert ran("tiny", "--out", tmp_path / "new", "--keep", *wrong) == 2
        assert answer in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("fit", "states"), [("none", sum), ("layer", max)])  # at once, and one after another
def test_a_dry_run_of_several_shares_says_the_room_for_all(
    tmp_path: Path, capsys: Said, fit: str, states: Callable[[Iterable[int]], int]
) -> None:
    flags = ("tiny", "--out", tmp_path / "out", "--keep", "0.75", "0.5", "--fit", fit, "--dry-run")
    assert ran(*flags, "--json") == 0
    each = json.loads(capsys.readouterr().out).values()
    state = states(one["space_needed"] - one["bytes_out"] for one in each)
    assert ran(*flags) == 0
    needed = size_text(state + sum(one["bytes_out"] for one in each))
    assert f"all 2: disk needed / free: {needed} / " in capsys.readouterr().out


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, capsys: Said) -> None:
    """Moments are of a cut without a sweep, and of one model."""
    moments = ("--moments", tmp_path / "moments", "--dry-run")
    flags = ("tiny", "--out", tmp_path / "out", "--keep", "0.5")
    assert ran(*flags, *moments) == 2
    assert "--moments stands for the text" in capsys.readouterr().err
    assert ran(*flags, "--sweeps", "0", *moments) == 0
    saved = ("--moments", tmp_path / "saved", "--sweeps", "0", "--calibration-tokens", "4096", "--quiet")
    assert ran(*flags, *saved) == 0
    capsys.readouterr()
    assert ran("tiny", "--out", tmp_path / "new", "--keep", "0.5", *moments, "--sweeps", "0", "--like", saved[1]) == 2
    assert "--like reads what --moments has saved of another model: one of the two" in capsys.readouterr().err


def test_several_shares_by_what_the_first_measured(tmp_path: Path) -> None:
    out, moments = tmp_path / "out", tmp_path / "moments"
    flags = ("--sweeps", "0", "--calibration-tokens", "4096", "--quiet", "--keep")
    assert ran("tiny", "--out", out, *flags, "0.75", "0.5", "--moments", moments) == 0
    assert ran("tiny", "--out", tmp_path / "alone", *flags, "0.5") == 0
    assert (moments / "complete").is_file()
    assert settled_files(out / "keep-0.5") == settled_files(tmp_path / "alone")
    first, second = (read_json(out / f"keep-{share}" / "namex" / "report.json") for share in (0.75, 0.5))
    assert [len(layer["errors"]) for report in (first, second) for layer in report["layers"]] == [1] * 5 + [0] * 5


def test_a_size_is_the_largest_width_below_it(tmp_path: Path, capsys: Said) -> None:
    for size, width in (("7MB", 58), ("6 MB", 42), ("5860 KB", 40), ("5850KB", 39)):
        assert ran("tiny", "--out", tmp_path / "out", "--size", size, "--dry-run", "--json") == 0
        what = json.loads(capsys.readouterr().out)
        assert what["width"] == width
        assert what["bytes_out"] <= float(size[:-2]) * (1e6 if size.endswith("MB") else 1e3)
    for wrong, answer in (
        (("--size", "9MB"), "--size 9MB: the model has 8.31 MB as it is"),
        (("--size", "3MB"), "--size 3.00 MB: with one neuron an expert the result still has 3.46 MB"),
        (("--size", "much"), "--size is 'much'; accepted: a size such as 5GB or 500MB"),
        (("--size", "6MB", "--keep", "0.5"), "--size stands in the place of --keep, --width and --experts"),
        (("--size", "6MB", "--merge", "grouped"), "--size chooses the width of merge 'narrow'; found merge=grouped"),
    ):
        assert ran("tiny", "--out", tmp_path / "out", *wrong) == 2
        assert answer in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_size_may_be_that_of_the_quantised_result(tmp_path: Path, capsys: Said) -> None:
    source = matrices_of(resolve("tiny"))
    for size, bits, width in (("4MB", 4, 64), ("4MB", 8, 32), ("3.8MB", 3, 64)):
        out = tmp_path / f"{size}-{bits}"
        asked = ("--size", size, "--bits", bits, "--calibration-tokens", 4096, "--quiet")
        assert ran("tiny", "--out", out, *asked) == 0
        found = matrices_of(open_checkpoint(out)).storage(bits)
        assert read_config(out)["moe_intermediate_size"] == width
        assert found == source.storage(bits, width)
        assert found.bytes <= 1e6 * float(size[:-2]) < source.storage(bits, width + 32).bytes
    capsys.readouterr()
    for wrong, answer in (
        (("--bits", 4), "--bits says what --size is the size of; found no --size"),
        (("--size", "5MB", "--bits", 4), "--size 5MB: the model has 4.30 MB as it is"),
        (("--size", "2MB", "--bits", 4), "--size 2.00 MB: with 32 neurons an expert the result still has 3.3"),
    ):
        assert ran("tiny", "--out", tmp_path / "out", *wrong) == 2
        assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (("--keep", "0.5"), []),
        (
            ("--keep", "0.5", "--calibration-tokens", "8192"),
            ["warning: little text, 2,048 tokens on average, 25.6 for"],
        ),
        (("--keep", "0.5", "--fit", "layer"), []),
        (
            ("--keep", "0.5", "--fit", "layer", "--calibration-tokens", "4096"),
            ["warning: 4,096 tokens are 8.5 equations for each number that is fitted", "about 7,680 tokens are needed"],
        ),
        (
            ("--merge", "grouped", "--experts", "8", "--fit", "layer", "--calibration-tokens", "4096"),
            ["warning: 4,096 tokens are 8.5 equations for each number that is fitted", "about 7,680 tokens are needed"],
        ),
    ],
)
def test_too_little_text_is_said(tmp_path: Path, capsys: Said, flags: tuple[str, ...], lines: list[str]) -> None:
    assert ran("tiny", "--out", tmp_path / "out", *flags, "--dry-run") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert all(line in said for line in lines)
    assert ("warning" in said) == bool(lines)


@pytest.mark.parametrize("fit", [(), ("--fit", "layer")])
def test_the_dry_run_reads_own_text(
    tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, fit: tuple[str, ...]
) -> None:
    """What the text has is told, as far as it was asked for, and that it is little; the folder's own run is known."""
    monkeypatch.setenv("COLUMNS", "200")
    text = tmp_path / "own.txt"
    text.write_text(held_out_texts()["prose"][:15_000], "utf-8")
    flags = ("--out", tmp_path / "out", "--keep", "0.5", "--calibration-data", text, *fit)
    assert ran("tiny", *flags, "--dry-run") == 0
    said = capsys.readouterr()
    tokens = int(re.search(r"(\d+) tokens of own.txt; it has no more, 65536 were asked for", said.out)[1])
    assert 2 * 512 <= tokens < 20_000
    assert f"a routed expert receives {tokens * 4 / 16:,.0f} tokens on average" in said.err
    assert "warning: little text" in said.err
    assert ("equations for each number that is fitted" in said.err) == bool(fit)
    assert ran("tiny", *flags, "--calibration-tokens", "1024", "--dry-run") == 0
    assert "1024 tokens of own.txt " in capsys.readouterr().out


def test_a_dry_run_for_a_device_that_is_elsewhere(tmp_path: Path, capsys: Said) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    assert ran("tiny", "--out", tmp_path / "out", "--keep", "0.5", "--device", "cuda", "--dry-run") == 0
    assert "no device cuda here: checked for the CPU" in capsys.readouterr().err
    assert ran("tiny", "--out", tmp_path / "out", "--keep", "0.5", "--device", "cuda") == 2


def test_the_packaged_text_is_for_the_packaged_models(tmp_path: Path, capsys: Said) -> None:
    shutil.copytree(local_folder("tiny"), tmp_path / "other")
    assert ran(tmp_path / "other", "--out", tmp_path / "out", "--keep", "0.5", "--dry-run") == 0
    assert "warning: the packaged text is what the packaged models were trained on" in capsys.readouterr().err


@pytest.mark.parametrize(("width", "warned"), [(40, False), (44, True)])
def test_widths_that_need_another_implementation(tmp_path: Path, capsys: Said, width: int, warned: bool) -> None:
    """What the note says holds: in the file's bfloat16 grouped products refuse, so the folder asks for the loop."""
    out = tmp_path / "out"
    assert ran("tiny", "--out", out, *NARROW, "--width", width, "--dry-run") == 0
    said = " ".join(capsys.readouterr().err.split())
    line = f"width {width} is no multiple of 8, which grouped products of bfloat16 need: config.json asks for"
    assert (f"{line} experts_implementation 'eager', which is slower" in said) == warned
    assert ran("tiny", "--out", out, *NARROW, "--width", width, "--quiet") == 0
    ids = torch.arange(3, 20)[None]
    assert AutoModelForCausalLM.from_pretrained(out)(ids).logits.isfinite().all()
    assert (read_config(out).get("experts_implementation") == "eager") == warned
    if warned:
        with pytest.raises(RuntimeError, match="16 bytes"):
            AutoModelForCausalLM.from_pretrained(out, experts_implementation="grouped_mm")(ids)
    model = patch_model(
        AutoModelForCausalLM.from_pretrained(local_folder("tiny")),
        Recipe(width=width, **ON_PACKAGED),
        tokenizer_of(local_folder("tiny")),
    )
    assert model(ids).logits.isfinite().all()
    assert ran(out, "--out", tmp_path / "again", *NARROW, "--width", 24, "--quiet") == 0
    assert "experts_implementation" not in read_config(tmp_path / "again")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "",
            "merge 'narrow' needs 'width', the number of neurons that stay, or 'keep', the share; found width=",
        ),
        ("--width 8", "recipe field 'width' is 8; this model's routed experts have 8 neurons; accepted: from 1 to 7"),
        ("--width 0", "accepted: a whole number from 1"),
        ("--width 4 --fit router", "'fit' is none or layer; found merge=narrow, fit=router"),
        ("--width 4 --method namex-full", "keeps every expert: 'method' says how experts are merged"),
        ("--width 4 --experts 4", "'experts' belongs to merge 'grouped'"),
        ("--width 4", "has no tokenizer, and this recipe reads calibration text"),
    ],
)
@pytest.mark.parametrize("when", ["", "--dry-run"])
def test_what_is_refused(refused, toy: Path, flags: str, says: str, when: str) -> None:
    assert says in refused(toy, "--merge", "narrow", *flags.split(), *when.split())


def test_other_merges_have_no_width(refused, toy: Path) -> None:
    assert "'width' belongs to merge 'grouped' or 'narrow'" in refused(toy, "--merge", "residual", "--width", "4")
    grouped = ("--merge", "grouped", "--experts", "4")
    assert "'neurons' belongs to a 'width'" in refused(toy, *grouped, "--neurons", "energy")


def test_no_other_form_of_a_deepseek(refused, toys: dict[str, Path]) -> None:
    said = refused(toys["deepseek"], *NARROW, "--width", "4", "--export-as", "qwen2_moe")
    assert "it needs merge 'grouped'" in said
    assert "found merge=narrow" in said
    both = ["--merge", "grouped", "--experts", "4", "--width", "4", "--export-as", "qwen2_moe"]
    assert "found width=4" in refused(toys["deepseek"], *both)


JAMBA = {
    **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_experts": 6},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "mamba_d_state": 4},
    **{"mamba_dt_rank": 2, "expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
}


@pytest.fixture(scope="module")
def jamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jamba")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("jamba", **JAMBA)).save_pretrained(folder)
    return folder


def test_a_family_whose_width_sizes_more(refused, jamba: Path, tmp_path: Path) -> None:
    """Jamba's dense layers have it too. The line ends in flags that work."""
    says = "merge 'narrow' changes 'intermediate_size', which sizes more than the routed experts of jamba; what works: "
    said = refused(jamba, "--merge", "narrow", "--width", "8")
    assert f"{says}--merge grouped --experts 3\n" in said
    works = said.rpartition("what works: ")[2].split()
    assert ran(jamba, "--out", tmp_path / "out", *works, "--quiet") == 0
