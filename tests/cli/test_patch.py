"""namex-patch on toy checkpoints: what it says, what it leaves alone, what it does."""

import json
import shutil
import struct
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from namex_hf.commands import patch, patch_screen
from namex_hf.recipe import FIELDS, Recipe
from namex_hf.resources import PACKAGED
from tests.helpers.checkpoints import all_files, change_config
from tests.helpers.toy_models import save_toy, toy_tokenizer

ROOT = Path(__file__).parents[2]


def ran(*arguments: object) -> int:
    return patch.main([str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in all_files(folder).items()}


def test_installed_commands_are_these():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"namex-patch", "namex-inspect"} <= set(scripts)
    for place in scripts.values():
        module, name = place.split(":")
        assert callable(getattr(import_module(module), name))


def test_the_whole_help_mentions_every_field_and_choice(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        patch.main(["--help-all"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for spec in FIELDS.values():
        assert f"--{spec.name.replace('_', '-')} " in text
        assert all(choice in text for choice in spec.choices)
    for flag in ("out", "recipe", "revision", "dry-run", "overwrite", "shard-size", "export-as", "quiet"):
        assert f"--{flag} " in text


def test_quiet_prints_nothing(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert ran(toy, "--out", tmp_path / "out", "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "out" / "config.json").is_file()
    assert ran(toy, "--out", tmp_path / "out", "--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_no_tokenizer_no_perplexity_and_a_line_that_says_so(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert ran(toy, "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "no tokenizer in the checkpoint: perplexity is skipped" in said.err
    assert "agreement" in said.out
    assert str(tmp_path / "out") in said.out
    assert json.loads((tmp_path / "out" / "namex/report.json").read_text())["perplexity"] is None


def test_a_broken_tokenizer_costs_the_perplexity_only(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (copied / "tokenizer.json").write_text("{]")
    (copied / "tokenizer_config.json").write_text("[")
    assert ran(copied, "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "perplexity cannot be measured and is skipped" in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "["


def test_perplexity_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 128)
    model = save_toy(tmp_path / "model", tokenizer=True)
    assert ran(model, "--out", tmp_path / "out") == 0
    said, report = capsys.readouterr(), json.loads((tmp_path / "out" / "namex/report.json").read_text())
    assert list(report["perplexity"]) == ["arithmetic", "code", "dictionary", "manual", "prose", "mean"]
    assert all(value["before"] > 1 and value["after"] > 1 for value in report["perplexity"].values())
    for domain in report["perplexity"]:
        assert domain in said.out
        assert domain in (tmp_path / "out" / "README.md").read_text()


def test_the_same_command_again_says_complete(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = (toy, "--out", tmp_path / "out")
    assert ran(*command) == 0
    before, _ = files(tmp_path / "out"), capsys.readouterr()
    assert ran(*command) == 0
    said = capsys.readouterr()
    assert "is complete" in said.err
    assert said.out == ""
    assert files(tmp_path / "out") == before


def test_overwrite_replaces_another_run_and_reports_it(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert ran(toy, "--out", tmp_path / "out", "--quiet") == 0
    assert ran(toy, "--out", tmp_path / "out", "--method", "ep-camex", "--overwrite") == 0
    said = capsys.readouterr()
    assert "is complete" not in said.err
    assert "ep-camex" in said.out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["namex"]["method"] == "ep-camex"


def test_flags_go_before_the_recipe_file(toy: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# a comment\nmethod: ep-camex\ngamma: 0.5\nbase: mean\n")
    assert ran(toy, "--out", tmp_path / "out", "--recipe", recipe, "--gamma", "0.25", "--quiet") == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["namex"]
    assert stored == Recipe(method="ep-camex", gamma=0.25, base="mean").to_stored()
    assert Recipe.from_yaml(tmp_path / "out" / "namex/recipe.yaml").to_stored() == stored


def test_every_field_is_a_flag(toy: Path, tmp_path: Path):
    flags = "--merge grouped --method namex-full --weighting nash --experts 4 --grouping weights --routing linear "
    flags += "--disagreement mean --base shared --granularity expert --scale simplex --gamma 1 --every 1 --seed 3"
    flags += " --device cpu --momentum none --solver newton --ccp-iterations 2"
    flags += " --routing-span all --fit none --curvature identity --align none --down merge --metric euclidean"
    flags += " --power equal --calibration-data packaged --calibration-tokens 65536 --calibrate after --ridge 0.01"
    flags += " --fit-steps 1000 --operator merge --renormalise false --first-layer merged"
    walking = "--merge soft --momentum complex --beta 0.9,0.25 --eta 0.5 --segment 8 --top-k 2 --quiet"
    walking += " --curvature calibrated --rank 2 --calibration-tokens 4096 --routing cosine --temperature norms"
    aiming = "--merge grouped --experts 4 --budget damage --down refit --target layer --calibration-tokens 4096 --quiet"
    narrow = "--neurons energy --sweeps 2 --error-weights source --calibration-tokens 4096 --quiet"
    by_width, by_share = f"--merge narrow --width 4 {narrow}", f"--keep 0.5 {narrow}"
    given = {flag for flag in f"{flags} {walking} {aiming} {by_width} {by_share}".split() if flag.startswith("--")}
    assert given - {"--quiet"} == {f"--{spec.name.replace('_', '-')}" for spec in FIELDS.values()}
    speaking = save_toy(tmp_path / "speaking", tokenizer=True)
    assert ran(speaking, "--out", tmp_path / "walking", *walking.split()) == 0
    config = json.loads((tmp_path / "walking" / "config.json").read_text())
    walked = {"merge": "soft", "momentum": "complex", "beta": "0.9,0.25", "eta": 0.5, "segment": 8, "top_k": 2}
    walked |= {"curvature": "calibrated", "rank": 2, "calibration_tokens": 4096}
    wanted = Recipe.from_dict({**walked, "routing": "cosine", "temperature": "norms"})
    assert config["namex"] == wanted.to_stored()
    assert ran(speaking, "--out", tmp_path / "aiming", *aiming.split()) == 0
    config = json.loads((tmp_path / "aiming" / "config.json").read_text())
    wanted = Recipe(merge="grouped", experts=4, budget="damage", down="refit", target="layer", calibration_tokens=4096)
    assert config["namex"] == wanted.to_stored()
    assert sum(config["layer_experts"]) == 4 * 3
    wanted = Recipe(
        merge="narrow", width=4, neurons="energy", sweeps=2, error_weights="source", calibration_tokens=4096
    )
    for name, way in (("width", by_width), ("share", by_share)):
        assert ran(speaking, "--out", tmp_path / name, *way.split()) == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["namex"] == wanted.to_stored()
        assert config["moe_intermediate_size"] == 4
    assert ran(toy, "--out", tmp_path / "out", *flags.split(), "--quiet") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = Recipe(merge="grouped", experts=4, weighting="nash", disagreement="mean", granularity="expert", seed=3)
    assert config["namex"] == wanted.to_stored()
    assert (config["num_experts"], config["num_experts_per_tok"]) == (4, 3)
    assert "device" not in (tmp_path / "out" / "namex/recipe.yaml").read_text()


def test_deepseek_as_stock_qwen(toys: dict[str, Path], tmp_path: Path):
    flags = ("--merge", "grouped", "--experts", "4", "--export-as", "qwen2_moe", "--quiet")
    assert ran(toys["deepseek"], "--out", tmp_path / "out", *flags) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_experts"], config["mlp_only_layers"]) == ("qwen2_moe", 4, [0])
    assert "auto_map" not in config
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.1.mlp.shared_expert_gate.weight"].float().unique().item() == pytest.approx(
        1e-20, rel=0.01, abs=0
    )


def test_stable_routing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """On a packaged model, with nothing more than is said: a table of its vocabulary in every layer, perplexities, and
    the same command again finds the folder complete."""
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 256)
    command = ("tiny", "--out", tmp_path / "out", "--routing", "stable", "--calibration-tokens", "4096")
    assert ran(*command) == 0
    said, report = capsys.readouterr(), json.loads((tmp_path / "out" / "namex/report.json").read_text())
    assert "calibrated on 4096 tokens of packaged" in said.out
    assert "Traceback" not in said.err
    config, tensors = json.loads((tmp_path / "out" / "config.json").read_text()), {}
    for file in (tmp_path / "out").glob("model*.safetensors"):
        tensors |= load_file(file)
    tables = {name: tensor for name, tensor in tensors.items() if ".stable_router." in name}
    assert len(tables) == len(report["layers"]) == 5
    for layer in report["layers"]:
        table = tables[f"model.layers.{layer['layer']}.mlp.stable_router.assignment"]
        assert tuple(table.shape) == (config["vocab_size"], config["num_experts_per_tok"])
        assert table.dtype == torch.int32
        assert 0 < (table[:, 0] >= 0).sum() < len(table)
        assert 0.2 < layer["routing"]["agreement"] <= 1
        assert 0.5 < layer["routing"]["assigned"] <= 1
    assert report["perplexity"]["mean"]["after"] < 3 * report["perplexity"]["mean"]["before"]
    before = files(tmp_path / "out")
    assert ran(*command) == 0
    assert "is complete" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_the_dry_run_of_a_routing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Stable names its text; a cosine router reads one only where its temperature is to come from it."""
    monkeypatch.setenv("COLUMNS", "200")
    said = []
    for flags in ("", "--routing stable", "--routing cosine", "--routing cosine --temperature entropy"):
        tokens = "--calibration-tokens 4096" if flags.endswith(("stable", "entropy")) else ""
        assert ran("tiny", "--out", tmp_path / "out", "--dry-run", *flags.split(), *tokens.split()) == 0
        rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        said.append({row[1].strip(): row[2].strip() for row in rows})
    linear, stable, norms, by_text = said
    assert stable["calibration text"] == by_text["calibration text"] == "4096 tokens of packaged, not read yet"
    assert not {"calibration text"} & (linear.keys() | norms.keys())
    assert linear["bytes in"] == stable["bytes in"] == norms["bytes in"]
    assert norms["bytes out"] == by_text["bytes out"] != linear["bytes out"]
    config = json.loads((PACKAGED / "tiny" / "config.json").read_text())
    table = 5 * config["vocab_size"] * config["num_experts_per_tok"] * 4
    more = float(stable["bytes out"].removesuffix(" MB")) - float(linear["bytes out"].removesuffix(" MB"))
    assert more == pytest.approx(table / 1e6, abs=0.011)
    assert not (tmp_path / "out").exists()


def test_small_shards(toy: Path, tmp_path: Path):
    flags = ("--merge", "grouped", "--experts", "7", "--shard-size", "0.01MB", "--quiet")
    assert ran(toy, "--out", tmp_path / "out", *flags) == 0
    assert len(list((tmp_path / "out").glob("model-0000?-of-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_the_dry_run_tells_and_does_nothing(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert ran(toy, "--out", tmp_path / "out", "--dry-run", "--merge", "grouped", "--experts", "4") == 0
    said = capsys.readouterr()
    assert "8 -> 4" in said.out
    for word in ("MoE layers", "bytes in", "bytes out", "peak memory", "disk needed / free"):
        assert word in said.out
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_needs_the_headers_only(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Behind the header is a hole."""
    weights = copied / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = struct.pack("<Q", length) + (file.read(length))
    with weights.open("wb") as file:
        file.write(header)
        file.truncate(size)
    assert ran(copied, "--out", tmp_path / "out", "--dry-run") == 0
    assert "bytes in" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_no_tensor_is_read_before_the_dry_run_ends(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from namex_hf.checkpoint.bytes import Reader

    def no(*_: object) -> None:
        raise AssertionError("a tensor was read")

    for name in ("read", "read_into", "copy", "expect"):
        monkeypatch.setattr(Reader, name, no)
    assert ran(toy, "--out", tmp_path / "out", "--dry-run") == 0


def test_the_dry_run_answers_for_the_folder_too(refused, toy: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert "holds something else" in refused(toy, "--dry-run", out=tmp_path / "mine")


def test_names_that_look_like_markup(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = copied.rename(tmp_path / "[red]model[")
    out = tmp_path / "x[" / "a]"
    assert ran(model, "--out", out, "--method", "ep-camex") == 0
    assert str(out) in capsys.readouterr().out
    assert ran(model, "--out", out, "--method", "ep-camex") == 0


def test_a_model_named_by_a_dot_has_a_name(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(copied)
    assert ran(".", "--out", tmp_path / "out", "--method", "smoe", "--quiet") == 0
    assert json.loads((tmp_path / "out" / "namex/report.json").read_text())["source"]["name"] == "copied"


def test_configuration_and_tokenizer_of_others_lose_paths_and_code(copied: Path, tmp_path: Path):
    change_config(copied, _name_or_path="/home/somebody/secret", auto_map={"AutoConfig": "else--x.C"})
    toy_tokenizer().save_pretrained(copied)
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoTokenizer": ["x.T", None]}})
    )
    (copied / "tokenization_x.py").write_text("raise SystemExit")
    assert ran(copied, "--out", tmp_path / "out", "--merge", "grouped", "--experts", "8", "--quiet") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"_name_or_path", "auto_map"} & set(config)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings
    assert not list((tmp_path / "out").glob("*.py"))


def test_the_model_is_left_as_it_was(copied: Path, tmp_path: Path):
    before = files(copied)
    assert ran(copied, "--out", tmp_path / "out", "--quiet") == 0
    assert files(copied) == before
    shutil.rmtree(tmp_path / "out")


def test_momentum_tells_whether_the_walk_settles(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert ran(toy, "--out", tmp_path / "steady", "--momentum", "complex") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "spectral radius of the walk: 0.949 a layer" in said
    assert "warning" not in said
    assert ran(toy, "--out", tmp_path / "growing", "--momentum", "quaternion") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "spectral radius of the walk: 1.036 a layer" in said
    assert "warning: 1 or more" in said
