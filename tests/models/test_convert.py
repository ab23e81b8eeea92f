"""A live stock model turned into its patched class equals the patched folder."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from namex_hf.models import CLASSES, PATCHED, load_patched
from namex_hf.models.convert import patch_classes

PATCHED_PARTS = {family: CLASSES[config.model_type][1:] for family, config in PATCHED.items()}


def live(hub_folder, patched_folder, family):
    """The stock model, converted and given the base experts of the patched folder."""
    model = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32).eval()
    for part in PATCHED_PARTS[family]:
        _CAN_RECORD_REGISTRY.pop(str(part), None)  # as in a process that has built no such model
    patch_classes(model)
    stored = load_file(patched_folder(family) / "model.safetensors")
    bases = {name: tensor for name, tensor in stored.items() if ".base_expert." in name}
    assert not model.load_state_dict(bases, strict=False).unexpected_keys
    return model


@pytest.mark.parametrize("family", PATCHED)
def test_equals_the_patched_folder(hub_folder, patched_folder, tokens, tmp_path, family):
    model = live(hub_folder, patched_folder, family)
    alone = model(tokens, output_router_logits=True).router_logits
    expected = load_patched(patched_folder(family), dtype=torch.float32).eval()
    assert type(model) is type(expected)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    for one in (model, expected):  # kernels round by alignment, and the two files map their tensors differently
        for parameter in one.parameters():
            parameter.data = parameter.data.clone()
    outputs = [
        m(tokens, labels=tokens, output_router_logits=True, output_hidden_states=True) for m in (model, expected)
    ]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert len(alone) == len(outputs[0].router_logits) == len(outputs[1].router_logits) > 0
    assert len(outputs[0].hidden_states) == 4
    model.config.namex = {"merge": "residual"}
    model.save_pretrained(tmp_path)
    stored, again = load_file(patched_folder(family) / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    assert type(load_patched(tmp_path)) is type(model)


@pytest.mark.parametrize("family", PATCHED)
def test_refuses_what_has_no_patched_form(hub_folder, family):
    config = AutoConfig.from_pretrained(hub_folder(family), norm_topk_prob=True)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="norm_topk_prob"):
        patch_classes(model)
    assert not any("base_expert" in name for name, _ in model.named_parameters())
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        patch_classes(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)))
