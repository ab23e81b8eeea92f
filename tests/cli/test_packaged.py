"""The packaged models, as a newcomer uses them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import namex_hf
from namex_hf import load_patched
from namex_hf.commands import inspect, patch, patch_screen
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.resources import packaged_models

MODELS = {"tiny": ("qwen2_moe", 5), "tiny-deepseek": ("deepseek", 4), "tiny-qwen3": ("qwen3_moe", 5)}
DOMAINS = ["arithmetic", "code", "dictionary", "manual", "prose", "mean"]
PACKAGED = Path(namex_hf.__file__).parent / "packaged"


def test_all_are_there():
    assert packaged_models() == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_plain_folders_of_the_hub(name: str, capsys: pytest.CaptureFixture[str]):
    folder = PACKAGED / name
    family, layers = MODELS[name]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == family
    assert not {"namex", "_name_or_path"} & set(config)
    assert ("auto_map" in config) == (family == "deepseek")  # which transformers does not know
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16 << 20
    assert bool(list(folder.glob("*.py"))) == (family == "deepseek")
    assert "/" not in (folder / "tokenizer_config.json").read_text().replace("<|", "").replace("</", "")
    assert inspect.main([name]) == 0
    said = capsys.readouterr().out
    assert family in said
    assert f"of which {layers} are MoE" in said


FLAGS = {"tiny-qwen3": ("--merge", "narrow", "--width", "56", "--calibration-tokens", "4096")}
"""Of a model whose family has not the class of the default recipe."""


def test_the_default_of_a_family_without_its_class_is_answered_with_what_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert patch.main(["tiny-qwen3", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("--keep 0.5")
    assert patch.main(["tiny-qwen3", "--out", str(tmp_path / "out"), *said.split()[-2:], "--dry-run"]) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_patch_from_beginning_to_end(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The default one, where the family has it."""
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 2048)  # four windows
    assert patch.main([name, "--out", str(tmp_path / "out"), *FLAGS.get(name, ())]) == 0
    said = capsys.readouterr().out
    assert all(domain in said for domain in DOMAINS)
    report = json.loads((tmp_path / "out" / "namex/report.json").read_text())
    assert report["source"]["name"] == name
    assert len(report["layers"]) == MODELS[name][1]
    assert list(report["perplexity"]) == DOMAINS
    mean = report["perplexity"]["mean"]
    assert 1 < mean["before"] < 40
    assert 0.8 < mean["after"] / mean["before"] < 1.25
    model = load_patched(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("Question: Anna has 4 apples", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("Question: Anna has 4 apples")


def test_half_of_a_deepseek_opens_as_stock_qwen(tmp_path: Path):
    flags = ["--merge", "grouped", "--experts", "8", "--export-as", "qwen2_moe", "--quiet"]
    assert patch.main(["tiny-deepseek", "--out", str(tmp_path / "half"), *flags]) == 0
    model = load(tmp_path / "half")
    assert type(model).__module__.startswith("transformers.models.qwen2_moe")
    assert model(input_ids=torch.arange(20)[None]).logits.isfinite().all()


def test_a_bare_name_is_the_packaged_model_and_a_path_is_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """So the result may have the model's own name, and the command can be given again."""
    monkeypatch.chdir(tmp_path)
    command = ["tiny", "--out", "tiny", "--method", "ep-camex"]
    assert patch.main([*command, "--quiet"]) == 0
    assert patch.main(command) == 0
    assert "is complete" in capsys.readouterr().err
    assert patch.main(["./tiny", "--out", "other"]) == 2
    assert "patched already" in capsys.readouterr().err


def test_help_names_them(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        patch.main(["--help"])
    assert "tiny,tiny-deepseek,tiny-qwen3" in "".join(capsys.readouterr().out.split())


def test_cosine_routing_without_text_is_compared_on_held_out_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 700)  # a window and a part of one
    assert patch.main(["tiny-deepseek", "--out", str(tmp_path / "out"), "--method", "smoe", "--routing", "cosine"]) == 0
    assert "agreement with linear" in capsys.readouterr().out
    report, model = json.loads((tmp_path / "out" / "namex/report.json").read_text()), load(tmp_path / "out")
    tokenizer, wanted, found = AutoTokenizer.from_pretrained(tmp_path / "out"), [], []
    block = model.model.layers[1].mlp  # the first that is a mixture
    block.register_forward_pre_hook(lambda _, given: wanted.append(given[0][0] @ block.gate.weight.T))
    block.cosine_router.register_forward_hook(lambda _module, _given, answer: found.append(answer[2]))
    for text in held_out_texts().values():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :700]
        for window in (ids[:, :512], ids[:, 512:]):
            model(window)
    pairs = zip(torch.cat(wanted).topk(4).indices.tolist(), torch.cat(found).tolist(), strict=True)
    shares = [len({*one} & {*other}) / 4 for one, other in pairs]
    assert report["layers"][0]["routing"]["agreement"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    assert len(report["layers"]) == 4


def test_trainable_curvature_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(patch_screen, "SCORED_TOKENS", 64)
    command = ["tiny", "--out", str(tmp_path / "out"), "--merge", "soft", "--curvature", "kronecker"]
    counts = "1,452 parameters an expert, 116,160 parameters in all"
    assert patch.main([*command, "--dry-run"]) == 0
    assert counts in capsys.readouterr().out
    assert patch.main(command) == 0
    assert counts in capsys.readouterr().out
    stored = load(tmp_path / "out").model.layers[0].mlp.curvature.state_dict()
    assert sum(tensor.numel() for tensor in stored.values()) == 1452 * 16
