"""What programs other than transformers 5 look for in a result: a head of its own, both forms of the rotary embedding,
and no gate of zeros."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.patching.plan import make_plan
from namex_hf.training.start import start_from
from tests.helpers.checkpoints import INDEX, aligned, differing, read_config, read_tensors, same_bits, write_folder
from tests.helpers.toy_models import VOCAB, odd_config, toy_tensors

TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
RECIPES: dict[str, dict[str, Any]] = {
    "residual": {},
    "token": {"merge": "soft"},
    "soft": {"merge": "soft", "segment": 3},
    "soft-on-text": {"merge": "soft", "segment": 3, "align": "activations", "calibration_tokens": 512},
    "smoe": {"method": "smoe"},
    "grouped": {"merge": "grouped", "experts": 3},
    "grouped-on-text": {"merge": "grouped", "experts": 3, "fit": "router", "fit_steps": 10, "calibration_tokens": 512},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return aligned(model).eval()(TOKENS).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def recipe_of(name: str, words: Path) -> Recipe:
    values = RECIPES[name]
    return Recipe(**values, calibration_data=str(words)) if "calibration_tokens" in values else Recipe(**values)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tied_source_gets_a_head(odd, tmp_path: Path, words: Path, family: str, recipe: str) -> None:
    """On disk and in memory alike, the same function, and counted before it is written."""
    source, chosen = odd(family, torch.bfloat16, tie_word_embeddings=True, tokenizer=True), recipe_of(recipe, words)
    plan = make_plan(resolve(source), chosen, "5GB")
    patch_checkpoint(source, tmp_path / "disk", chosen)
    tensors = read_tensors(tmp_path / "disk")
    assert same_bits(tensors[HEAD], tensors[EMBEDDING])
    assert same_bits(tensors[HEAD], read_tensors(source)[EMBEDDING])
    assert read_config(tmp_path / "disk")["tie_word_embeddings"] is False
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = json.loads((tmp_path / "disk" / INDEX).read_text())
    assert plan.bytes_out == size == index["metadata"]["total_size"]
    assert index["weight_map"].keys() == tensors.keys()

    live = patch_model(load(source), chosen, tokenizer=AutoTokenizer.from_pretrained(source))
    live.save_pretrained(tmp_path / "memory")
    stored = load(tmp_path / "disk")
    assert stored.lm_head.weight is not stored.model.embed_tokens.weight
    assert same_bits(logits(stored), logits(live))
    assert differing(tensors, read_tensors(tmp_path / "memory")) == []
    assert read_config(tmp_path / "memory")["tie_word_embeddings"] is False


def test_an_untied_source_is_not_given_another_head(odd, tmp_path: Path) -> None:
    source = odd("deepseek", torch.bfloat16)
    patch_checkpoint(source, tmp_path / "out")
    assert same_bits(read_tensors(tmp_path / "out")[HEAD], read_tensors(source)[HEAD])
    model = load(source)
    head = model.lm_head.weight
    assert patch_model(model).lm_head.weight is head


@pytest.mark.parametrize("held", [(HEAD,), (EMBEDDING, HEAD)])
def test_a_tied_source_with_a_head(tmp_path: Path, held: tuple[str, ...]) -> None:
    """The one tensor under the name of the head serves for both; two that differ are both used, as by transformers."""
    config = odd_config("qwen2_moe", torch.float32, tie_word_embeddings=True)
    tensors = toy_tensors({**config, "tie_word_embeddings": False}, torch.float32)
    source = write_folder(
        tmp_path / "model",
        config,
        {n: t for n, t in tensors.items() if n in held or "layers" in n or n == "model.norm.weight"},
    )
    patch_checkpoint(source, tmp_path / "out", Recipe(method="smoe"))
    written = read_tensors(tmp_path / "out")
    assert same_bits(written[HEAD], tensors[HEAD])
    assert same_bits(written[EMBEDDING], tensors[held[0]])
    assert same_bits(logits(load(tmp_path / "out")), logits(load(source)))


def test_training_of_an_older_tied_result_begins_with_two_tensors(odd, tmp_path: Path) -> None:
    """A folder that an earlier release patched, embeddings tied: they train apart, and the estimate counts both."""
    patch_checkpoint(odd("qwen2_moe", torch.float32), tmp_path / "out")
    config = read_config(tmp_path / "out") | {"tie_word_embeddings": True}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shard = tmp_path / "out" / index["weight_map"].pop(HEAD)
    save_file({n: t for n, t in load_file(shard).items() if n != HEAD}, shard, {"format": "pt"})
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    report = tmp_path / "out" / "namex/report.json"
    listed = json.loads(report.read_text())
    del listed["files"]  # which that release did not list
    report.write_text(json.dumps(listed))
    start = start_from(str(tmp_path / "out"))
    model, outline = start.model(None), start.outline()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    assert [name for name, _ in outline.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("recipe", ["residual", "grouped"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_both_forms_of_the_rotary_embedding(odd, tmp_path: Path, family: str, recipe: str) -> None:
    source = odd(family, torch.bfloat16, rope_theta=7e5)
    patch_checkpoint(source, tmp_path / "disk", Recipe(**RECIPES[recipe]))
    patch_model(load(source), Recipe(**RECIPES[recipe])).save_pretrained(tmp_path / "memory")
    for place in ("disk", "memory"):
        config = read_config(tmp_path / place)
        assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 7e5}
        assert (config["rope_theta"], config["rope_scaling"]) == (7e5, None)
    assert load(tmp_path / "disk").config.rope_parameters == load(source).config.rope_parameters


def test_a_scaled_rotary_embedding_in_memory(odd, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    source = odd("qwen2_moe", torch.float32, rope_scaling=scaling)
    live = patch_model(load(source), Recipe(**RECIPES["grouped"]))
    live.save_pretrained(tmp_path / "memory")
    config = read_config(tmp_path / "memory")
    assert (config["rope_theta"], config["rope_scaling"]) == (5000.0, scaling)
    assert same_bits(logits(load(tmp_path / "memory")), logits(live))


@pytest.mark.parametrize(("dtype", "written"), [(torch.float32, 1e-20), (torch.bfloat16, 1e-20), (torch.float16, 6e-8)])
def test_the_gate_in_the_form_of_qwen(odd, tmp_path: Path, dtype: torch.dtype, written: float) -> None:
    """llama.cpp takes sigmoid(x) as silu(x) / x: not zero, and for transformers one half to the last bit."""
    source = odd("deepseek", dtype)
    patch_checkpoint(source, tmp_path / "out", Recipe(**RECIPES["grouped"]), export_as="qwen2_moe")
    tensors = read_tensors(tmp_path / "out")
    gates = {name: tensor for name, tensor in tensors.items() if name.endswith("shared_expert_gate.weight")}
    assert len(gates) == 3
    for gate in gates.values():
        assert same_bits(gate, torch.full((1, 16), written, dtype=dtype))
        assert bool((gate > 0).all())
    values: list[torch.Tensor] = []
    model = load(tmp_path / "out")
    for layer in model.model.layers[1:]:
        layer.mlp.shared_expert_gate.register_forward_hook(lambda module, args, out: values.append(out.sigmoid()))
    with_gate = logits(model)
    assert len(values) == 3
    assert all(bool((value == 0.5).all()) for value in values)
    for layer in model.model.layers[1:]:
        torch.nn.init.zeros_(layer.mlp.shared_expert_gate.weight)
    assert same_bits(logits(model), with_gate)
