"""``merge: soft``, ``routing_span: token``: every token's merged expert against matrices that a loop merges."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from namex_hf.models import soft, soft_kronecker, soft_token
from namex_hf.models.soft import SoftRouting
from namex_hf.training.fold import fold_curvature

FAMILIES = ["qwen2_moe", "deepseek"]
over_families = pytest.mark.parametrize("family", FAMILIES)
TOKEN = {"merge": "soft"}
ROUTINGS = [{}, {"routing": "cosine"}, {"routing": "stable"}]
FORMS = [
    {},
    {"eta": 0.6, "top_k": 5},
    {"eta": 1.7, "top_k": 1},
    {"renormalise": True, "eta": 0.7},
    {"top_k": 8},
    {"method": "smear"},
    {"method": "smear", "top_k": 2},
    {"method": "camex", "routing": "cosine"},
    {"routing": "stable"},
    {"curvature": "kronecker", "rank": 2, "eta": 0.9},
    {"curvature": "kronecker", "method": "smear"},
]


def names(fields: dict) -> str:
    return "-".join(map(str, fields.values())) or "plain"


def soft_blocks(model) -> list[SoftRouting]:
    return [module for module in model.modules() if isinstance(module, SoftRouting)]


def hidden(count: int, size: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def merged_by_hand(block, x, value, index, eta, has_base=True):
    """Eq. 9 with M_i = I: one set of three merged matrices a token, then the token through them."""
    experts = list(zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True))
    if has_base:
        expert = block.base_expert
        base = torch.cat([expert.gate_proj.weight, expert.up_proj.weight]), expert.down_proj.weight
    else:
        base = tuple(torch.zeros_like(matrix) for matrix in experts[0])
    rows = []
    for token, values, chosen in zip(x, value, index, strict=True):
        gate_up, down = base
        for share, i in zip(values, chosen, strict=True):
            gate_up = gate_up + eta * share * (experts[i][0] - base[0])
            down = down + eta * share * (experts[i][1] - base[1])
        gate, up = (gate_up @ token).chunk(2)
        rows.append(down @ (gate * gate.sigmoid() * up))
    return torch.stack(rows)


@over_families
@pytest.mark.parametrize("fields", FORMS, ids=names)
@pytest.mark.parametrize("grad", [True, False])
def test_it_equals_matrices_merged_for_each_token(namex_model, family, fields, grad):
    """With a curvature these are the folded experts, which `fold_curvature` makes by itself."""
    model = namex_model(family, torch.float64, **TOKEN, **fields)
    block = soft_blocks(model)[0]
    x, tokens = hidden(13, model.config.hidden_size), ids(13)
    with torch.set_grad_enabled(grad):
        output = block.routed(x, tokens).detach()
    if fields.get("curvature"):
        fold_curvature(model)
    has_base = fields.get("method") != "smear"
    with torch.no_grad():
        value, index = block.route(x, tokens)
        assert value.shape[1] == fields.get("top_k", 3 if has_base else 8)
        if not has_base or fields.get("renormalise"):
            assert torch.allclose(value.sum(-1).double(), torch.ones(13, dtype=torch.float64), atol=1e-6)
        expected = merged_by_hand(block, x, value.double(), index, fields.get("eta", 1.0), has_base)
    assert (output - expected).abs().max() < 1e-9 * expected.abs().max()


@torch.no_grad()
def test_in_evaluation_curvature_acts_once(namex_model, monkeypatch):
    """Until a parameter changes, or the model is trained; under an adapter in every pass."""
    model = namex_model("qwen2_moe", **TOKEN, curvature="kronecker")
    block, calls = soft_blocks(model)[1], []
    monkeypatch.setattr(soft, "bent", lambda *args: calls.append(args) or soft_kronecker.bent(*args))
    first = block.routed(hidden(4, 32, torch.float32), None)
    assert torch.equal(block.routed(hidden(4, 32, torch.float32), None), first)
    assert len(calls) == 1
    for name, parameter in block.named_parameters():
        if not name.startswith(("gate.", "shared")):
            parameter.mul_(1.5)
            changed = block.routed(hidden(4, 32, torch.float32), None)
            assert not torch.equal(changed, first), name
            block.bent = None
            assert torch.equal(block.routed(hidden(4, 32, torch.float32), None), changed), name
    assert block.bent is not None
    assert model.train().eval() is model
    assert block.bent is None
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    calls.clear()
    plain = adapted(ids(9)).logits
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert (adapted(ids(9)).logits - plain).abs().max() > 1e-2
    assert not calls


@over_families
@pytest.mark.parametrize("routing", ROUTINGS, ids=names)
def test_where_all_experts_are_alike_it_is_the_residual(namex_model, family, routing):
    token, residual = (namex_model(family, torch.float64, merge=merge, **routing) for merge in ("soft", "residual"))
    x, outputs = hidden(9, token.config.hidden_size), []
    for model in (token, residual):
        model.set_experts_implementation("eager")  # the stock block's other ones do not take float64
        block = next(module for module in model.modules() if hasattr(module, "base_expert"))
        with torch.no_grad():
            base = block.base_expert
            block.experts.gate_up_proj[:] = torch.cat([base.gate_proj.weight, base.up_proj.weight])
            block.experts.down_proj[:] = base.down_proj.weight
            outputs.append(block.routed(x, ids(9)))
    assert torch.allclose(*outputs, rtol=0, atol=1e-6)  # the mass left over is in float32


@over_families
@pytest.mark.parametrize("fields", [{"top_k": 8}, {"renormalise": True}], ids=names)
def test_where_all_mass_is_routed_and_experts_are_alike_it_is_the_sparse_block(namex_model, family, fields):
    model = namex_model(family, torch.float64, **TOKEN, **fields)
    block = soft_blocks(model)[0]
    x = hidden(9, model.config.hidden_size)
    with torch.no_grad():
        block.experts.gate_up_proj[:] = block.experts.gate_up_proj[3].clone()
        block.experts.down_proj[:] = block.experts.down_proj[3].clone()
        value, index = block.route(x, None)
        model.set_experts_implementation("eager")  # the stock block's other ones do not take float64
        sparse = super(type(block.experts), block.experts).forward(x, index, value)
        output = block.routed(x, None)
    assert (output - sparse).abs().max() < 1e-6 * sparse.abs().max()  # the router's values sum to 1 in float32 only


@over_families
def test_generation_needs_no_cache_of_its_own(namex_model, family):
    model, tokens = namex_model(family, **TOKEN), ids(7)
    cached = model(tokens, use_cache=True)
    assert type(cached.past_key_values) is DynamicCache
    greedy = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    grown = tokens
    for _ in range(9):
        grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    for way in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(tokens, **greedy, **way), grown), way


@over_families
def test_a_token_depends_on_no_later_one(namex_model, family):
    model, tokens = namex_model(family, torch.float64, **TOKEN), ids(12)
    other = tokens.clone()
    other[:, 7:] = other[:, 7:] % 50 + 4
    with torch.no_grad():
        one, two = model(tokens).logits, model(other).logits
    assert torch.allclose(one[:, :7], two[:, :7], atol=1e-12)
    assert (one[:, 7:] - two[:, 7:]).abs().max() > 1e-2


@pytest.mark.parametrize("fields", [{}, {"method": "smear"}, {"curvature": "kronecker"}], ids=names)
def test_gradients_equal_finite_differences(namex_model, fields):
    """Of bases, experts, router and curvature."""
    model = namex_model("qwen2_moe", torch.float64, **TOKEN, **fields)
    block, x = soft_blocks(model)[0], hidden(5, model.config.hidden_size)
    weight = hidden(5, model.config.hidden_size).flip(0)

    def loss() -> torch.Tensor:
        logits, _, index = block.gate(x)
        value = logits.softmax(-1).gather(-1, index)  # the router's own, but in float64
        if fields.get("method") == "smear":
            value = value / value.sum(-1, keepdim=True)
        return (block.experts(x, value, index, block.base(x), block._curvature(x)) * weight).sum()

    loss().backward()
    parameters = {name: p for name, p in block.named_parameters() if "shared" not in name}
    assert {name.split(".")[0] for name in parameters} >= {"gate", "experts"}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = loss()
            parameter.sub_(direction, alpha=2e-6)
            below = loss()
            parameter.add_(direction, alpha=1e-6)
        slope = (above - below) / 2e-6
        assert torch.allclose((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-7), name


@over_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_implementations_agree(namex_model, family, dtype):
    """The grouped product is taken where it can be; the others are the same sums."""
    exact = namex_model(family, torch.float64, **TOKEN)
    model = namex_model(family, dtype, **TOKEN)
    block, x = soft_blocks(model)[0], hidden(40, model.config.hidden_size)
    assert soft_token.groupable(x.to(dtype), block.experts.gate_up_proj)
    assert not soft_token.groupable(x, soft_blocks(exact)[0].experts.gate_up_proj)
    expected = soft_blocks(exact)[0].routed(x, None)
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        output = block.routed(x.to(dtype), None)
        assert output.dtype == dtype
        error = (output - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 6e-2), implementation
    model.train()
    grads = []
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        block.routed(x.to(dtype), None).float().square().sum().backward()
        grads.append(block.experts.gate_up_proj.grad.float())
    for grad in grads[1:]:
        assert (grad - grads[0]).norm() < (1e-5 if dtype == torch.float32 else 3e-2) * grads[0].norm()


def test_rows_that_the_grouped_product_refuses_go_through_the_loop(hub_folder, namex_model):
    matrices = torch.randn(4, 6, 10)  # 24 and 40 bytes
    inputs, index = torch.randn(5, 10), torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [1, 3]])
    assert not soft_token.groupable(inputs, matrices)
    pairs = soft_token.Pairs.of(index, 4)
    assert pairs.ends.tolist() == [3, 6, 6, 10]
    expected = torch.einsum("tkrc,tc->tkr", matrices[index], inputs)
    assert torch.allclose(pairs.products(inputs, matrices, loop=False), expected, atol=1e-5)


@over_families
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(namex_model, family, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = namex_model(family, **TOKEN).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids(11, 2), labels=ids(11, 2)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert all(grad is not None for grad in grads[-1].values())
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_adapters_on_the_fused_tensors_act(namex_model):
    model = namex_model("qwen2_moe", **TOKEN)
    plain = model(ids(9)).logits
    parts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parts))
    assert torch.allclose(adapted(ids(9)).logits, plain, atol=1e-5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(5))
    changed = adapted.train()(ids(9), labels=ids(9))
    changed.loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_A" in name)
    merged = adapted.eval().merge_and_unload()
    assert torch.allclose(merged(ids(9)).logits, changed.logits, atol=1e-4)
    assert (changed.logits - plain).abs().max() > 1e-2


def test_autocast_sums_in_float32(namex_model):
    model = namex_model("qwen2_moe", **TOKEN)
    expected = model(ids(11)).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids(11)).logits
    assert (output - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"routing_span": "token", "segment": 4}, "namex.segment is 4; accepted with namex.routing_span 'token': none"),
        ({"routing_span": "token", "curvature": "calibrated"}, "accepted with a calibrated curvature"),
        ({"routing_span": "word"}, "namex.routing_span is 'word'; accepted: token, all, previous, prompt"),
        ({"renormalise": "yes"}, "namex.renormalise is 'yes'; accepted: true, false"),
    ],
)
def test_fields_that_do_not_fit_are_refused(namex_model, fields, says):
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        namex_model("qwen2_moe", **TOKEN, **fields)
