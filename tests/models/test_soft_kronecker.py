"""``merge: soft`` under a trainable curvature, in both families: against M_i in full, identical at first, trained."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from namex_hf.errors import CheckpointError
from namex_hf.models import PATCHED, load_patched, soft
from namex_hf.models.convert import patch_classes
from namex_hf.models.soft_kronecker import Factors, KroneckerCurvature, curved, factor_pair, kronecker_parameters
from tests.helpers.checkpoints import PROJECTIONS
from tests.helpers.reference import double, expert64, softmax64

FAMILIES = ["qwen2_moe", "deepseek"]
SEGMENT, EXPERTS, HIDDEN, WIDTH = 4, 8, 32, 16
BENT = {"curvature": "kronecker"}
SMEAR = {**BENT, "method": "smear"}

PARTS = ("left_outer", "left_inner", "right_outer", "right_inner")
NAMES = {f"{projection}.{part}" for projection in PROJECTIONS for part in PARTS}
CLOSE = 2e-5
over_families = pytest.mark.parametrize("family", FAMILIES)
over_bases = pytest.mark.parametrize("fields", [BENT, SMEAR], ids=["base", "smear"])
over_ranks = pytest.mark.parametrize("rank", [1, 2, 3])
quick = settings(max_examples=60, deadline=None, derandomize=True)


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def blocks(model) -> list[soft.SoftRouting]:
    return [module for module in model.modules() if isinstance(module, soft.SoftRouting)]


def sides(size: int) -> tuple[int, int]:
    """The divisor pair nearest the square root, by looking at all of them."""
    pairs = [(one, size // one) for one in range(1, size + 1) if size % one == 0]
    return min((pair for pair in pairs if pair[0] <= pair[1]), key=lambda pair: abs(pair[0] - math.sqrt(size)))


def random_factors(experts: int, rank: int, rows: int, columns: int, seed: int) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(experts, rank, side, side) for side in (*sides(rows), *sides(columns))]
    return Factors(*(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes))


def bent64(tau: np.ndarray, factors) -> np.ndarray:
    """``sum_r (A1 x A2) tau (B1 x B2)^T`` of one expert, its factors ``[rank, side, side]``, in full matrices."""
    return sum(np.kron(a1, a2) @ tau @ np.kron(b1, b2).T for a1, a2, b1, b2 in zip(*factors, strict=True))


# --- one matrix -------------------------------------------------------------------------------------------------------


@quick
@given(seed=st.integers(0, 10**6), experts=st.integers(0, 3), rank=st.integers(1, 3), data=st.data())
def test_curved_equals_kronecker_products_in_full(seed, experts, rank, data):
    sizes = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 12, 15, 16, 20])
    rows, columns = data.draw(sizes), data.draw(sizes)
    factors = random_factors(experts, rank, rows, columns, seed)
    tau = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    found = curved(tau, factors)
    assert found.shape == tau.shape
    for i in range(experts):
        own = [double(factor[i]) for factor in factors]
        np.testing.assert_allclose(double(found[i]), bent64(double(tau[i]), own), rtol=1e-10, atol=1e-10)
    some = torch.arange(experts)[1:]
    torch.testing.assert_close(curved(tau[some], factors.of(some)), found[some])
    assert factors.of(None) is factors


def test_curved_reads_matrices_as_they_lie():
    """Halves of a fused tensor, and its transpose."""
    fused = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tau in (*fused.chunk(2, dim=1), fused.mT):
        factors = random_factors(3, 2, *tau.shape[1:], seed=1)
        found = curved(tau, factors)
        for i in range(3):
            own = [double(factor[i]) for factor in factors]
            np.testing.assert_allclose(double(found[i]), bent64(double(tau[i]), own), rtol=1e-10, atol=1e-10)


@over_ranks
def test_gradients_of_curved(rank):
    factors = [factor.requires_grad_() for factor in random_factors(2, rank, 6, 4, seed=2)]
    tau = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tau, *own: curved(tau, Factors(*own)), (tau, *factors))


def test_curved_takes_the_experts_dtype():
    factors, tau = random_factors(2, 2, 8, 6, seed=4), torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(5))
    exact = curved(tau.double(), factors)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        found = curved(tau.to(dtype), factors)
        assert found.dtype == dtype
        assert (found - exact).norm() < close * exact.norm()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(size=st.integers(1, 5000))
def test_factor_pair_is_the_nearest_to_the_square_root(size):
    found = factor_pair(size)
    assert found == sides(size)
    assert all(isinstance(side, int) for side in found)


def test_numbers_of_the_paper():
    assert (factor_pair(2048), factor_pair(1408)) == ((32, 64), (32, 44))
    assert kronecker_parameters(2048, 1408, 1) == 24240


@quick
@given(experts=st.integers(1, 3), hidden=st.integers(1, 40), width=st.integers(1, 40), rank=st.integers(1, 4))
def test_the_stated_number_is_the_modules(experts, hidden, width, rank):
    module = KroneckerCurvature(experts, hidden, width, rank)
    assert {name for name, _ in module.named_parameters()} == NAMES
    assert sum(p.numel() for p in module.parameters()) == experts * kronecker_parameters(hidden, width, rank)


# --- where it starts --------------------------------------------------------------------------------------------------


def of_sizes(module: KroneckerCurvature):
    """Factors of each kind of matrix, with its size."""
    return zip(module(torch.empty(0)), [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)], strict=True)


@over_ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_starts_as_the_identity(rank, dtype):
    """Exactly, whatever stood there: the first product is I and the others vanish; yet these are not all zero."""
    module = KroneckerCurvature(EXPERTS, HIDDEN, WIDTH, rank).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1e30)
    module.reset_parameters()
    for factors, (rows, columns) in of_sizes(module):
        tau = torch.randn(EXPERTS, rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert torch.equal(curved(tau, factors), tau)
        assert [factor.shape for factor in factors] == [(EXPERTS, rank, n, n) for n in (*sides(rows), *sides(columns))]
        for r in range(rank):
            alone = Factors(*(factor[:, r : r + 1] for factor in factors))
            assert torch.equal(curved(tau, alone), tau if r == 0 else torch.zeros_like(tau))
            if r:
                spread = [factor[:, r].float().std().item() * factor.shape[-1] ** 0.5 for factor in factors[:3]]
                assert all(0.7 < one < 1.3 for one in spread), spread


def test_it_starts_alike_for_one_seed():
    def start(seed):
        module = KroneckerCurvature(2, 8, 6, 3)
        module.reset_parameters(torch.Generator().manual_seed(seed))
        return list(module.state_dict().values())

    assert all(torch.equal(one, other) for one, other in zip(start(0), start(0), strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(start(0), start(1), strict=True))


@pytest.mark.parametrize("rank", [2, 3])
def test_products_learn_unlike_things(rank):
    """Gradients of no two products are alike, and after a step every one of them moves."""
    module = KroneckerCurvature(2, HIDDEN, WIDTH, rank)
    step = torch.optim.SGD(module.parameters(), lr=0.01)
    for turn in range(2):
        step.zero_grad()
        total = 0
        for factors, (rows, columns) in of_sizes(module):
            draw = torch.Generator().manual_seed(rows)
            tau, weight = (torch.randn(2, rows, columns, generator=draw) for _ in range(2))
            total = total + (curved(tau, factors) * weight).sum()
        total.backward()
        for name, parameter in module.named_parameters():
            grads = parameter.grad.transpose(0, 1)
            for r in range(rank):
                moves = turn == 1 or r == 0 or name.endswith("right_inner")
                assert (grads[r].abs().max() > 1e-3) == moves, (name, r)
                if name.endswith("right_inner") or turn == 1:
                    for other in range(r):
                        assert not torch.allclose(grads[r], grads[other], rtol=0.1), (name, r, other)
        step.step()


@torch.no_grad()
@over_families
@over_bases
@over_ranks
def test_an_untrained_curvature_is_the_plain_merge(soft_model, family, fields, rank):
    tokens, model = ids(2, 13), soft_model(family, rank=rank, **fields)
    plain = soft_model(family, **(fields | {"curvature": "identity"}))
    assert all(block.curvature is None for block in blocks(plain))
    expected = plain(tokens).logits
    assert (model(tokens).logits - expected).abs().max() > 1e-2
    for block in blocks(model):
        block.curvature.reset_parameters()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert (model(tokens).logits - expected).abs().max() < 1e-5


# --- a whole model ----------------------------------------------------------------------------------------------------


def shares64(block, h: np.ndarray) -> np.ndarray:
    """The router's top-k values, zeros elsewhere; without a base expert rescaled to sum 1."""
    p = softmax64(double(block.gate.weight) @ h)
    p[np.argsort(-p)[block.gate.top_k :]] = 0
    return p if block.has_base else p / p.sum()


def routed64(block, x: np.ndarray, eta: float, plain: bool = False) -> np.ndarray:
    """One document, ``[tokens, hidden]``, segment by segment: E^ = E_m + eta sum_i s_i M_i(E_i - E_m)."""
    gate_up, values, rows = double(block.experts.gate_up_proj), [shares64(block, h) for h in x], []
    three = gate_up[:, :WIDTH], gate_up[:, WIDTH:], double(block.experts.down_proj)
    for start in range(0, len(x), SEGMENT):
        s = np.full(EXPERTS, 0.0 if block.has_base else 1 / EXPERTS)
        if start:
            s = sum(values[:start]) / start
        merged = {}
        for name, experts in zip(PROJECTIONS, three, strict=True):
            base = double(getattr(block.base_expert, name).weight) if block.has_base else np.zeros(experts[0].shape)
            held = getattr(block.curvature, name)
            total = base.copy()
            for i in range(EXPERTS):
                tau, factors = experts[i] - base, [double(getattr(held, part)[i]) for part in PARTS]
                total += eta * s[i] * (tau if plain else bent64(tau, factors))
            merged[name] = total
        rows.extend(expert64(x[start : start + SEGMENT], merged))
    return np.stack(rows)


@torch.no_grad()
def logits64(model, tokens: torch.Tensor, eta: float, plain: bool = False) -> torch.Tensor:
    """One document through a float64 copy of `model`, whose routed parts are replaced by the loops above."""
    exact = copy.deepcopy(model).double()
    for block in blocks(exact):
        block.routed = lambda flat, *_, b=block: torch.from_numpy(routed64(b, double(flat), eta, plain))
    return exact(tokens[None], use_cache=False).logits[0]


@over_families
@pytest.mark.parametrize(
    "fields",
    [{}, {"eta": 0.6, "rank": 2}, {"eta": 1.7, "rank": 3}, {"top_k": 1}, SMEAR, {**SMEAR, "top_k": 2, "rank": 2}],
    ids=str,
)
def test_logits_equal_the_definition(soft_model, family, fields):
    tokens, fields = ids(2, 14), BENT | fields
    model, eta = soft_model(family, **fields), fields.get("eta", 1.0)
    assert {block.curvature.gate_proj.left_outer.shape[1] for block in blocks(model)} == {fields.get("rank", 1)}
    expected = torch.stack([logits64(model, row, eta) for row in tokens])
    for grad in (True, False):  # without gradients only the experts in use may be read
        with torch.set_grad_enabled(grad):
            assert (model(tokens).logits - expected).abs().max() < CLOSE
    plain = torch.stack([logits64(model, row, eta, plain=True) for row in tokens])
    assert (plain - expected).abs().max() > 1e-2


@torch.no_grad()
@over_families
@over_bases
def test_only_experts_in_use_are_read(soft_model, family, fields):
    fields = {**fields, "top_k": 1, "segment": 2, "routing_span": "previous", "rank": 2}
    model, tokens, seen = soft_model(family, **fields), ids(1, 4), []
    with torch.enable_grad():  # all of them are
        expected = model(tokens).logits.detach()
    base = model.model.layers[-1].mlp.has_base
    for block in blocks(model):
        block.gate.register_forward_hook(lambda _m, _a, out: seen.append(out[2][:2].unique().tolist()))
    model(tokens)
    if not base:  # the first segment is a mean of all
        assert (model(tokens).logits - expected).abs().max() < CLOSE
        return
    for block, used in zip(blocks(model), seen, strict=True):
        unused = [i for i in range(EXPERTS) if i not in used]
        assert len(unused) >= 6
        for tensor in (block.experts.gate_up_proj, block.experts.down_proj, *block.curvature.parameters()):
            tensor[unused] = torch.nan
    assert (model(tokens).logits - expected).abs().max() < CLOSE
    for block in blocks(model):
        for tensor in (block.experts.gate_up_proj, block.experts.down_proj, *block.curvature.parameters()):
            tensor.fill_(torch.nan)
    assert (model(tokens[:, :2]).logits - expected[:, :2]).abs().max() < CLOSE  # the base alone: none is read


@over_families
@over_bases
@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_reach_every_part(soft_model, family, fields, rank):
    model, tokens = soft_model(family, rank=rank, **fields).train(), ids(2, 13)
    model(tokens, labels=tokens).loss.backward()
    found = [name for name, _ in model.named_parameters() if ".curvature." in name]
    assert len(found) == len(NAMES) * len(blocks(model)) > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@over_families
@over_bases
def test_gradients_of_factors_equal_small_steps(soft_model, family, fields):
    """Of a block's output, in float64; a whole model takes its norms in float32."""
    model = soft_model(family, torch.float64, rank=2, **fields)
    draw, block = torch.Generator().manual_seed(4), blocks(model)[-1]
    x, weight = (torch.randn(1, 10, HIDDEN, generator=draw, dtype=torch.float64) for _ in range(2))
    layout = model.model._lay_out(soft.soft_choice(model.config.namex), ids(1, 10), None, None, None)

    def objective() -> torch.Tensor:
        return (block(x, None, layout, None) * weight).sum()

    objective().backward()
    with torch.no_grad():
        for name, factor in block.curvature.named_parameters():
            place, ends = torch.unravel_index(factor.grad.abs().argmax(), factor.shape), []
            for step in (1e-5, -2e-5):
                factor[place] += step
                ends.append(objective().item())
            factor[place] += 1e-5
            assert factor.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6), name


@over_families
def test_every_parameter_gets_a_gradient_in_one_segment(soft_model, family):
    """Zeros, not None: data-parallel training waits for every parameter."""
    model, tokens = soft_model(family, rank=2, **BENT).train(), ids(1, 3)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@over_families
@over_bases
def test_gradient_checkpointing_gives_the_same_gradients(soft_model, family, fields):
    gradients, tokens = [], ids(2, 13)
    for checkpointing in (False, True):
        model = soft_model(family, **fields).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, output_router_logits=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@torch.no_grad()
@over_families
@over_bases
def test_cached_and_causal(soft_model, family, fields):
    model, tokens = soft_model(family, rank=2, **fields), ids(2, 19)
    expected = model(tokens, use_cache=False).logits
    for sizes in ((6, 1), (3, 5, 2)):
        cache, parts, start = DynamicCache(config=model.config), [], 0
        while start < 19:
            stop = start + sizes[min(len(parts), len(sizes) - 1)]
            parts.append(model(tokens[:, start:stop], past_key_values=cache).logits)
            start = stop
        assert (torch.cat(parts, 1) - expected).abs().max() < CLOSE
    for place in (3, 4, 9, 18):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 7) % 58 + 3
        after = model(changed).logits
        assert (expected[:, :place] - after[:, :place]).abs().max() < 1e-5
        assert (expected[:, place] - after[:, place]).abs().max() > 1e-2


@torch.no_grad()
@over_families
@over_bases
def test_chunks_of_groups_give_the_same(soft_model, family, fields, monkeypatch):
    model, tokens = soft_model(family, rank=2, **fields), ids(2, 14)
    expected, merge, made = model(tokens).logits, soft.merge_curved, []
    monkeypatch.setattr(soft, "merge_curved", lambda *a: made.append(len(a[0])) or merge(*a))
    monkeypatch.setattr(soft, "LARGEST", 1)
    assert (model(tokens).logits - expected).abs().max() < CLOSE
    assert set(made) == {1}
    assert len(made) == 2 * 8 * len(blocks(model))


@over_families
@over_bases
@pytest.mark.parametrize("grad", [True, False])
def test_bfloat16_and_autocast(soft_model, family, fields, grad):
    tokens, model = ids(2, 13), soft_model(family, rank=2, **fields)
    expected = model(tokens).logits.detach()
    half = soft_model(family, dtype=torch.bfloat16, rank=2, **fields)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.set_grad_enabled(grad):
        assert (half(tokens).logits.float() - expected).norm() < 0.05 * expected.norm()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(tokens, labels=tokens)
        assert (output.logits - expected).norm() < 0.05 * expected.norm()
    if grad:
        output.loss.backward()
        for block in blocks(model):
            for name, parameter in block.curvature.named_parameters():
                assert parameter.grad.dtype == torch.float32
                assert torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
@over_families
@over_bases
def test_weights_that_are_off_the_device(soft_model, family, fields):
    accelerate = pytest.importorskip("accelerate")
    model, tokens = soft_model(family, rank=2, **fields), ids(2, 13)
    expected = model(tokens).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in blocks(model)[0].curvature.parameters())
    assert (model(tokens).logits - expected).abs().max() < CLOSE


# --- configuration, files, conversion ---------------------------------------------------------------------------------


@over_families
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank": 0}, r"namex\.rank is 0; accepted: a whole number from 1"),
        ({"rank": True}, r"namex\.rank is True"),
        ({"rank": 1.5}, r"namex\.rank is 1\.5"),
        ({"curvature": "Kronecker"}, r"namex\.curvature is 'Kronecker'; accepted: identity, calibrated, kronecker"),
        ({"eta": 0.5, "method": "smear"}, r"namex\.eta is 0\.5; .*accepted: 1"),
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(soft_model, hub_folder, family, fields, says):
    namex = {"merge": "soft", **BENT, **fields}
    with pytest.raises(ValueError, match=says):
        PATCHED[family](namex=namex)
    with pytest.raises(ValueError, match=says):
        soft_model(family, **(BENT | fields))
    live = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32)
    with pytest.raises(ValueError, match=says):
        patch_classes(live, namex)
    assert not any("curvature" in name for name, _ in live.named_parameters())


def test_ranks_by_default():
    for fields, rank in (({}, 1), ({"rank": None}, 1), ({"rank": 3}, 3), ({"eta": 1.7}, 1), ({"eta": -0.5}, 1)):
        assert soft.soft_choice(PATCHED["deepseek"](namex={"merge": "soft", **BENT, **fields}).namex).rank == rank


@over_families
@over_bases
@pytest.mark.parametrize("rank", [1, 2])
def test_round_trip_keeps_the_names(soft_model, tmp_path, family, fields, rank):
    model, tokens = soft_model(family, rank=rank, **fields), ids(1, 13)
    model.save_pretrained(tmp_path)
    stored, layers = load_file(tmp_path / "model.safetensors"), [1, 2] if family == "deepseek" else [0, 1, 2]
    names = {f"model.layers.{layer}.mlp.curvature.{name}" for layer in layers for name in NAMES}
    assert {name for name in stored if "curvature" in name} == names
    again, info = load_patched(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    held = again.state_dict()
    assert held.keys() == model.state_dict().keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in model.state_dict().items())
    assert [(n, type(m)) for n, m in again.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert all(p.requires_grad for p in again.parameters())
    assert (again.eval()(tokens).logits - model(tokens).logits).abs().max() < 1e-5
    half = load_patched(tmp_path, dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16()), name


def poisoned() -> None:
    """Fill freed memory, so that a tensor that is left as it was found does not pass for zeros."""
    junk = [torch.full((size,), 1e30) for size in (64, 128, 512, 4096) for _ in range(200)]
    del junk


@over_families
@pytest.mark.parametrize("rank", [1, 2])
def test_what_no_file_holds_becomes_the_identity(soft_model, tmp_path, family, rank):
    """Not memory as it was found; and what a file does hold stays."""
    model, tokens = soft_model(family, rank=rank, **BENT), ids(1, 9)
    plain = soft_model(family)(tokens).logits
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    kept = {name for name in stored if ".2.mlp.curvature." in name and name.endswith("right_outer")}
    assert len(kept) == 3
    bare = {name: tensor for name, tensor in stored.items() if ".curvature." not in name}
    for held in (kept, set()):
        some = bare | {name: stored[name] for name in held}
        save_file(some, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"tensors are in no file, the first is .*\.curvature\."):
            load_patched(tmp_path)
        poisoned()
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        poisoned()
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
        for one, stays in ((found, held), (fresh, set())):
            seen = {name: tensor for name, tensor in one.state_dict().items() if ".curvature." in name}
            assert len(seen) == len(NAMES) * len(blocks(model))
            for name, tensor in seen.items():
                if name in stays:
                    assert torch.equal(tensor, stored[name]), name
                    continue
                assert torch.equal(tensor[:, 0], torch.eye(tensor.shape[-1]).expand_as(tensor[:, 0])), name
                rest = tensor[:, 1:]
                assert not rest.any() if name.endswith("right_inner") else rest.abs().max() < 6 if rank > 1 else True
    assert (found(tokens).logits - plain).abs().max() < 1e-5


@over_families
@over_bases
def test_a_live_model_is_converted(hub_folder, soft_model, family, fields):
    live = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.bfloat16).eval()
    namex = {"merge": "soft", "segment": SEGMENT, "rank": 2, **fields}
    patch_classes(live, namex)
    for block in blocks(live):
        assert not block.curvature.training
        tensors = block.curvature.state_dict(keep_vars=True).values()
        assert {(t.dtype, t.requires_grad) for t in tensors} == {(torch.bfloat16, True)}
        for factors, (rows, columns) in of_sizes(block.curvature):
            tau = torch.randn(EXPERTS, rows, columns).bfloat16()
            assert torch.equal(curved(tau, factors), tau)
    expected = soft_model(family, rank=2, **fields)
    assert [(n, type(m)) for n, m in live.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    live.float().load_state_dict(expected.state_dict())
    for parameter in live.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(live(ids(2, 13)).logits, expected(ids(2, 13)).logits)
    assert json.loads(live.config.to_json_string())["namex"] == namex


# --- adapters ---------------------------------------------------------------------------------------------------------

EXPERTS_TOO = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@over_families
@over_bases
@pytest.mark.parametrize(
    "targets",
    [EXPERTS_TOO, {**EXPERTS_TOO, "modules_to_save": ["curvature"]}],
    ids=["experts", "experts-and-curvature"],
)
def test_adapters_train_and_come_back(soft_model, tmp_path, family, fields, targets):
    peft = pytest.importorskip("peft")
    fields = {**fields, "rank": 2}
    tokens, model = ids(2, 9), soft_model(family, **fields)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, **targets))
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    whole = [name for name in trained if ".curvature." in name]
    assert len(whole) == (len(NAMES) * len(blocks(model)) if "modules_to_save" in targets else 0)
    before = {name: p.detach().clone() for name, p in trained.items()}
    step, losses = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0), []
    for _ in range(5):
        output = wrapped(input_ids=tokens, labels=tokens, output_router_logits=True)
        assert len(output.router_logits) == len(blocks(model))
        losses.append(output.loss.item())
        step.zero_grad()
        output.loss.backward()
        step.step()
    assert losses[-1] < losses[0] - 1e-3
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    with torch.no_grad():
        expected = wrapped(input_ids=tokens).logits
        plain = soft_model(family, **fields)
        assert (plain(tokens).logits - expected).abs().max() > 1e-3
        wrapped.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(plain, tmp_path)
        assert (again(input_ids=tokens).logits - expected).abs().max() < 1e-5
        merged = again.merge_and_unload()
        assert (merged(tokens).logits - expected).abs().max() < 1e-4
        assert (torch.stack([logits64(merged, row, 1.0) for row in tokens]) - expected).abs().max() < 1e-4


@over_families
def test_adapters_on_the_base_expert(soft_model, family):
    """M_i acts on E_i - E_m as the adapter leaves E_m."""
    peft = pytest.importorskip("peft")
    tokens, model = ids(2, 9), soft_model(family, **BENT)
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=r".*base_expert\.(gate|up|down)_proj")
    plain, wrapped = model(tokens).logits, peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    logits = wrapped(tokens).logits
    assert (logits - plain).abs().max() > 1e-2
    merged = wrapped.merge_and_unload()
    assert (torch.stack([logits64(merged, row, 1.0) for row in tokens]) - logits).abs().max() < 1e-4
