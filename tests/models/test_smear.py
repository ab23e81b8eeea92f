"""``merge: soft`` without a base expert (``method: smear``): against plain loops, causal, cached, converted."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from namex_hf.models import PATCHED, load_patched
from namex_hf.models.configuration_namex import METHODS, ROUTINGS
from namex_hf.models.convert import patch_classes
from namex_hf.models.soft import SoftRouting
from namex_hf.recipe import FIELDS

FAMILIES = ["qwen2_moe", "deepseek"]
pytestmark = pytest.mark.parametrize("family", FAMILIES)
SEGMENT, EXPERTS = 4, 8
SMEAR = {"merge": "soft", "method": "smear", "segment": SEGMENT}


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def smear(hub_folder):
    """``smear("qwen2_moe", top_k=2)``: the stock checkpoint under SMEAR, its patched class around its own tensors."""

    def make(family: str, dtype=torch.float32, **fields):
        config = json.loads((hub_folder(family) / "config.json").read_text())
        config = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
        patched = PATCHED[family](**config, namex=SMEAR | fields)
        model = AutoModelForCausalLM.from_pretrained(hub_folder(family), config=patched, dtype=dtype).eval()
        for parameter in model.parameters():  # kernels round by alignment, which the file's header decides
            parameter.data = parameter.data.clone()
        return model

    return make


def blocks(model) -> list[SoftRouting]:
    return [module for module in model.modules() if isinstance(module, SoftRouting)]


# --- the definition in loops, float64 ---------------------------------------------------------------------------------


def values(block, token: torch.Tensor, top_k: int) -> torch.Tensor:
    """The router's softmax over all experts, the `top_k` largest kept and rescaled to sum 1."""
    p = (block.gate.weight @ token).softmax(-1)
    p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0)
    return p / p.sum()


def sources(token: int, span: str, prompt: int) -> list[int]:
    if span == "prompt" and token >= prompt:
        return list(range(prompt))
    first = (token // SEGMENT - 1) * SEGMENT if span == "previous" else 0
    return list(range(max(first, 0), token // SEGMENT * SEGMENT))


def routed_by_hand(block, x: torch.Tensor, top_k: int, span: str, prompt: int) -> torch.Tensor:
    """One document, ``[tokens, hidden]``: sum_i s_i E_i of every token, expert by expert."""
    width, rows = block.experts.down_proj.shape[-1], []
    for token in range(len(x)):
        before = [values(block, x[i], top_k) for i in sources(token, span, prompt)]
        s = sum(before) / len(before) if before else torch.full((EXPERTS,), 1 / EXPERTS, dtype=x.dtype)
        gate_up = sum(s[i] * block.experts.gate_up_proj[i] for i in range(EXPERTS))
        down = sum(s[i] * block.experts.down_proj[i] for i in range(EXPERTS))
        gate, up = gate_up[:width] @ x[token], gate_up[width:] @ x[token]
        rows.append(down @ (gate * gate.sigmoid() * up))
    return torch.stack(rows)


@torch.no_grad()
def logits_by_hand(model, tokens: torch.Tensor, top_k: int, span: str, prompt: int = 10**9) -> torch.Tensor:
    """One document through the float64 `model`, whose routed parts are replaced by the loops above."""
    for block in blocks(model):
        block.routed = lambda flat, token_ids, segments, memory, block=block: routed_by_hand(
            block, flat, top_k, span, prompt
        )
    return model(tokens[None], use_cache=False).logits[0]


@pytest.mark.parametrize("span", ["all", "previous", "prompt"])
@pytest.mark.parametrize("top_k", [None, 3, 1])
def test_logits_equal_the_definition(smear, family, span, top_k):
    tokens = ids(2, 18)
    model = smear(family, top_k=top_k, routing_span=span)
    expected = [logits_by_hand(smear(family, torch.float64), row, top_k or EXPERTS, span) for row in tokens]
    assert (model(tokens).logits - torch.stack(expected)).abs().max() < 2e-5
    assert model(tokens).logits.grad_fn is not None
    with torch.no_grad():  # only the experts in use are read then
        assert (model(tokens).logits - torch.stack(expected)).abs().max() < 2e-5
    other = logits_by_hand(smear(family, torch.float64), tokens[0], 2, span)
    assert (other - expected[0]).abs().max() > 1e-2


@torch.no_grad()
def test_prompt_routes_once(smear, family):
    """After the first pass everything goes through one expert, made of the whole prompt."""
    tokens, model = ids(1, 17), smear(family, routing_span="prompt")
    cache = DynamicCache(config=model.config)
    parts = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 6), (6, 7), (7, 17))]
    expected = logits_by_hand(smear(family, torch.float64), tokens[0], EXPERTS, "prompt", prompt=6)
    assert (torch.cat(parts, 1)[0] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("top_k", [None, 1])
def test_all_experts_count_and_shares_sum_to_one(smear, family, top_k):
    model, seen = smear(family, top_k=top_k), []
    for block in blocks(model):
        assert block.gate.top_k == (top_k or EXPERTS)
        block.experts.register_forward_pre_hook(lambda _m, a: seen.append(a[1]))
    model(ids(2, 14))
    assert len(seen) == len(blocks(model)) > 0
    for shares in seen:
        assert torch.allclose(shares.sum(-1), torch.ones(len(shares)), atol=1e-6)
        assert torch.equal(shares[0], torch.full((EXPERTS,), 1 / EXPERTS))
    assert all((shares > 0).all() for shares in seen) == (top_k is None)


@pytest.mark.parametrize("span", ["all", "previous", "prompt"])
def test_future_tokens_leave_the_past_alone(smear, family, span):
    model, tokens = smear(family, routing_span=span), ids(2, 19)
    before = model(tokens).logits
    for place in range(19):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 7) % 58 + 3
        after = model(changed).logits
        if place:
            assert (before[:, :place] - after[:, :place]).abs().max() < 1e-6
        assert (before[:, place] - after[:, place]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("span", ["all", "previous"])
@pytest.mark.parametrize("sizes", [(1,) * 23, (6, 1, 1, 1, 9, 5), (4, 4, 4, 4, 4, 3)])
def test_cached_passes_equal_one(smear, family, span, sizes):
    """Across five boundaries, one by one and in leaps, at a boundary and between two."""
    model, tokens, start, parts = smear(family, routing_span=span, top_k=5), ids(2, 23), 0, []
    cache = DynamicCache(config=model.config)
    for size in sizes:
        parts.append(model(tokens[:, start : start + size], past_key_values=cache).logits)
        start += size
    assert start == 23
    assert (torch.cat(parts, 1) - model(tokens, use_cache=False).logits).abs().max() < 2e-5


@torch.no_grad()
def test_padding_and_packing_change_nothing(smear, family):
    model, rows = smear(family), [ids(1, n, seed=n)[0] for n in (14, 9, 3)]
    tokens, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for number, row in enumerate(rows):
        tokens[number, 17 - len(row) :], mask[number, 17 - len(row) :] = row, 1
    alone = [model(row[None]).logits[0] for row in rows]
    padded = model(tokens, attention_mask=mask).logits
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    assert (packed - torch.cat(alone)).abs().max() < 2e-5
    for number in range(3):
        assert (padded[number][mask[number] == 1] - alone[number]).abs().max() < 2e-5


def test_gradients_reach_every_part(smear, family):
    model, tokens = smear(family).train(), ids(2, 13)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_no_base_expert_is_built(smear, hub_folder, tmp_path, family):
    """Neither by the class nor by the conversion of a live model; the tensors are the original's alone."""
    model = smear(family, top_k=3)
    live = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32).eval()
    names = set(live.state_dict())
    patch_classes(live, SMEAR | {"top_k": 3})
    assert set(model.state_dict()) == set(live.state_dict()) == names
    assert [(n, type(m)) for n, m in live.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    for parameter in live.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(live(ids(2, 13)).logits, model(ids(2, 13)).logits)
    model.save_pretrained(tmp_path)
    again = load_patched(tmp_path, dtype=torch.float32).eval()
    assert (again(ids(2, 13)).logits - model(ids(2, 13)).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"merge": "residual"}, r"namex\.method is 'smear'.*accepted with it is namex\.merge: 'soft'"),
        ({"merge": "grouped"}, r"namex\.method is 'smear'.*namex\.merge 'grouped'"),
        ({"eta": 0.5}, r"namex\.eta is 0\.5; .*accepted: 1"),
        ({"top_k": 9}, r"namex\.top_k is 9; accepted: a whole number from 1 to 8"),
        ({"method": "smoe"}, r"namex\.method is 'smoe'.*namex\.merge 'soft'; accepted: 'residual'"),
        ({"method": "smera"}, r"namex\.method is 'smera'"),
    ],
    ids=str,
)
def test_inconsistent_configurations_are_refused(smear, hub_folder, family, fields, says):
    with pytest.raises(ValueError, match=says):
        smear(family, **fields)
    config = smear(family).config
    config.namex = SMEAR | fields  # after the configuration's own check
    with pytest.raises(ValueError, match=says):
        AutoModelForCausalLM.from_config(config)
    live = AutoModelForCausalLM.from_pretrained(hub_folder(family))
    with pytest.raises(ValueError, match=says):
        patch_classes(live, SMEAR | fields)


def test_the_classes_know_the_recipes_methods(family):
    assert FIELDS["method"].choices == METHODS
    assert FIELDS["routing"].choices == ROUTINGS
