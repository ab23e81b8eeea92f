"""Reward models: transformers' sequence classifier on a patched folder."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from namex_hf.models import CLASSIFIERS

PAD = 0


@pytest.fixture(params=["deepseek", "namex_deepseek", "namex_qwen2_moe", "soft"])
def folder(request, hub_folder, patched_folder, namex_model, tmp_path):
    if request.param == "deepseek":
        return hub_folder("deepseek")
    if request.param == "soft":
        namex_model("qwen2_moe", merge="soft", segment=4).save_pretrained(tmp_path / "soft")
        return tmp_path / "soft"
    return patched_folder(request.param.removeprefix("namex_"))


def test_a_reward_is_the_head_on_the_last_token(folder, tokens, tmp_path):
    kwargs = {"num_labels": 1, "pad_token_id": PAD, "dtype": torch.float32}
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert type(model) is CLASSIFIERS[model.config.model_type]
    assert info["missing_keys"] == {"score.weight"}
    assert info["unexpected_keys"] <= {"lm_head.weight"}
    model.eval()
    padded = torch.cat([tokens, torch.full((2, 4), PAD)], 1)
    mask = (padded != PAD).long()
    with torch.no_grad():
        reward = model(padded, attention_mask=mask).logits
        hidden = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(tokens).last_hidden_state
        assert (reward - hidden[:, -1] @ model.score.weight.T).abs().max() < 1e-5
    assert reward.shape == (2, 1)
    model.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    with torch.no_grad():
        assert torch.equal(again(padded, attention_mask=mask).logits, reward)
    assert "AutoModelForSequenceClassification" in again.config.auto_map
    body = load_file(tmp_path / "reward" / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    assert {name for name in body if name.startswith("model.")} == {n for n in stored if n.startswith("model.")}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_a_reward_trains_every_expert_it_uses(patched_folder, tokens, family):
    model = AutoModelForSequenceClassification.from_pretrained(
        patched_folder(family), num_labels=2, pad_token_id=PAD, dtype=torch.float32
    ).train()
    model(tokens, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_it_stays_a_language_model(patched_folder, tokens):
    """The head of a folder is not lost by what else it can be opened as."""
    model = AutoModelForCausalLM.from_pretrained(patched_folder("qwen2_moe"))
    assert model(tokens).logits.shape == (2, 11, 61)
