"""``routing: cosine`` and ``stable`` under every merge, in both families: against loops, cached, stored, trained."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from namex_hf.errors import CheckpointError
from namex_hf.models import PATCHED, load_patched
from namex_hf.models.convert import patch_classes
from namex_hf.models.routers import ChosenRouting, CosineRouter, StableRouter
from namex_hf.models.soft import SoftRouting
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.reference import double, expert64, softmax64

FAMILIES, ROUTINGS, OTHERS = ["qwen2_moe", "deepseek"], ["linear", "cosine", "stable"], ["cosine", "stable"]
EXPERTS, VOCABULARY, SEGMENT, TOP_K = 8, 61, 4, 3
SOFT = {"merge": "soft", "segment": SEGMENT}
MERGES = {
    "residual": {"merge": "residual"},
    "smoe": {"method": "smoe"},
    "grouped": {"merge": "grouped"},
    "soft": SOFT,
    "smear": {**SOFT, "method": "smear"},
}
CLOSE = 2e-5
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
over_families = pytest.mark.parametrize("family", FAMILIES)
over_routings = pytest.mark.parametrize("routing", ROUTINGS)
over_others = pytest.mark.parametrize("routing", OTHERS)
over_merges = pytest.mark.parametrize("fields", MERGES.values(), ids=MERGES)
quick = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(model) -> list[ChosenRouting]:
    return [module for module in model.modules() if isinstance(module, ChosenRouting)]


def layers(family: str) -> list[int]:
    return [1, 2] if family == "deepseek" else [0, 1, 2]


def changed_at(tokens: torch.Tensor, place: int) -> torch.Tensor:
    """Another id there, from one that was seen to one that was not or the other way round, now and then."""
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 7) % 58 + 3
    return changed


# --- what routers answer, in float64 and in loops ---------------------------------------------------------------------


def cosine64(router: CosineRouter, h: np.ndarray) -> list[float]:
    """Logits of one token, from the definition of an angle."""
    seen = [float(row @ h) for row in double(router.projection.detach())]
    length, scale, logits = sum(x * x for x in seen) ** 0.5, router.scale.item(), []
    for own in double(router.embeddings.detach()):
        product = sum(a * b for a, b in zip(seen, own, strict=True))
        logits.append(scale * product / (length * sum(b * b for b in own) ** 0.5))
    return logits


def best(chances: list[float], top_k: int) -> list[int]:
    return sorted(range(len(chances)), key=lambda i: -chances[i])[:top_k]


def shares64(block: ChosenRouting, h: np.ndarray, token: int, top_k: int, norm: bool) -> np.ndarray:
    """Gate values of one token, 0 at the experts that it is not sent to."""
    logits = cosine64(block.cosine_router, h) if block.routing == "cosine" else list(double(block.gate.weight) @ h)
    chances = softmax64(logits)
    chosen = best(chances, top_k)
    if block.routing == "stable":
        row = block.stable_router.assignment[token].tolist()
        chosen = row if min(row) >= 0 else chosen
    shares = np.zeros(len(chances))
    for i in chosen:
        shares[i] = chances[i] / (sum(chances[j] for j in chosen) if norm else 1)
    return shares


def experts64(block) -> list[dict[str, np.ndarray]]:
    gate_up, down = double(block.experts.gate_up_proj), double(block.experts.down_proj)
    width = down.shape[-1]
    three = (gate_up[:, :width], gate_up[:, width:], down)
    return [{name: part[i] for name, part in zip(PROJECTIONS, three, strict=True)} for i in range(len(down))]


def base64(block) -> dict[str, np.ndarray] | None:
    if getattr(block, "base_expert", None) is None:
        return None
    return {name: double(getattr(block.base_expert, name).weight) for name in PROJECTIONS}


def sparse64(block, x: np.ndarray, shares: list[np.ndarray]) -> np.ndarray:
    experts, base, rows = experts64(block), base64(block), []
    for token, own in zip(x, shares, strict=True):
        row = sum(own[i] * expert64(token, experts[i]) for i in range(EXPERTS) if own[i])
        rows.append(row if base is None else row + (1 - own.sum()) * expert64(token, base))
    return np.stack(rows)


def soft64(block, x: np.ndarray, shares: list[np.ndarray], eta: float, span: str) -> np.ndarray:
    experts, base, rows = experts64(block), base64(block), []
    for place, token in enumerate(x):
        stop = place // SEGMENT * SEGMENT
        before = shares[max(stop - SEGMENT, 0) if span == "previous" else 0 : stop]
        s = eta * sum(before) / len(before) if before else np.full(EXPERTS, 0 if base else 1 / EXPERTS)
        merged = {name: sum(s[i] * experts[i][name] for i in range(EXPERTS)) for name in PROJECTIONS}
        if base:
            merged = {name: one + (1 - s.sum()) * base[name] for name, one in merged.items()}
        rows.append(expert64(token, merged))
    return np.stack(rows)


@torch.no_grad()
def logits64(model, tokens: torch.Tensor, top_k: int, norm: bool, eta: float = 1.0, span: str = "all") -> torch.Tensor:
    """One document through a float64 copy of `model`, whose routed parts are replaced by the loops above."""
    exact = copy.deepcopy(model).double()

    def by_hand(block):
        def routed(flat, *_):
            shares = [
                shares64(block, double(h), token, top_k, norm) for h, token in zip(flat, tokens.tolist(), strict=True)
            ]
            if isinstance(block, SoftRouting):
                return torch.from_numpy(soft64(block, double(flat), shares, eta, span))
            return torch.from_numpy(sparse64(block, double(flat), shares))

        return routed

    for block in blocks(exact):
        block.routed = by_hand(block)
    return exact(tokens[None], use_cache=False).logits[0]


# --- the cosine router ------------------------------------------------------------------------------------------------


def cosine_router(experts: int, hidden: int, top_k: int, norm: bool, seed: int) -> CosineRouter:
    router = CosineRouter(experts, hidden, top_k, norm)
    with torch.no_grad():
        for number, parameter in enumerate((router.projection, router.embeddings)):
            parameter.copy_(normal(*parameter.shape, seed=seed + number))
        router.scale.fill_(0.5 + 5 * torch.rand(1, generator=torch.Generator().manual_seed(seed)).item())
    return router


def assert_routed(value, index, chances: np.ndarray, norm: bool, rtol: float = 1e-5) -> None:
    """They are top-k of `chances`, whichever way a tie may have gone."""
    top_k = index.shape[1]
    for own, chosen, row in zip(double(value), index.tolist(), chances, strict=True):
        assert len(set(chosen)) == top_k
        wanted = np.sort(row)[::-1][:top_k]
        total = wanted.sum() if norm else 1.0
        np.testing.assert_allclose(own, wanted / total, rtol=rtol)
        np.testing.assert_allclose(own, row[chosen] / total, rtol=rtol)


@quick
@given(seed=seeds, experts=st.integers(1, 6), hidden=st.integers(1, 7), norm=st.booleans(), data=st.data())
def test_cosine_routing_equals_the_definition(seed, experts, hidden, norm, data):
    top_k = data.draw(st.integers(1, experts))
    router, h = cosine_router(experts, hidden, top_k, norm, seed), normal(5, hidden, seed=seed + 7)
    assert (len(router.projection), router.embeddings.shape) == (min(experts, hidden), (experts, min(experts, hidden)))
    logits, value, index = router(h)
    wanted = np.array([cosine64(router, row) for row in double(h)])
    np.testing.assert_allclose(double(logits.detach()), wanted, atol=1e-4)
    assert_routed(value.detach(), index, np.array([softmax64(row) for row in wanted.tolist()]), norm, rtol=3e-4)


@quick
@given(seed=seeds, factor=st.floats(1e-3, 1e3), power=st.integers(-8, 8), norm=st.booleans())
def test_lengths_do_not_count(seed, factor, power, norm):
    """Neither of hidden states nor of experts' embeddings; a power of two does not change a bit."""
    router, h = cosine_router(6, 8, 2, norm, seed), normal(4, 8, seed=seed + 7)
    expected = router(h)
    for found, own in zip(router(h * 2.0**power), expected, strict=True):
        assert torch.equal(found, own)
    with torch.no_grad():
        router.embeddings *= factor * torch.linspace(0.5, 2, 6)[:, None]
        router.projection *= factor
    found = router(factor * h)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        router.scale *= 2
    torch.testing.assert_close(router(h)[0], 2 * expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("experts", "hidden"), [(5, 9), (9, 5), (6, 6)])
def test_the_pretrained_routers_own_form_looks_at_directions(experts, hidden):
    """P = V^T, e = U S: ranks experts as W_i h / |W_i| does; for an h that W sees in full the angle is W's own."""
    weight, h = double(normal(experts, hidden, seed=3)), double(normal(20, hidden, seed=4))
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    router = CosineRouter(experts, hidden, experts, False)
    with torch.no_grad():
        router.projection.copy_(torch.from_numpy(right))
        router.embeddings.copy_(torch.from_numpy(left * values))
        router.scale.fill_(7.0)
    _, _, index = router(torch.from_numpy(h).float())
    scores = h @ weight.T / np.linalg.norm(weight, axis=1)
    assert index.tolist() == (-scores).argsort(1).tolist()
    assert index.tolist() != (-(h @ weight.T)).argsort(1).tolist()  # lengths did count there
    inside = h @ right.T @ right
    logits, _, _ = router(torch.from_numpy(inside).float())
    angles = inside @ weight.T / np.linalg.norm(weight, axis=1) / np.linalg.norm(inside, axis=1)[:, None]
    np.testing.assert_allclose(double(logits.detach()), 7 * angles, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_angles_that_bfloat16_cannot_tell_apart(autocast):
    """Experts a hundredth of a radian apart: logits tie in bfloat16, and the right one is first all the same."""
    angles = torch.arange(0, 0.05, 0.01, dtype=torch.float64)
    router = CosineRouter(5, 2, 2, False).bfloat16()
    with torch.no_grad():
        router.projection.copy_(torch.eye(2))
        router.embeddings.copy_(100 * torch.stack([angles.cos(), angles.sin()], 1))
        router.scale.fill_(10.0)
    h = torch.tensor([[1.0, tilt] for tilt in (0.0, 0.0125, 0.0205, 0.04)]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, value, index = router(h)
    assert (logits.dtype, value.dtype) == (torch.bfloat16, torch.bfloat16)
    wanted = [cosine64(router, row) for row in double(h)]
    assert index.tolist() == [best(row, 2) for row in wanted]
    assert len({row[0] for row in index.tolist()}) >= 3
    assert all(len(row.unique()) == 1 for row in logits)
    np.testing.assert_allclose(double(value.detach()), [sorted(softmax64(r))[:-3:-1] for r in wanted], rtol=2**-8)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_the_cosine_router(norm):
    """Through the values, to all three parameters, as small steps of each number in float64 say."""
    router, h, weight = cosine_router(4, 3, 2, norm, 5), normal(6, 3, seed=6), normal(6, 2, seed=7)
    _, value, index = router(h)
    (value * weight).sum().backward()
    held = {name: parameter.detach().double() for name, parameter in router.named_parameters()}

    def objective(name: str, place: int, step: float) -> float:
        moved = copy.deepcopy(router).double()
        with torch.no_grad():
            for own, tensor in held.items():
                getattr(moved, own).copy_(tensor)
            getattr(moved, name).view(-1)[place] += step
        total = 0.0
        for row, chosen, own in zip(double(h), index.tolist(), double(weight), strict=True):
            chances = softmax64(cosine64(moved, row))
            kept = [chances[i] for i in chosen]
            total += sum(w * p for w, p in zip(own, kept, strict=True)) / (sum(kept) if norm else 1)
        return total

    for name, parameter in router.named_parameters():
        steps = [(objective(name, i, 1e-5) - objective(name, i, -1e-5)) / 2e-5 for i in range(parameter.numel())]
        assert parameter.grad.abs().max() > 1e-3, name
        np.testing.assert_allclose(double(parameter.grad).ravel(), steps, atol=1e-4, err_msg=name)
    assert set(held) == {"projection", "embeddings", "scale"}


def test_a_hidden_state_of_zeros_is_finite():
    router, h = cosine_router(4, 3, 2, True, 0), torch.zeros(2, 3, requires_grad=True)
    logits, value, _ = router(h)
    assert torch.equal(logits, torch.zeros(2, 4))
    (value * normal(2, 2)).sum().backward()
    for tensor in (h, *router.parameters()):
        assert torch.isfinite(tensor.grad).all()


# --- the stable router ------------------------------------------------------------------------------------------------


def linear_router(experts: int, hidden: int, top_k: int, norm: bool, seed: int) -> Qwen2MoeTopKRouter:
    sizes = {"num_experts": experts, "hidden_size": hidden, "num_experts_per_tok": top_k}
    gate = Qwen2MoeTopKRouter(Qwen2MoeConfig(**sizes, norm_topk_prob=norm))
    gate.weight.data = normal(experts, hidden, seed=seed)
    return gate


def table(vocabulary: int, experts: int, top_k: int, seed: int, unseen: float = 0.4) -> np.ndarray:
    draw = np.random.default_rng(seed)
    rows = np.stack([draw.permutation(experts)[:top_k] for _ in range(vocabulary)])
    rows[draw.random(vocabulary) < unseen] = -1
    return rows


@quick
@given(seed=seeds, experts=st.integers(1, 6), vocabulary=st.integers(1, 9), norm=st.booleans(), data=st.data())
def test_stable_routing_equals_the_definition(seed, experts, vocabulary, norm, data):
    """Seen ids get their row of the table; unseen ones, and those beyond it, exactly what the linear router says."""
    top_k = data.draw(st.integers(1, experts))
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, vocabulary + 3), min_size=6, max_size=6)))
    gate, h = linear_router(experts, 4, top_k, norm, seed), normal(6, 4, seed=seed + 1)
    router, rows = StableRouter(vocabulary, top_k, norm), table(vocabulary, experts, top_k, seed)
    router.assignment.copy_(torch.from_numpy(rows))
    assert router.assignment.dtype == torch.int32
    for dtype in (torch.float32, torch.bfloat16):
        gate, h = gate.to(dtype), h.to(dtype)
        logits, old_value, old_index = gate(h)
        value, index = router(logits, old_value, old_index, tokens.view(2, 3))
        assert (value.dtype, index.dtype, value.shape) == (dtype, torch.int64, (6, top_k))
        for t, token in enumerate(tokens.tolist()):
            if token >= vocabulary or rows[token][0] < 0:
                assert torch.equal(value[t], old_value[t])
                assert torch.equal(index[t], old_index[t])
                continue
            assert index[t].tolist() == rows[token].tolist()
            chances = softmax64(double(logits[t].detach()).tolist())
            wanted = np.array([chances[i] for i in rows[token]])
            wanted = wanted / wanted.sum() if norm else wanted
            np.testing.assert_allclose(
                double(value[t].detach()), wanted, rtol=1e-5 if dtype == torch.float32 else 2**-8
            )


def test_one_expert_a_token():
    """StableMoE's own case; renormalised, a gate value is 1 whatever the router says."""
    h, tokens = normal(4, 5), torch.tensor([0, 1, 2, 0])
    for norm in (False, True):
        gate, router = linear_router(3, 5, 1, norm, 2), StableRouter(3, 1, norm)
        router.assignment.copy_(torch.tensor([[2], [-1], [0]]))
        logits, old_value, old_index = gate(h)
        value, index = router(logits, old_value, old_index, tokens)
        assert index[:, 0].tolist() == [2, int(logits[1].argmax()), 0, 2]
        chances = [softmax64(row) for row in logits.tolist()]
        wanted = [chances[t][index[t, 0]] for t in range(4)]
        np.testing.assert_allclose(value[:, 0].tolist(), [1.0] * 4 if norm else wanted, rtol=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_gate_values(norm):
    """d p_a / d W_j = p_a (1[a = j] - p_j) h; renormalised, as quotients have it. Experts that a token has not, too."""
    gate, h, weight = linear_router(4, 3, 2, norm, 2), normal(5, 3, seed=3), normal(5, 2, seed=4)
    router, tokens = StableRouter(5, 2, norm), torch.arange(5)
    router.assignment.copy_(torch.from_numpy(table(5, 4, 2, seed=1, unseen=0.0)))
    value, _ = router(*gate(h), tokens)
    (value * weight).sum().backward()
    wanted = np.zeros((4, 3))
    for row, own, chosen in zip(double(h), double(weight), router.assignment.tolist(), strict=True):
        p = softmax64(list(double(gate.weight.detach()) @ row))
        total = sum(p[a] for a in chosen)
        for j in range(4):
            slopes = [p[a] * ((a == j) - p[j]) for a in chosen]
            if norm:
                slopes = [(s - p[a] / total * sum(slopes)) / total for s, a in zip(slopes, chosen, strict=True)]
            wanted[j] += sum(w * s for w, s in zip(own, slopes, strict=True)) * row
    np.testing.assert_allclose(double(gate.weight.grad), wanted, atol=1e-6)
    assert np.abs(wanted).min(1).max() > 1e-3


def test_a_table_that_grows_and_shrinks():
    router, rows = StableRouter(6, 2, False), torch.from_numpy(table(6, 4, 2, 0, unseen=0.0)).to(torch.int32)
    router.assignment.copy_(rows)
    router.resize(9)
    assert router.assignment.dtype == torch.int32
    assert torch.equal(router.assignment, torch.cat([rows, torch.full((3, 2), -1, dtype=torch.int32)]))
    router.resize(4)
    assert torch.equal(router.assignment, rows[:4])
    assert list(router.state_dict()) == ["assignment"]


# --- whole models -----------------------------------------------------------------------------------------------------

WHOLE = {
    "namex-full": {"merge": "residual"},
    "camex": {"merge": "residual", "method": "camex"},
    "smoe": {"method": "smoe"},
    "smoe-norm": {"method": "smoe", "norm_topk_prob": True},
    "grouped": {"merge": "grouped", "method": "ep-camex"},
    "grouped-norm": {"merge": "grouped", "norm_topk_prob": True},
    "soft": SOFT,
    "soft-fields": {**SOFT, "eta": 0.6, "top_k": 5, "routing_span": "previous"},
    "soft-norm": {**SOFT, "norm_topk_prob": True},  # read before it renormalises
    "smear": {**SOFT, "method": "smear"},
    "smear-one": {**SOFT, "method": "smear", "top_k": 1},
}


def how(routing: str, fields: dict) -> dict:
    """What a recipe says about routing, as `logits64` takes it."""
    if fields.get("merge") != "soft":
        return {"top_k": TOP_K, "norm": fields.get("norm_topk_prob", False)}
    smear = fields.get("method") == "smear"
    top_k = fields.get("top_k") or (EXPERTS if smear and routing != "stable" else TOP_K)
    return {"top_k": top_k, "norm": smear, "eta": fields.get("eta", 1.0), "span": fields.get("routing_span", "all")}


@over_families
@over_others
@pytest.mark.parametrize("fields", WHOLE.values(), ids=WHOLE)
def test_logits_equal_the_definition(namex_model, family, routing, fields):
    tokens, model = ids(2, 11), namex_model(family, routing=routing, **fields)
    assert len(blocks(model)) == len(layers(family))
    expected = torch.stack([logits64(model, row, **how(routing, fields)) for row in tokens])
    for grad in (True, False):  # under soft, without gradients only the experts in use may be read
        with torch.set_grad_enabled(grad):
            assert (model(tokens).logits - expected).abs().max() < CLOSE
    for block in blocks(model):  # as if there were no such recipe
        block.routing = "linear"
    if how(routing, fields)["top_k"] < EXPERTS or routing == "cosine":
        assert (model(tokens).logits - expected).abs().max() > 1e-2


@torch.no_grad()
@over_families
@pytest.mark.parametrize("fields", WHOLE.values(), ids=WHOLE)
def test_an_empty_table_is_linear_routing_bit_for_bit(namex_model, family, fields):
    if fields.get("method") == "smear":  # which counts all experts under linear routing, where none are stated
        fields = {"top_k": TOP_K} | fields
    tokens, linear = ids(2, 11), namex_model(family, **fields)
    model = namex_model(family, routing="stable", **fields)
    expected = linear(tokens).logits
    assert (model(tokens).logits - expected).abs().max() > 1e-2
    for block in blocks(model):
        block.stable_router.reset_parameters()
        assert (block.stable_router.assignment == -1).all()
    assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
@over_families
@over_merges
def test_a_seen_id_has_the_same_experts_wherever_it_stands(namex_model, family, fields):
    """Hidden states differ from place to place, and so do its gate values; under linear routing its experts do too."""
    texts = [ids(2, 11, seed=s) for s in range(3)]
    for routing in ("stable", "linear"):
        model, seen = namex_model(family, routing=routing, top_k=TOP_K, **fields), []
        for number, block in enumerate(blocks(model)):
            if routing == "stable":
                rows = torch.from_numpy(table(VOCABULARY, EXPERTS, TOP_K, number, unseen=0.0))
                block.stable_router.assignment.copy_(rows)
            part = block.stable_router if routing == "stable" else block.gate
            part.register_forward_hook(lambda _m, _a, out, n=number, to=seen: to.append((n, out[-2], out[-1])))
        for text in texts:
            model(text)
        experts, values = {}, {}
        for place, (number, value, index) in enumerate(seen):
            text = texts[place // len(blocks(model))].flatten().tolist()
            for token, own, chosen in zip(text, value.tolist(), index.tolist(), strict=True):
                experts.setdefault((number, token), set()).add(tuple(chosen))
                values.setdefault((number, token), set()).add(tuple(own))
        assert max(len(found) for found in values.values()) > 3
        assert (max(len(found) for found in experts.values()) == 1) == (routing == "stable")
        if routing == "stable":
            for (number, token), found in experts.items():
                assert found == {tuple(blocks(model)[number].stable_router.assignment[token].tolist())}


@torch.no_grad()
@over_families
def test_experts_get_what_the_table_says(namex_model, family):
    """At the experts' own door, where no router's answer could be dropped on the way."""
    tokens, model, seen = ids(2, 11), namex_model(family, routing="stable"), []
    for block in blocks(model):
        block.experts.register_forward_pre_hook(lambda _m, a, b=block: seen.append((b.stable_router.assignment, a[1])))
    model(tokens)
    assert len(seen) == len(layers(family))
    for rows, index in seen:
        assigned = rows[tokens.flatten()].long()
        found = assigned[:, 0] >= 0
        assert 0 < found.sum() < tokens.numel()
        assert torch.equal(index[found], assigned[found])


# --- causal, cached, padded -------------------------------------------------------------------------------------------


@torch.no_grad()
@over_families
@over_routings
@over_merges
def test_future_tokens_leave_the_past_alone(namex_model, family, routing, fields):
    model, tokens = namex_model(family, routing=routing, **fields), ids(2, 13)
    before = model(tokens).logits
    for place in (0, 1, 3, 4, 5, 7, 8, 11, 12):
        after = model(changed_at(tokens, place)).logits
        if place:
            assert (before[:, :place] - after[:, :place]).abs().max() < 1e-5
        assert (before[:, place] - after[:, place]).abs().max() > 1e-2


@torch.no_grad()
@over_families
@over_others
def test_a_token_changes_no_expert_of_its_own_segment(namex_model, family, routing):
    """Attention carries a change on to later tokens; under soft the merged expert must not, within the segment."""
    model = namex_model(family, routing=routing, **SOFT)
    block, x = blocks(model)[0], normal(1, 12, 32, seed=3)
    tokens = torch.full((1, 12), 4)  # seen
    assert block.routing != "stable" or block.stable_router.assignment[4].min() >= 0
    seen = []
    block.register_forward_pre_hook(lambda _m, a: seen.append(a[2]))
    model(tokens, use_cache=False)
    changed, other = x.clone(), tokens.clone()
    changed[:, 5] += 1
    other[:, 5] = 5
    moved = block(x, tokens, seen[0], None) - block(changed, other, seen[0], None)
    assert (moved.abs().amax(-1)[0] > 1e-4).tolist() == [False] * 5 + [True, False, False] + [True] * 4


def in_passes(model, tokens, sizes, cache) -> torch.Tensor:
    """Logits of `tokens`, fed in passes of these sizes; the last goes on to the end."""
    parts, start = [], 0
    while start < tokens.shape[1]:
        stop = start + sizes[min(len(parts), len(sizes) - 1)]
        parts.append(model(tokens[:, start:stop], past_key_values=cache).logits)
        start = stop
    return torch.cat(parts, 1)


@torch.no_grad()
@over_families
@over_others
@over_merges
def test_cached_passes_equal_one(namex_model, family, routing, fields):
    model, tokens = namex_model(family, routing=routing, **fields), ids(2, 18)
    expected = model(tokens, use_cache=False).logits
    for sizes in ((6, 1), (3, 5, 2), (4,)):
        found = in_passes(model, tokens, sizes, DynamicCache(config=model.config))
        assert (found - expected).abs().max() < CLOSE


@torch.no_grad()
@over_families
@over_others
@over_merges
def test_generation_equals_uncached_argmax(namex_model, family, routing, fields):
    model, tokens = namex_model(family, routing=routing, **fields), ids(2, 6)
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, **GREEDY)
    expected = model(made, use_cache=False).logits.argmax(-1)
    assert torch.equal(made[:, 6:], expected[:, 5:-1])
    assert len(made[:, 6:].unique()) > 4  # not a loop that any model would give


@torch.no_grad()
@over_families
@over_others
@over_merges
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(namex_model, family, routing, fields, side):
    model, rows, width = namex_model(family, routing=routing, **fields), [ids(1, n, seed=n)[0] for n in (13, 9, 3)], 15
    for pad in (0, 7):  # an id that was not seen, and one that was
        tokens, mask = torch.full((3, width), pad), torch.zeros(3, width, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            tokens[number, place], mask[number, place] = row, 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
        for number, row in enumerate(rows):
            assert (logits[number][mask[number] == 1] - model(row[None]).logits[0]).abs().max() < CLOSE


@torch.no_grad()
@over_families
@over_others
def test_packed_documents_stay_apart(namex_model, family, routing):
    model, rows = namex_model(family, routing=routing, **SOFT), [ids(1, n, seed=n) for n in (7, 1, 12, 4)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    assert (packed - torch.cat([model(row).logits for row in rows], 1)).abs().max() < CLOSE


@torch.no_grad()
@over_families
@pytest.mark.parametrize("fields", [MERGES["soft"], MERGES["smear"]], ids=["soft", "smear"])
def test_beam_search_scores_are_those_of_the_sequences(namex_model, family, fields):
    model, tokens = namex_model(family, routing="stable", **fields), ids(2, 6)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10, "length_penalty": 0.0, **GREEDY}
    mask = torch.ones_like(tokens)
    output = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **beams)
    moved = output.beam_indices[:, :10]
    assert (moved[:, 1:] != moved[:, :-1]).any()  # rows were reordered on the way
    assert torch.equal(output.sequences, model.generate(tokens, attention_mask=mask, use_cache=False, **beams))
    logits = model(output.sequences, use_cache=False).logits.log_softmax(-1)
    scores = logits[:, 5:-1].gather(-1, output.sequences[:, 6:, None])[..., 0].sum(1)
    assert (scores - output.sequences_scores).abs().max() < 1e-3


@torch.no_grad()
@over_families
@over_others
def test_rows_can_be_picked_repeated_and_reordered(namex_model, family, routing):
    model, tokens = namex_model(family, routing=routing, **SOFT), ids(3, 14)
    whole = model(tokens, use_cache=False).logits
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    for name, (argument, rows) in changes.items():
        cache = model(tokens[:, :6], use_cache=True).past_key_values
        getattr(cache, name)(argument)
        assert (in_passes(model, tokens[rows, 6:], (1,), cache) - whole[rows, 6:]).abs().max() < CLOSE, name


# --- router logits and the auxiliary loss -----------------------------------------------------------------------------


def in_use(block) -> dict[str, torch.nn.Parameter]:
    return dict((block.cosine_router if block.routing == "cosine" else block.gate).named_parameters())


@over_families
@over_routings
@pytest.mark.parametrize("fields", [MERGES["residual"], MERGES["soft"]], ids=["residual", "soft"])
@pytest.mark.parametrize("live", [False, True], ids=["loaded", "live"])
def test_router_logits_and_auxiliary_loss(namex_model, hub_folder, family, routing, fields, live):
    """One tensor a MoE layer, of the router in use, which alone the loss's gradient reaches among the routers."""
    tokens, model = ids(2, 11), namex_model(family, routing=routing, **fields)
    if live:
        loaded = model
        model = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32).eval()
        patch_classes(model, loaded.config.namex)
        model.load_state_dict(loaded.state_dict())
    inputs = []
    for block in blocks(model):
        block.register_forward_pre_hook(lambda _m, a: inputs.append(a[0].detach().flatten(0, 1)))
    output = model(tokens, labels=tokens, output_router_logits=True)
    assert len(output.router_logits) == len(inputs) == len(layers(family))
    for block, h, found in zip(blocks(model), inputs, output.router_logits, strict=True):
        weight = double(block.gate.weight.detach())
        router = (lambda h, b=block: cosine64(b.cosine_router, h)) if routing == "cosine" else weight.__matmul__
        wanted = np.stack([router(row) for row in double(h)])
        np.testing.assert_allclose(double(found.detach()), wanted, atol=CLOSE)
    assert torch.isfinite(output.aux_loss)
    assert output.aux_loss > 0.5
    plain, coefficient = model(tokens, labels=tokens).loss, model.config.router_aux_loss_coef
    assert (output.loss - plain).item() == pytest.approx(coefficient * output.aux_loss.item(), rel=1e-3)
    output.aux_loss.backward()
    for block in blocks(model):
        for name, parameter in in_use(block).items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        assert (block.gate.weight.grad is None) == (routing == "cosine")
    if live:
        expected = loaded(tokens, labels=tokens, output_router_logits=True)
        assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in loaded.named_modules()]
        for name in ("logits", "loss", "aux_loss"):
            torch.testing.assert_close(output[name], expected[name], rtol=1e-5, atol=1e-5)


@over_families
@over_others
def test_a_model_that_has_recorded_before_is_converted(hub_folder, family, routing):
    """As one that was measured, and is then patched: hooks of the first recording are in place by then."""
    tokens, model = ids(2, 11), AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32).eval()
    model(tokens, output_router_logits=True)
    patch_classes(model, {"method": "smoe", "routing": routing})
    output = model(tokens, output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(22, EXPERTS)] * len(layers(family))


@over_families
@over_others
@pytest.mark.parametrize("fields", [MERGES["residual"], MERGES["soft"]], ids=["residual", "soft"])
def test_gradient_checkpointing_gives_the_same_gradients(namex_model, family, routing, fields):
    gradients, tokens = [], ids(2, 11)
    for checkpointing in (False, True):
        model = namex_model(family, routing=routing, **fields).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert model.is_activation_checkpointing
        output = model(tokens, labels=tokens, output_router_logits=True)
        assert len(output.router_logits) == len(layers(family))
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@over_families
@over_others
@over_merges
def test_gradients_reach_every_part_in_use(namex_model, family, routing, fields):
    """Under cosine routing the pretrained gate is out of use, and no parameter: there is no idle one."""
    model, tokens = namex_model(family, routing=routing, **fields).train(), ids(2, 13)
    model(tokens, labels=tokens).loss.backward()
    assert not any(t.requires_grad for t in model.buffers())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(isinstance(block.gate.weight, torch.nn.Parameter) == (routing != "cosine") for block in blocks(model))


@over_families
@over_others
@over_merges
def test_bfloat16(namex_model, family, routing, fields):
    tokens, model = ids(2, 13), namex_model(family, routing=routing, **fields)
    half = namex_model(family, torch.bfloat16, routing=routing, **fields)
    with torch.no_grad():
        expected, output = model(tokens).logits, half(tokens, output_router_logits=True)
    assert {logits.dtype for logits in output.router_logits} == {torch.bfloat16}
    assert (output.logits.float() - expected).norm() < 0.1 * expected.norm()


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@over_families
@over_routings
@pytest.mark.parametrize("fields", [MERGES["residual"], MERGES["soft"]], ids=["residual", "soft"])
def test_data_parallel_training(alone, namex_model, family, routing, fields):
    """Parameters and buffers are sent to all processes at its start; under cosine routing the gate is out of use."""
    tokens, model = ids(2, 9), namex_model(family, routing=routing, **fields).train()
    model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=routing == "cosine")
    for _ in range(2):
        model.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-6), name


@torch.no_grad()
@over_families
@over_others
@pytest.mark.parametrize("fields", [MERGES["residual"], MERGES["soft"]], ids=["residual", "soft"])
@pytest.mark.parametrize("buffers", [False, True])
def test_weights_that_are_off_the_device(namex_model, family, routing, fields, buffers):
    accelerate = pytest.importorskip("accelerate")
    model, tokens = namex_model(family, routing=routing, **fields), ids(2, 9)
    expected = model(tokens).logits
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=buffers)
    block = blocks(model)[0]
    part = block.cosine_router.projection if routing == "cosine" else block.stable_router.assignment
    assert part.is_meta == (routing == "cosine" or buffers)
    assert (model(tokens).logits - expected).abs().max() < CLOSE


@over_families
@over_others
@over_merges
def test_autocast(namex_model, family, routing, fields):
    """As ``bf16=True`` of a trainer: the model in float32, its products in bfloat16."""
    tokens, model = ids(2, 13), namex_model(family, routing=routing, **fields)
    expected = model(tokens).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens, labels=tokens, output_router_logits=True)
    assert (output.logits - expected).norm() < 0.1 * expected.norm()
    output.loss.backward()
    for block in blocks(model):
        for name, parameter in in_use(block).items():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0, name


# --- what is refused --------------------------------------------------------------------------------------------------


@torch.no_grad()
@over_families
@over_merges
def test_embeddings_instead_of_ids(namex_model, family, fields):
    tokens = ids(2, 9)
    for routing in ROUTINGS:
        model = namex_model(family, routing=routing, **fields)
        given = model.model.embed_tokens(tokens)
        if routing == "stable":
            with pytest.raises(ValueError, match=r"routing 'stable' .*found inputs_embeds; accepted: input_ids"):
                model(inputs_embeds=given)
        else:
            assert torch.equal(model(inputs_embeds=given).logits, model(tokens).logits)


@over_families
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"routing": "hash"}, r"namex\.routing is 'hash'; accepted: linear, cosine, stable"),
        ({"routing": "Cosine"}, r"namex\.routing is 'Cosine'; accepted"),
        ({"routing": "hash", "merge": "grouped"}, r"namex\.routing is 'hash'; accepted"),
        ({"routing": "hash", **SOFT}, r"namex\.routing is 'hash'; accepted"),
        ({"routing": "stable", "method": "smoe", **SOFT}, r"namex\.method is 'smoe'.*'soft'; accepted: 'residual'"),
        ({"routing": "cosine", "method": "smoe", "merge": "grouped"}, r"namex\.method is 'smoe'.*'grouped'; accepted"),
        (
            {"routing": "cosine", "method": "smear"},
            r"namex\.method is 'smear'.*accepted with it is namex\.merge: 'soft'",
        ),
    ],
    ids=str,
)
def test_inconsistent_configurations_are_refused(namex_model, hub_folder, family, fields, says):
    sizes = {"n_routed_experts" if family == "deepseek" else "num_experts": EXPERTS}
    with pytest.raises(ValueError, match=says):
        PATCHED[family](namex=fields, **sizes)
    with pytest.raises(ValueError, match=says):
        namex_model(family, **fields)
    live = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32)
    kind = type(live)
    with pytest.raises(ValueError, match=says):
        patch_classes(live, fields)
    assert type(live) is kind
    assert not any("router" in name for name in live.state_dict())


@over_families
@over_others
def test_renormalised_top_k_leaves_nothing_for_a_base_expert(namex_model, family, routing):
    with pytest.raises(ValueError, match=r"norm_topk_prob.*leave no mass"):
        namex_model(family, routing=routing, merge="residual", norm_topk_prob=True)
    PATCHED[family](namex={"routing": routing, "method": "smoe"}, norm_topk_prob=True)


# --- files ------------------------------------------------------------------------------------------------------------

PARTS = {
    "cosine": {"cosine_router.projection", "cosine_router.embeddings", "cosine_router.scale"},
    "stable": {"stable_router.assignment"},
}


@over_families
@over_others
@over_merges
def test_round_trip_keeps_the_names(namex_model, patched_folder, tmp_path, family, routing, fields):
    tokens, model = ids(2, 9), namex_model(family, routing=routing, **fields)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    before = set(load_file(patched_folder(family) / "model.safetensors"))
    if fields in (MERGES["smoe"], MERGES["grouped"], MERGES["smear"]):
        before = {name for name in before if ".base_expert." not in name}
    new = {f"model.layers.{layer}.mlp.{part}" for layer in layers(family) for part in PARTS[routing]}
    assert set(stored) == before | new
    assert {f"model.layers.{layer}.mlp.gate.weight" for layer in layers(family)} <= set(stored)
    assert json.loads((tmp_path / "config.json").read_text())["namex"] == {"routing": routing, **fields}
    again, info = load_patched(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    held = again.state_dict()
    assert held.keys() == model.state_dict().keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in model.state_dict().items())
    assert (again.eval()(tokens).logits - model(tokens).logits).abs().max() < 1e-5
    half = load_patched(tmp_path, dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        table = name.endswith("assignment")
        assert tensor.dtype == (torch.int32 if table else torch.bfloat16), name
        assert not table or torch.equal(tensor, stored[name]), name


@over_families
@over_others
def test_what_no_file_holds_is_initialised(namex_model, tmp_path, family, routing):
    """Not memory as it was found; and what a file does hold stays."""
    model = namex_model(family, routing=routing)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    kept = {name for name in stored if ".layers.2." in name and name.endswith((".projection", ".assignment"))}
    some = {name: tensor for name, tensor in stored.items() if "_router." not in name or name in kept}
    assert len(kept) == 1
    save_file(some, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensors are in no file, the first is .*\.{routing}_router\."):
        load_patched(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=dtype)
        for one, held in ((found, kept), (fresh, set())):
            seen = {name: tensor for name, tensor in one.state_dict().items() if "_router." in name}
            assert len(seen) == len(layers(family)) * len(PARTS[routing])
            for name, tensor in seen.items():
                if name in held:
                    assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
                elif name.endswith("assignment"):
                    assert tensor.dtype == torch.int32
                    assert (tensor == -1).all(), name
                elif name.endswith("scale"):
                    assert tensor.tolist() == [10.0], name
                else:
                    assert 0.01 < tensor.float().std() < 0.025, name
                    assert tensor.float().mean().abs() < 0.01, name
        assert torch.isfinite(found.eval()(ids(1, 5)).logits).all()


@over_families
@pytest.mark.parametrize("fields", [MERGES["residual"], MERGES["soft"]], ids=["residual", "soft"])
def test_a_vocabulary_that_changes_its_size(namex_model, tmp_path, family, fields):
    tokens, model = ids(2, 9) % 50, namex_model(family, routing="stable", **fields)
    rows, expected = [block.stable_router.assignment for block in blocks(model)], model(tokens).logits
    for size in (70, 50):
        model.resize_token_embeddings(size)
        for block, old in zip(blocks(model), rows, strict=True):
            found, both = block.stable_router.assignment, min(size, VOCABULARY)
            assert found.shape == (size, TOP_K)
            assert torch.equal(found[:both], old[:both])
            assert (found[both:] == -1).all() if size > VOCABULARY else True
        assert (model(tokens).logits[..., :50] - expected[..., :50]).abs().max() < 1e-5
        folder = tmp_path / str(size)
        model.save_pretrained(folder)
        again = load_patched(folder, dtype=torch.float32).eval()
        held = again.state_dict()
        assert again.config.vocab_size == size
        assert all(torch.equal(held[name], tensor) for name, tensor in model.state_dict().items())
        assert (again(tokens).logits - model(tokens).logits).abs().max() < 1e-5
        latest = torch.full((1, 6), size - 1)  # an id that came, or the last that is left
        assert torch.isfinite(model(latest).logits).all()
        rows = [block.stable_router.assignment for block in blocks(model)]
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert {len(block.stable_router.assignment) for block in blocks(model)} == {64}


@over_families
@over_others
@over_merges
def test_a_live_model_is_converted(namex_model, hub_folder, family, routing, fields):
    """Its new parts in the model's dtype and mode, but for the table; they hold nothing by chance."""
    live = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.bfloat16).eval()
    namex = {"routing": routing, **fields}
    patch_classes(live, namex)
    for block in blocks(live):
        part = block.cosine_router if routing == "cosine" else block.stable_router
        assert not part.training
        assert {t.dtype for t in part.state_dict().values()} == {torch.bfloat16 if routing == "cosine" else torch.int32}
        if routing == "stable":
            assert (part.assignment == -1).all()
        else:
            assert all(torch.isfinite(tensor).all() for tensor in part.state_dict().values())
    expected = namex_model(family, **namex)
    assert [(n, type(m)) for n, m in live.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    live.float().load_state_dict(expected.state_dict())
    for parameter in live.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(live(ids(2, 9)).logits, expected(ids(2, 9)).logits)
    assert json.loads(live.config.to_json_string())["namex"] == namex


# --- adapters ---------------------------------------------------------------------------------------------------------

ADAPTED = {
    "stable-residual": ({"routing": "stable"}, {"target_parameters": ["mlp.gate.weight"]}),
    "stable-soft": (
        {"routing": "stable", **SOFT},
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]},
    ),
    "stable-smoe": (
        {"routing": "stable", "method": "smoe"},
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]},
    ),
    "cosine-residual": ({"routing": "cosine"}, {"target_parameters": ["mlp.cosine_router.projection"]}),
    "cosine-soft": ({"routing": "cosine", **SOFT}, {"target_parameters": ["mlp.cosine_router.projection"]}),
    "whole-residual": (
        {"routing": "cosine"},
        {"target_parameters": ["mlp.experts.down_proj"], "modules_to_save": ["cosine_router"]},
    ),
    "whole-soft": (
        {"routing": "cosine", **SOFT},
        {"target_parameters": ["mlp.experts.down_proj"], "modules_to_save": ["cosine_router"]},
    ),
}


@over_families
@pytest.mark.parametrize(("fields", "targets"), ADAPTED.values(), ids=ADAPTED)
def test_adapters_train_and_come_back(namex_model, tmp_path, family, fields, targets):
    peft = pytest.importorskip("peft")
    tokens, model = ids(2, 9), namex_model(family, **fields)
    if family == "deepseek":  # recorded before the adapter came, and not
        model(tokens, output_router_logits=True)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, **targets))
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    assert all("lora_" in name or "cosine_router.modules_to_save" in name for name in trained)
    step, losses = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0), []
    for _ in range(5):
        output = wrapped(input_ids=tokens, labels=tokens, output_router_logits=True)
        assert len(output.router_logits) == len(layers(family))
        losses.append(output.loss.item())
        step.zero_grad()
        output.loss.backward()
        step.step()
    assert losses[-1] < losses[0] - 1e-3
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    with torch.no_grad():
        expected = wrapped(input_ids=tokens).logits
        plain = namex_model(family, **fields)
        assert (plain(tokens).logits - expected).abs().max() > 1e-3
        wrapped.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(plain, tmp_path)
        assert (again(input_ids=tokens).logits - expected).abs().max() < 1e-5
        merged = again.merge_and_unload()
        assert (merged(tokens).logits - expected).abs().max() < 1e-4
        assert len(merged(tokens, output_router_logits=True).router_logits) == len(layers(family))
