"""Bad input: exit status 2, one line that says what is accepted, nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from namex_hf.commands import patch, patch_screen
from tests.helpers.checkpoints import change_config

FLAGS = [
    ("--metod namex", "--metod"),
    ("--meth namex", "--meth"),
    ("--method", "expected one argument"),
    ("--method nash", "accepted: namex-full, namex, ep-camex, camex, smear, smoe"),
    ("--merge blended", "accepted: residual, soft, grouped"),
    ("--routing sine", "accepted: linear, cosine, stable"),
    ("--temperature norms", "'temperature' belongs to routing 'cosine'; found routing=linear, temperature=norms"),
    ("--routing stable --temperature entropy", "'temperature' belongs to routing 'cosine'; found routing=stable"),
    ("--routing cosine --temperature hot", "'temperature' is 'hot'; accepted: norms, entropy"),
    ("--routing cosine --calibration-tokens 4096", "'calibration_tokens' belongs to a recipe that reads calibration"),
    ("--routing stable", "has no tokenizer, and this recipe reads calibration text"),
    ("--routing cosine --temperature entropy", "has no tokenizer, and this recipe reads calibration text"),
    ("--merge soft --curvature kronecker --rank 8", "'rank' is 8; accepted here: from 1 below 8"),
    ("--merge grouped --experts 4 --curvature kronecker", "it needs merge 'soft'"),
    ("--gamma abc", "'gamma' is 'abc'; accepted: float"),
    ("--gamma nan", "accepted: a finite float"),
    ("--gamma inf", "accepted: a finite float"),
    ("--gamma -1", "accepted: a number above 0"),
    ("--gamma 0", "accepted: a number above 0"),
    ("--experts 2.5 --merge grouped", "'experts' is '2.5'; accepted: int"),
    ("--experts 0 --merge grouped", "accepted: a whole number from 1"),
    ("--experts 9 --merge grouped", "'experts' is 9; this model has 8"),
    ("--base index:8", "accepted here: index:0 to index:7"),
    ("--base last", "accepted: shared, first, mean, index:K"),
    ("--seed -1 --merge grouped --experts 4", "accepted: a whole number from 0"),
    ("--device abacus", "'device' is 'abacus'; accepted: a torch device"),
    ("--device meta", "'device' is 'meta'; accepted: a torch device"),
    ("--merge grouped", "needs 'experts'"),
    ("--experts 4", "belongs to merge 'grouped'"),
    ("--method smear", "no base expert to take the mass that top-k leaves over"),
    ("--method smear --merge soft --top-k 9", "'top_k' is 9; this model has 8 experts a layer"),
    ("--method camex --gamma 0.5", "'gamma' is a choice of the propagated base expert"),
    ("--method ep-camex --disagreement mean", "Nash bargain, which this recipe does not play"),
    ("--export-as qwen2_moe", "--export-as qwen2_moe of a qwen2_moe model; accepted: qwen2_moe, of deepseek"),
    ("--export-as llama", "--export-as llama"),
    ("--shard-size abc", "--shard-size is 'abc'; accepted: a size such as 5GB"),
    ("--shard-size 0", "accepted: a size such as 5GB"),
    ("--shard-size=-1GB", "accepted: a size such as 5GB"),
    ("--shard-size 5XB", "accepted: a size such as 5GB"),
    ("--revision main", "--revision main belongs to a Hub id"),
]


@pytest.mark.parametrize(("flags", "says"), FLAGS, ids=[flags for flags, _ in FLAGS])
@pytest.mark.parametrize("when", ["", "--dry-run"])
def test_flags(refused, toy: Path, flags: str, says: str, when: str):
    assert says in refused(toy, *flags.split(), *when.split())


def test_out_is_needed(capsys: pytest.CaptureFixture[str], toy: Path):
    with pytest.raises(SystemExit) as ended:
        patch.main([str(toy)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("namex-patch: error: ")
    assert "--out" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- merge\n", "holds list; accepted: a mapping"),
        ("just words\n", "holds str; accepted: a mapping"),
        ("merge: [\n", "cannot be read"),
        ("method: nash\n", "accepted: namex-full"),
        ("metod: namex\n", "unknown recipe field 'metod'; accepted: merge, method"),
        ("gamma: high\n", "'gamma' is 'high'; accepted: a finite float"),
        ("merge: grouped\nexperts: 4\nbase: mean\n", "'base' is a choice of the base expert"),
    ],
)
def test_recipe_files(refused, toy: Path, tmp_path: Path, text: str, says: str):
    (tmp_path / "recipe.yaml").write_text(text)
    assert says in refused(toy, "--recipe", str(tmp_path / "recipe.yaml"))


def test_recipe_file_that_is_not_there(refused, toy: Path, tmp_path: Path):
    assert "absent.yaml cannot be read" in refused(toy, "--recipe", str(tmp_path / "absent.yaml"))
    assert "cannot be read" in refused(toy, "--recipe", str(tmp_path))


def test_the_recipe_is_answered_before_the_model_is_looked_at(refused):
    for when in ((), ("--dry-run",)):
        assert "accepted: namex-full" in refused("nothing-of-that-name", "--method", "nash", *when)


@pytest.mark.parametrize(
    "model", ["nothing-of-that-name", "../nothing", "./no/such/folder", "a/b/c", "-/x", "a--b/c", " "]
)
def test_models_that_are_nothing(refused, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if not model.startswith("-"):
        assert "accepted: a folder, a packaged model" in refused(model)
    else:
        assert "error" in refused(model)


def test_a_file_is_no_model(refused, tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch):
    assert "accepted: a folder" in refused(toy / "model.safetensors")
    monkeypatch.chdir(toy.parent)
    assert "accepted: a folder" in refused("qwen2_moe/model.safetensors")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model_type": "llama"},
            "'llama' is not a supported family: this is a mixture of experts; accepted: deepseek",
        ),
        ({"model_type": None}, "None is not a supported family"),
        ({"model_type": ["qwen2_moe"]}, "is not a supported family"),
        ({"model_type": "namex_qwen2_moe"}, "this model is patched already"),
        ({"num_experts": "8"}, "'num_experts' is '8'; qwen2_moe needs a whole number from 1"),
        ({"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0; qwen2_moe needs a whole number from 1"),
        ({"num_experts": 9}, "experts.8.gate_proj.weight is missing"),
        ({"norm_topk_prob": True}, "norm_topk_prob = true"),
        (
            {"shared_expert_intermediate_size": 20},
            "'base' is 'shared'; the shared expert's width 20 is no multiple of the routed width 8: choose another",
        ),
    ],
)
def test_configurations(refused, copied: Path, changes: dict, says: str):
    change_config(copied, **changes)
    assert says in refused(copied)
    assert says in refused(copied, "--dry-run")


def test_export_needs_a_grouped_deepseek(refused, toys: dict[str, Path]):
    assert "needs merge 'grouped'" in refused(toys["deepseek"], "--export-as", "qwen2_moe")
    grouped = ("--merge", "grouped", "--experts", "4")
    for when in ((), ("--dry-run",)):
        for flags in (grouped, ("--method", "smoe")):
            said = refused(toys["deepseek"], *flags, "--routing", "cosine", "--export-as", "qwen2_moe", *when)
            assert "it needs merge 'grouped', routing 'linear' and budget 'equal'; found merge=" in said
            assert "routing=cosine" in said
    assert "accepted: qwen2_moe, of deepseek" in refused(toys["deepseek"], *grouped, "--export-as", "mixtral")


def test_export_of_a_deepseek_with_biases(refused, toys: dict[str, Path], tmp_path: Path):
    model = Path(shutil.copytree(toys["deepseek"], tmp_path / "biased"))
    change_config(model, attention_bias=True)
    flags = ("--merge", "grouped", "--experts", "4", "--export-as", "qwen2_moe")
    assert "'attention_bias' is true" in refused(model, *flags)


def test_pickles_are_never_opened(refused, copied: Path):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    assert "pickle files only (pytorch_model.bin)" in refused(copied)


def test_damage_that_only_reading_finds(refused, copied: Path, tmp_path: Path):
    tensors = load_file(copied / "model.safetensors")
    for name in ("model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"):
        damaged = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
        save_file(damaged, copied / "model.safetensors", {"format": "pt"})
        for flags in ((), ("--merge", "grouped", "--experts", "4")):
            assert f"tensor {name} in model.safetensors holds NaN" in refused(copied, *flags)


def test_output_folders(refused, toy: Path, tmp_path: Path):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "file").write_text("text")
    for flags in ((), ("--overwrite",), ("--dry-run",)):
        assert "holds something else" in refused(toy, *flags, out=foreign)
        assert "is a file" in refused(toy, *flags, out=tmp_path / "file")
    assert "file" in refused(toy, out=tmp_path / "file" / "below")
    assert "own folder" in refused(toy, out=toy)
    assert "own folder" in refused(toy, out=toy / "out")


def test_another_run_on_a_finished_folder(refused, toy: Path, tmp_path: Path):
    assert patch.main([str(toy), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    for flags in ((), ("--dry-run",)):
        assert "another recipe (gamma); use --overwrite" in refused(toy, "--gamma", "0.5", *flags)


def test_an_interrupt_is_no_traceback(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(patch_screen, "run_all", stop)
    assert patch.main([str(toy), "--out", str(tmp_path / "out")]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
