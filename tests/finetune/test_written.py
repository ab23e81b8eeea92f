"""What a run of training writes: generation settings as they came, tokens that count, and the checkpoint that it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from namex_hf import load_patched
from namex_hf.checkpoint.resolve import PACKAGED

ODD = b'{ "do_sample": false,\n "temperature": 0.6, "eos_token_id": 0 }'
"""What transformers reads and does not write."""
FILLER = "The quick brown fox jumps over the lazy dog. " * 30


def chats(path: Path) -> tuple[str, int]:
    """A file of chats, a sixth of which have no answer within 128 tokens; and how many there are."""
    rows = [(f"Question {n}" if n % 6 else FILLER, f"Answer {n} " * (n % 5 + 1)) for n in range(40)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return str(path), len(rows)


@pytest.fixture(scope="module")
def epoch(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One pass over all chats, into a folder whose name is markup for rich, from a model with odd settings, whose
    tokenizer has code that it does not need."""
    folder = tmp_path_factory.mktemp("epoch")
    model = folder / "model"
    shutil.copytree(PACKAGED / "tiny", model)
    (model / "generation_config.json").write_bytes(ODD)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_x.Tok"]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "tokenization_x.py").write_text("raise SystemExit")
    data, _ = chats(folder / "own.jsonl")
    (folder / "a [v1] b[").mkdir()
    out = folder / "a [v1] b[" / "c]"
    ended = run(out, model_name_or_path=str(model), dataset_name=data, max_steps=-1, num_train_epochs=1, save_steps=1)
    assert ended.code == 0, ended.said
    return ended


def test_generation_settings_are_the_sources(epoch: Any):
    written = sorted(epoch.out.rglob("generation_config.json"))
    assert {path.parent.name for path in written} >= {"c]", "checkpoint-1"}
    assert {path.read_bytes() for path in written} == {ODD}
    assert load_patched(epoch.out).generation_config.temperature == 0.6


def test_a_tokenizer_that_opened_without_its_code_needs_none(epoch: Any):
    assert "auto_map" not in json.loads((epoch.out / "tokenizer_config.json").read_text())
    assert not (epoch.out / "tokenization_x.py").exists()


def test_brackets_in_the_folders_name_are_printed(epoch: Any):
    said = " ".join(epoch.said.split())
    assert f"namex-full: {epoch.out}" in said
    assert f"the model: {epoch.out}" in said


def test_tokens_that_count_are_those_of_answers(epoch: Any):
    """One epoch: every answer's tokens once, without those that are cut away."""
    tokenizer = AutoTokenizer.from_pretrained(epoch.out)
    lines = [json.loads(line) for line in (epoch.out.parents[1] / "own.jsonl").read_text().splitlines()]
    masks = [
        tokenizer.apply_chat_template(line["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for line in lines
    ]
    counts = [sum(mask["assistant_masks"][:128]) for mask in masks]
    held_out = {
        tokenizer.decode(tokenizer.apply_chat_template(line["messages"])["input_ids"]) for line in lines
    }  # by chance 4 of 40
    assert len(held_out) == 40
    assert "no token of an answer is left" in epoch.said
    training = epoch.report["training"]
    assert training["steps"] > 1
    assert 0 < training["tokens"] < sum(counts)
    assert training["tokens"] == sum(counts) - held_out_tokens(epoch, lines, counts)


def held_out_tokens(epoch: Any, lines: list[Any], counts: list[int]) -> int:
    """Of the chats that are not trained on."""
    from namex_hf.training.chats import load_chats

    loaded = load_chats(str(epoch.out.parents[1] / "own.jsonl"), None, ("train", "test"), 8, 42)
    back = [row["messages"] for row in loaded.held_out]
    return sum(count for line, count in zip(lines, counts, strict=True) if line["messages"] in back)


def test_processes_that_read_change_nothing(epoch: Any, run: Any, tmp_path: Path):
    data = str(epoch.out.parents[1] / "own.jsonl")
    model = str(epoch.out.parents[1] / "model")
    again = run(
        tmp_path / "out",
        model_name_or_path=model,
        dataset_name=data,
        max_steps=-1,
        num_train_epochs=1,
        save_steps=1,
        dataset_num_proc=2,
    )
    assert again.code == 0, again.said
    assert again.losses == epoch.losses
    assert again.report["run"] == epoch.report["run"]
    assert (again.out / "model.safetensors").read_bytes() == (epoch.out / "model.safetensors").read_bytes()


def test_the_best_checkpoint_is_what_everything_tells_of(run: Any, tmp_path: Path):
    """Best is here what has the largest loss, which steps that are too large have in the middle."""
    changes = {"max_steps": 3, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 1, "bargain_every": 1}
    changes |= {"load_best_model_at_end": True, "greater_is_better": True}
    ended = run(tmp_path / "out", save_steps=1, **changes)
    assert ended.code == 0, ended.said
    training = ended.report["training"]
    states = [json.loads((ended.out / f"checkpoint-{n}" / "trainer_state.json").read_text()) for n in (1, 2, 3)]
    losses = {one["step"]: one["eval_loss"] for one in states[2]["log_history"] if "eval_loss" in one}
    step = max(losses, key=lambda one: losses[one])
    assert step < 3
    assert training["steps"] == step
    assert training["best_of"] == {"steps": 3, "metric": "loss", "value": pytest.approx(losses[step])}
    assert [entry["step"] for entry in training["loss"]] == list(range(1, step + 1))
    counts = [one["stateful_callbacks"]["LabelTokens"]["attributes"]["count"] for one in states]
    assert counts[0] < counts[1] < counts[2]
    assert training["tokens"] == counts[step - 1]
    found = load_patched(ended.out).state_dict()
    best = load_file(ended.out / f"checkpoint-{step}" / "model.safetensors")
    for name in ("model.layers.2.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(found[name], best[name])
    assert "are those of the best checkpoint of 3 steps, by loss" in (ended.out / "README.md").read_text()
    assert f"the best of 3 steps by loss: step {step}" in ended.said
    other = run(ended.out, save_steps=3, **changes)
    assert other.code == 2
    assert "another training" in other.said
