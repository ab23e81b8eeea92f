"""The SmolTalk script as a user calls it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, load_patched, patch_checkpoint, patch_model
from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.report.write import write_pictures
from namex_hf.training.bargain import distance, rebargain
from namex_hf.training.gathered import base_of
from namex_hf.training.trainer import last_checkpoint


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def ids() -> torch.Tensor:
    return torch.randint(3, 4096, (2, 40), generator=torch.Generator().manual_seed(0))


def bases(model) -> list[dict[str, torch.Tensor]]:
    return [base_of(layer.mlp) for layer in model.model.layers]


def test_the_folder_is_a_patched_one(plain):
    model = load_patched(plain.out)
    assert AutoTokenizer.from_pretrained(plain.out).chat_template
    assert model.config.use_cache
    assert not model.config.output_router_logits
    names = load_file(plain.out / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    assert not (plain.out / ".namex").exists()
    assert not torch.equal(names["lm_head.weight"], names["model.embed_tokens.weight"])  # they train apart
    config = json.loads((plain.out / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["rope_theta"], config["rope_scaling"], config["tie_word_embeddings"]) == (10000.0, None, False)
    recipe = Recipe.from_yaml(plain.out / "namex/recipe.yaml")
    assert recipe == Recipe() == Recipe.from_dict(model.config.namex)
    statistics = load_file(plain.out / "namex/statistics.safetensors")
    assert statistics["layers.4.cosines"].shape == (3, 16, 16)


def test_experts_and_everything_else_were_trained(plain):
    before = patch_model(AutoModelForCausalLM.from_pretrained(PACKAGED / "tiny", dtype=torch.float32), Recipe())
    after = load_patched(plain.out).state_dict()
    still = [name for name, tensor in before.state_dict().items() if torch.equal(tensor, after[name])]
    assert not [name for name in still if "rotary" not in name]


def test_the_bases_are_what_a_walk_through_the_trained_experts_gives(plain):
    model = load_patched(plain.out)
    found = bases(model)
    settled = rebargain(model, Recipe())
    for layer, base in zip(settled[1:], found[1:], strict=True):
        assert layer.drift < 1e-6
        assert distance(base, bases(model)[layer.layer]) < 1e-6
    for layer, record in zip(settled, plain.report["layers"], strict=True):
        assert layer.layer == record["layer"]
        for game, noted in zip(layer.record, record["games"], strict=True):
            assert game["weights"] == pytest.approx(noted["weights"], rel=1e-4)


def test_what_is_logged(plain):
    assert [entry["step"] for entry in plain.losses] == [1, 2, 3, 4, 5]
    for entry in plain.losses:
        assert entry["aux_loss"] > 3.9  # at least top-k where all are used alike
        assert ("bargain/drift" in entry) == (entry["step"] in (2, 4))
    assert plain.losses[1]["bargain/drift"] > 0.01
    assert plain.losses[1]["bargain/residual"] < 1e-9
    training = plain.report["training"]
    assert training["steps"] == 5
    assert training["trainable"] == training["parameters"]
    assert 0 < training["bargain_seconds"] < training["seconds"]


def test_what_is_printed(plain):
    for text in ("chats to train on", "tokens a chat", "what trains", "experts", "2,457,600", "before -> after"):
        assert text in plain.said
    assert "Traceback" not in plain.said


def test_scores_are_there_item_by_item(plain):
    items = json.loads((plain.out / "namex/scores.json").read_text())
    scores = plain.report["training"]["scores"]
    for when in ("before", "after"):
        mean = torch.tensor(items[when]["chats"][0], dtype=torch.float64).mean()
        assert scores[when]["chats"] == pytest.approx(float(mean.exp()))
    assert scores["before"] != scores["after"]


def test_a_complete_folder_is_left_alone(plain, run):
    found = {path: path.stat().st_mtime_ns for path in plain.out.rglob("*")}
    again = run(plain.out)
    assert again.code == 0
    assert "is complete" in again.said
    assert {path: path.stat().st_mtime_ns for path in plain.out.rglob("*")} == found


def test_another_run_is_refused_that_folder(plain, run):
    found = weights(plain.out)
    other = run(plain.out, learning_rate=2e-3)
    assert other.code == 2
    assert "another training" in other.said
    assert weights(plain.out) == found


@pytest.mark.parametrize("moment", ["in a step", "while a checkpoint is written"])
def test_killed_and_continued(plain, start, run, tmp_path, moment):
    """By SIGKILL in the fourth of five steps: losses, experts and all other weights of an undisturbed run."""
    out = tmp_path / "out"
    process = start(out, die_after=3)
    process.join()
    assert process.exitcode == -9
    assert not (out / "config.json").exists()
    if moment == "while a checkpoint is written":
        last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        half = out / f"checkpoint-{int(last.name.split('-')[1]) + 2}"
        shutil.copytree(last, half)
        (half / "trainer_state.json").write_text('{"epoch": 1.')
        (half / "optimizer.pt").unlink()
    ended = run(out)
    assert ended.code == 0, ended.said
    assert "going on from checkpoint-" in ended.said
    assert ended.losses == plain.losses
    assert weights(out) == weights(plain.out)
    assert ended.report["training"]["tokens"] == plain.report["training"]["tokens"] > 0


def test_a_source_that_changed_in_place(run, tmp_path):
    """Touched: complete. Other bytes, of weights or of the chat template: refused, and tuned anew with --overwrite."""
    source = Path(shutil.copytree(PACKAGED / "tiny", tmp_path / "source"))
    template = tmp_path / "template.jinja"
    template.write_text((source / "chat_template.jinja").read_text())
    short = {"model_name_or_path": str(source), "max_steps": 1, "scores": ["none"]}
    short["chat_template_path"] = str(template)
    first = run(tmp_path / "out", **short)
    assert first.code == 0, first.said
    before = weights(first.out)
    assert all(len(found["xxh3_128"]) == 32 for found in first.report["run"]["files"].values())
    for path in (*source.iterdir(), template):
        path.touch()
    assert "is complete" in run(tmp_path / "out", **short).said
    for path, what in (
        (source / "chat_template.jinja", "source"),
        (template, "training (chat_template_path)"),
        (source / "model.safetensors", "source"),
    ):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"?" if path.suffix == ".safetensors" else data + b"{# #}")
        refused = run(tmp_path / "out", **short)
        assert refused.code == 2
        assert f"belongs to a run with another {what}; use --overwrite" in refused.said
        if path.suffix != ".safetensors":
            path.write_bytes(data)
    anew = run(tmp_path / "out", "--overwrite", **short)
    assert anew.code == 0, anew.said
    assert "is complete" not in anew.said
    assert weights(anew.out) != before


def test_a_damaged_folder_is_saved_again_from_the_last_checkpoint(plain, run, tmp_path):
    out = Path(shutil.copytree(plain.out, tmp_path / "out"))
    before = weights(out)
    (out / "model.safetensors").unlink()
    (out / "namex/recipe.yaml").write_text("")
    again = run(out)
    assert again.code == 0, again.said
    assert "going on from checkpoint-4" in again.said  # from the last one transformers would take a step more
    assert weights(out) == before
    assert (out / "namex/recipe.yaml").read_text() == (plain.out / "namex/recipe.yaml").read_text()
    assert again.losses == plain.losses


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "namex_seal.json"])
def test_a_damaged_checkpoint_is_passed_over(plain, tmp_path, name):
    for damage in (b"", b"garbage", None):
        folder = Path(shutil.copytree(plain.out, tmp_path / repr(damage)))
        assert last_checkpoint(folder) == str(folder / "checkpoint-4")
        data = bytearray((folder / "checkpoint-4" / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "checkpoint-4" / name).write_bytes(bytes(data) if damage is None else damage)
        assert last_checkpoint(folder) == str(folder / "checkpoint-2")


def test_a_folder_of_another_name_is_no_checkpoint(plain, tmp_path):
    folder = Path(shutil.copytree(plain.out, tmp_path / "out"))
    (folder / "checkpoint-old").mkdir()
    (folder / "checkpoint-4").rename(folder / "checkpoint-4-of-before")
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")


def test_a_trained_folder_is_drawn(plain, tmp_path):
    page = write_pictures(plain.out, tmp_path / "pictures", tokens=0).read_text()
    assert "The training run" in page
    assert "<dt>time</dt>" in page
    assert "<dt>bytes</dt>" not in page


def test_soft_with_a_trainable_curvature_from_a_patched_folder(run, tmp_path):
    patched = tmp_path / "patched"
    patch_checkpoint("tiny", patched, Recipe(merge="soft", curvature="kronecker"))
    kinds = ["curvature", "base"]
    ended = run(tmp_path / "out", model_name_or_path=str(patched), train_kinds=kinds, max_steps=2)
    assert ended.code == 0, ended.said
    before, after = load_patched(patched).state_dict(), load_patched(ended.out).state_dict()
    moved = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert moved
    assert all(".curvature." in name or ".base_expert." in name for name in moved)
    assert set(ended.report["training"]["trainable"]) == set(kinds)


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "namex_deepseek"),
        ({"merge": "soft", "routing": "cosine", "method": "ep-camex"}, "namex_deepseek"),
        ({"merge": "grouped", "experts": 12}, "deepseek"),
    ],
    ids=["residual", "soft", "grouped"],
)
def test_deepseek_by_other_recipes(run, tmp_path, fields, model_type):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Recipe(**fields).to_yaml())
    ended = run(tmp_path / "out", model_name_or_path="tiny-deepseek", recipe=str(recipe), max_steps=2)
    assert ended.code == 0, ended.said
    model = load_patched(ended.out)
    assert model.config.model_type == model_type
    assert model.config.namex["merge"] == fields.get("merge", "residual")
    bargains = model_type.startswith("namex")
    assert ("bargain/drift" in ended.losses[1]) == bargains
    assert ("no bargain in training" in ended.said) != bargains
    assert {layer["layer"] for layer in ended.report["layers"]} == ({1, 2, 3, 4} if bargains else set())


def test_lora_on_experts_router_and_base(run, tmp_path):
    """The folder is the merged model; the adapter on a freshly patched one gives the same."""
    kinds = ["experts", "router", "base", "attention"]
    ended = run(tmp_path / "out", "--use_peft", train_kinds=kinds, lora_r=2, max_steps=3)
    assert ended.code == 0, ended.said
    fresh = patch_model(AutoModelForCausalLM.from_pretrained(PACKAGED / "tiny", dtype=torch.float32), Recipe())
    adapted = PeftModel.from_pretrained(fresh, ended.out / "adapter").eval()
    merged = load_patched(ended.out)
    with torch.no_grad():
        wanted, found = adapted(ids()).logits, merged(ids()).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    plainly = load_patched(ended.out)
    for layer in rebargain(plainly, Recipe())[1:]:
        assert layer.drift < 1e-5  # the walk has seen what the adapter adds to the experts


def test_an_adapter_on_experts_alone_carries_the_base_and_does_not_train_it(run, tmp_path):
    ended = run(tmp_path / "out", "--use_peft", train_kinds=["experts"], lora_r=2, max_steps=1)
    assert ended.code == 0, ended.said
    assert set(ended.report["training"]["trainable"]) == {"experts"}
    assert any(".base_expert." in name for name in load_file(ended.out / "adapter" / "adapter_model.safetensors"))


def test_lora_killed_and_continued(start, run, tmp_path):
    flags, changes = ("--use_peft",), {"train_kinds": ["experts"], "lora_r": 2, "max_steps": 4}
    whole = run(tmp_path / "whole", *flags, **changes)
    out = tmp_path / "out"
    process = start(out, *flags, die_after=3, **changes)
    process.join()
    assert process.exitcode == -9
    ended = run(out, *flags, **changes)
    assert ended.losses == whole.losses
    assert weights(out) == weights(whole.out)


def test_without_a_bargain_bases_are_as_trained(run, tmp_path):
    ended = run(tmp_path / "out", bargain_every=0, max_steps=2)
    assert ended.code == 0, ended.said
    model = load_patched(ended.out)
    assert all(layer["drift"] is None for layer in ended.report["layers"])
    assert any(layer.drift > 1e-3 for layer in rebargain(model, Recipe())[1:])
    assert not any("bargain/drift" in entry for entry in ended.losses)


def test_compared_runs_have_equal_data_and_a_verdict(run, tmp_path):
    ended = run(tmp_path / "out", compare=["original", "ep-camex"], max_steps=2)
    assert ended.code == 0, ended.said
    for name, model_type in (("original", "qwen2_moe"), ("ep-camex", "namex_qwen2_moe")):
        folder = ended.out / "compare" / name
        assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
        report = json.loads((folder / "namex/report.json").read_text())
        assert report["run"]["data"] == ended.report["run"]["data"]
        assert report["training"]["steps"] == 2
        AutoModelForCausalLM.from_pretrained(folder)
    assert "namex-full and original" in ended.said or "Against original" in ended.said
    assert "namex-full and ep-camex" in ended.said or "Against ep-camex" in ended.said


REFUSED = {
    "a kind that there is none of": ({"train_kinds": ["curvature"]}, "'curvature' is to be trained"),
    "an unknown kind": ({"train_kinds": ["expert"]}, "'expert' cannot be trained"),
    "a kind without an adapter": ({"train_kinds": ["norms"], "use_peft": True}, "accepted under --use_peft"),
    "dropout on experts": ({"use_peft": True, "lora_dropout": 0.1}, "lora_dropout is 0.1"),
    "a negative number": ({"bargain_every": -1}, "numbers from 0"),
    "nothing to score on": ({"held_out": 0}, "--held_out from 2"),
    "no model": ({"model_name_or_path": None}, "--model is needed"),
    "an unknown comparison": ({"compare": ["smear"]}, "--compare smear"),
    "a comparison with itself": ({"compare": ["original"], "recipe": "RECIPE"}, "the recipe's method is smoe itself"),
    "an unknown score": ({"scores": ["mmlu"]}, "--scores mmlu"),
    "too long a sequence": ({"max_length": 4096}, "attends to 1024 tokens"),
    "no such model": ({"model_name_or_path": "tinny"}, "packaged model"),
    "no such data": ({"dataset_name": "nothing.csv"}, "nothing.csv"),
    "a push": ({"push_to_hub": True}, "--push_to_hub"),
    "remote code": ({"trust_remote_code": True}, "--trust_remote_code"),
    "an unknown argument": ({"learning_rat": 1}, "learning_rat"),
    "a tracker without its library": ({"report_to": "wandb"}, "--report_to wandb: WandbCallback requires wandb"),
    "an optimiser without its library": ({"optim": "adamw_8bit"}, "--optim adamw_8bit: You need to install `bitsand"),
    "kernels without their library": ({"use_liger_kernel": True}, "--use_liger_kernel needs the library liger-kernel"),
    "a sharding without its library": ({"deepspeed": "ds.json"}, "deepspeed"),
    "attention without its library": ({"attn_implementation": "flash_attention_2"}, "--attn_implementation flash_atte"),
    "an unknown dtype": ({"dtype": "float8"}, "float8"),
}


@pytest.mark.parametrize(("changes", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_and_without_a_trace(run, tmp_path, changes, text):
    if "recipe" in changes:
        (tmp_path / "smoe.yaml").write_text("method: smoe")
        changes = {**changes, "recipe": str(tmp_path / "smoe.yaml")}
    ended = run(tmp_path / "out", **changes)
    assert ended.code == 2, ended.said
    last = ended.said.strip().splitlines()[-1]
    assert last.startswith("sft_smoltalk.py: error: ")
    assert text in last
    assert "Traceback" not in ended.said
    assert not ended.out.exists()


def test_a_malformed_line_is_named(run, tmp_path):
    data = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    data.write_text("\n".join([good] * 20 + ['{"messages": [{"role": "user"'] + [good] * 5))
    ended = run(tmp_path / "out", dataset_name=str(data))
    assert ended.code == 2
    assert f"{data} line 21 is no JSON" in ended.said
    assert not ended.out.exists()


def test_a_model_without_a_chat_template(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(PACKAGED / "tiny", model)
    (model / "chat_template.jinja").unlink()
    ended = run(tmp_path / "out", model_name_or_path=str(model))
    assert ended.code == 2
    assert "has no chat template" in ended.said
    template = PACKAGED / "tiny" / "chat_template.jinja"
    given = run(tmp_path / "given", model_name_or_path=str(model), chat_template_path=str(template), max_steps=1)
    assert given.code == 0, given.said
    assert AutoTokenizer.from_pretrained(given.out).chat_template == template.read_text()


def test_a_folder_is_needed(call, tmp_path):
    code, said = call([], tmp_path / "log")
    assert code == 2
    assert said.strip().splitlines()[-1] == "sft_smoltalk.py: error: --out is needed: the folder of the result"


def test_help_teaches(call, tmp_path):
    code, said = call(["--help"], tmp_path / "log")
    assert code == 0
    for text in ("continued by the", "--bargain_every", "--train_kinds", "--learning_rate", "docs/training.md"):
        assert text in said
