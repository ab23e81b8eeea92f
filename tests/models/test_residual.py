"""``merge: residual`` in both families: against a loop over tokens, against the stock model, and in daily use."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from namex_hf.errors import CheckpointError
from namex_hf.models import PATCHED, left_over_mass, load_patched

FAMILIES = ["qwen2_moe", "deepseek"]
pytestmark = pytest.mark.parametrize("family", FAMILIES)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def realigned(model):
    """Copies of the mapped tensors: kernels round by their alignment, which the length of a file's header decides."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def load(folder, **kwargs):
    return realigned(load_patched(folder, **({"dtype": torch.float32} | kwargs)))


def load_stock(folder, **kwargs):
    return realigned(AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | kwargs)))


def zero_bases(model) -> None:
    bases = [m.base_expert for m in model.modules() if hasattr(m, "base_expert")]
    assert bases
    for parameter in (p for base in bases for p in base.parameters()):
        torch.nn.init.zeros_(parameter)


def swiglu(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (tensors[f"{name}.{p}_proj.weight"].double() for p in ("gate", "up", "down"))
    inner = gate @ x
    return down @ (inner * inner.sigmoid() * (up @ x))


def block_by_hand(family: str, tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor, top_k: int):
    """The sum over top-k and the base for one token, from the tensors as stored; ``[hidden] -> [hidden]``."""
    p = (tensors[f"{name}.gate.weight"].double() @ x).softmax(-1)
    chosen = sorted(range(len(p)), key=lambda i: -float(p[i]))[:top_k]
    y = sum(p[i] * swiglu(tensors, f"{name}.experts.{i}", x) for i in chosen)
    y = y + (1 - sum(p[i] for i in chosen)) * swiglu(tensors, f"{name}.base_expert", x)
    if family == "deepseek":
        return y + swiglu(tensors, f"{name}.shared_experts", x)
    gate = (tensors[f"{name}.shared_expert_gate.weight"].double() @ x).sigmoid()
    return y + gate * swiglu(tensors, f"{name}.shared_expert", x)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_block_equals_a_loop_over_tokens(patched_folder, family, experts):
    folder = patched_folder(family)
    tensors, model = load_file(folder / "model.safetensors"), load(folder, experts_implementation=experts)
    assert model.config._experts_implementation == experts
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    checked = 0
    for layer, decoder in enumerate(model.model.layers):
        if not hasattr(decoder.mlp, "base_expert"):
            continue
        name = f"model.layers.{layer}.mlp"
        expected = torch.stack([block_by_hand(family, tensors, name, t, 3) for t in x.double().view(-1, 32)])
        assert (decoder.mlp(x).view(-1, 32) - expected).abs().max() < 1e-5
        checked += 1
    assert checked == (3 if family == "qwen2_moe" else 2)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_zero_base_is_the_original_bit_for_bit(hub_folder, patched_folder, tokens, family, experts):
    original = load_stock(hub_folder(family), experts_implementation=experts)
    model = load(patched_folder(family), experts_implementation=experts)
    expected = original(tokens).logits
    assert (model(tokens).logits - expected).abs().max() > 0.01  # the base takes part
    zero_bases(model)
    assert torch.equal(model(tokens).logits, expected)
    same = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, **GREEDY}
    assert torch.equal(model.generate(tokens, **same), original.generate(tokens, **same))


def test_left_over_mass(family):
    scores = torch.tensor([[0.5, 0.25], [0.5, 0.5], [0.50390625, 0.5], [0.5, 0.498046875]])
    # never negative, where rounding brings the sum above 1; summed in float32, where bfloat16 would round it to 1
    expected = torch.tensor([[0.25], [0.0], [0.0], [0.001953125]])
    for dtype in (torch.float32, torch.bfloat16):
        mass = left_over_mass(scores.to(dtype))
        assert mass.dtype == dtype
        assert torch.equal(mass.float(), expected)


def test_bfloat16(patched_folder, tokens, family):
    expected = load(patched_folder(family))(tokens).logits
    half = load(patched_folder(family), dtype="auto")
    assert half.dtype == torch.bfloat16
    difference = half(tokens).logits.float() - expected
    assert difference.norm() < 0.05 * expected.norm()


def test_causal(patched_folder, tokens, family):
    model = load(patched_folder(family))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % 61
    before, after = model(tokens).logits, model(changed).logits
    assert (before[:, :6] - after[:, :6]).abs().max() < 1e-5
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 0.1


def test_cached_generation_equals_uncached(patched_folder, tokens, family):
    model = load(patched_folder(family))
    mask = torch.ones_like(tokens)
    cached = model.generate(tokens, attention_mask=mask, max_new_tokens=8, **GREEDY)
    uncached = model.generate(tokens, attention_mask=mask, max_new_tokens=8, use_cache=False, **GREEDY)
    assert cached.shape == (2, 19)
    assert torch.equal(cached, uncached)


def test_left_padding_changes_nothing(patched_folder, tokens, family):
    model = load(patched_folder(family))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], 1)
    mask = (torch.arange(15) >= 4).long().expand(2, 15)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert (logits[:, 4:] - model(tokens).logits).abs().max() < 1e-5
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=5, **GREEDY)
    alone = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, **GREEDY)
    assert torch.equal(generated[:, 4:], alone)


def test_packed_documents_stay_apart(patched_folder, tokens, family):
    model = load(patched_folder(family))
    positions = torch.arange(11).repeat(2)[None]
    packed = model(tokens.reshape(1, -1), position_ids=positions, use_cache=False).logits
    assert (packed.view(2, 11, -1) - model(tokens).logits).abs().max() < 1e-5


def test_round_trip_keeps_the_names(patched_folder, tokens, tmp_path, family):
    folder = patched_folder(family)
    model = load(folder)
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert "model.layers.1.mlp.base_expert.gate_proj.weight" in after
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["namex"] == {"merge": "residual"}
    # transformers' own save leaves the same remote code as the list that the patcher follows
    assert {p.name for p in tmp_path.glob("*.py")} == {p.name for p in folder.glob("*.py")}
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert torch.equal(load(tmp_path)(tokens).logits, model(tokens).logits)


def test_converts_a_stock_checkpoint_directly(hub_folder, tokens, family):
    folder = hub_folder(family)
    fields = json.loads((folder / "config.json").read_text())
    config = PATCHED[family](**{k: v for k, v in fields.items() if k not in ("model_type", "auto_map")})
    model = load_stock(folder, config=config)
    new = {name: p for name, p in model.named_parameters() if ".base_expert." in name}
    assert new
    for name, parameter in new.items():
        assert torch.isfinite(parameter).all(), name
        assert 0.01 < parameter.std() < 0.04, name  # initializer_range is 0.02: not left as uninitialised memory
    zero_bases(model)
    assert torch.equal(model(tokens).logits, load_stock(folder)(tokens).logits)


def test_tied_embeddings(patched_folder, tokens, tmp_path, family):
    fields = json.loads((patched_folder(family) / "config.json").read_text()) | {"tie_word_embeddings": True}
    fields.pop("model_type")
    model = realigned(AutoModelForCausalLM.from_config(PATCHED[family](**fields), dtype=torch.float32))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_gradients_reach_every_part(patched_folder, tokens, family):
    model = load(patched_folder(family)).train()
    model(tokens, labels=tokens).loss.backward()
    names = [name for name, _ in model.named_parameters()]
    for part in (".base_expert.", ".mlp.experts.", ".mlp.gate.weight", ".shared_expert"):
        assert any(part in name for name in names), part
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients(patched_folder, tokens, family):
    gradients = []
    for checkpointing in (False, True):
        model = load(patched_folder(family)).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert model.is_activation_checkpointing
        model(tokens, labels=tokens, output_router_logits=True, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_auxiliary_loss_is_the_familys_own(hub_folder, patched_folder, tokens, family):
    original = load_stock(hub_folder(family))
    model = load(patched_folder(family))
    zero_bases(model)
    expected, actual = (m(tokens, labels=tokens, output_router_logits=True) for m in (original, model))
    assert len(actual.router_logits) == (3 if family == "qwen2_moe" else 2)
    assert all(torch.equal(a, b) for a, b in zip(actual.router_logits, expected.router_logits, strict=True))
    assert actual.aux_loss > 0.5
    assert torch.equal(actual.aux_loss, expected.aux_loss)
    assert torch.equal(actual.loss, expected.loss)
    coefficient = model.config.router_aux_loss_coef
    plain = model(tokens, labels=tokens).loss
    assert (actual.loss - plain).item() == pytest.approx(coefficient * actual.aux_loss.item(), rel=1e-3)


def test_hidden_states_and_attentions_are_recorded(patched_folder, tokens, family):
    model = load(patched_folder(family), attn_implementation="eager")
    output = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 11, 11)] * 3


def test_pipeline(patched_folder, tmp_path, family):
    model = load(patched_folder(family))
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generate.model) is type(model)
    [output] = generate("w5 w9 w7", max_new_tokens=6, do_sample=False, return_tensors=True)
    ids = tokenizer("w5 w9 w7", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert output["generated_token_ids"] == expected[0].tolist()
    assert expected.shape[1] > 3


def test_renormalised_top_k_is_refused(patched_folder, family):
    with pytest.raises(ValueError, match=r"norm_topk_prob.*leave no mass"):
        PATCHED[family](norm_topk_prob=True, namex={"merge": "residual"})
    with pytest.raises(ValueError, match="norm_topk_prob"):
        AutoModelForCausalLM.from_pretrained(patched_folder(family), norm_topk_prob=True)
    assert AutoConfig.from_pretrained(patched_folder(family)).norm_topk_prob is False


def test_another_merge_is_refused(family):
    accepted = "'residual', 'soft', 'grouped', 'narrow'"
    with pytest.raises(ValueError, match=rf"namex\.merge is 'sparse'; accepted: {accepted}"):
        PATCHED[family](namex={"merge": "sparse"})


def test_load_patched_refuses(hub_folder, patched_folder, tmp_path, family):
    with pytest.raises(CheckpointError, match=rf"no recipe under 'namex'.*'{family}'"):
        load_patched(hub_folder(family))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_patched(tmp_path)
    tensors = load_file(patched_folder(family) / "model.safetensors")
    lost = "model.layers.2.mlp.base_expert.up_proj.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((patched_folder(family) / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=lost):
        load_patched(tmp_path)
    model, info = load_patched(patched_folder(family), output_loading_info=True)
    assert not info["unexpected_keys"]
    assert model.config.namex == {"merge": "residual"}


def test_cached_passes_with_router_logits(patched_folder, tokens, family):
    """``output_router_logits: true`` asks for a loss in training; transformers' Qwen2-MoE fails at it under a cache."""
    model = load(patched_folder(family))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], 1)
    mask = (torch.arange(15) >= 4).long().expand(2, 15)
    for beams in (1, 2):
        how = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": beams, **GREEDY}
        model.config.output_router_logits = False
        expected = model.generate(padded, **how)
        model.config.output_router_logits = True
        assert torch.equal(model.generate(padded, **how), expected)
    loss = model(padded, attention_mask=mask, labels=padded)
    assert loss.aux_loss > 0
    assert loss.loss > model(padded, attention_mask=mask, labels=padded, output_router_logits=False).loss
