"""``merge: soft`` under a calibrated curvature, in both families: against c_i in full, rounded, trained, stored."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from namex_hf.errors import CheckpointError
from namex_hf.models import PATCHED, load_patched, soft
from namex_hf.models.convert import patch_classes
from namex_hf.models.soft_curvature import CalibratedCurvature, Directions
from tests.helpers.reference import curvatures, curved_mean, double

FAMILIES = ["qwen2_moe", "deepseek"]
SEGMENT, EXPERTS = 4, 8
CURVED = {"curvature": "calibrated", "rank": 2}
SMEAR = {**CURVED, "method": "smear"}
NAMES = {"usage", "input_floor", "input_directions", "neuron_floor", "neuron_directions"}
over_families = pytest.mark.parametrize("family", FAMILIES)
over_bases = pytest.mark.parametrize("fields", [CURVED, SMEAR], ids=["base", "smear"])
quick = settings(max_examples=60, deadline=None, derandomize=True)


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def blocks(model) -> list[soft.SoftRouting]:
    return [module for module in model.modules() if isinstance(module, soft.SoftRouting)]


def in_full(directions: Directions) -> np.ndarray:
    return curvatures(double(directions.floor), double(directions.leading))


# --- one matrix -------------------------------------------------------------------------------------------------------


class Case:
    """Random experts, their curvature and some segments' shares, in which `used` experts have a part."""

    def __init__(self, seed, *, experts=8, rows=24, columns=32, rank=3, groups=6, used=8, has_base=True):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        def weights(*shape):
            values = 0.1 + torch.rand(*shape, generator=draw, dtype=torch.float64)
            return values / values.sum(-1, keepdim=True)

        self.experts = normal(experts, rows, columns) / columns**0.5
        self.base = normal(rows, columns) / columns**0.5 if has_base else None
        usage, floor = weights(experts), weights(experts)
        self.directions = Directions(normal(experts, columns, rank), floor / (usage @ floor), usage)
        self.shares = torch.zeros(groups, experts, dtype=torch.float64)
        self.used = torch.randperm(experts, generator=draw)[:used].sort().values
        self.shares[:, self.used] = weights(groups, used)
        if has_base:
            self.shares *= torch.rand(groups, 1, generator=draw, dtype=torch.float64)

    def strong(self, common: bool, size: float = 1e5) -> "Case":
        """Directions of that squared length; `common`: the first of all experts is nearly the same."""
        leading = self.directions.leading
        leading = torch.linalg.qr(leading)[0]
        if common:
            leading[:, :, 0] = leading[0, :, 0] + 0.02 * torch.nn.functional.normalize(leading[:, :, 0], dim=1)
        self.directions = self.directions._replace(leading=size**0.5 * leading)
        return self

    def to(self, dtype: torch.dtype) -> "Case":
        """In another dtype; what is averaged, the shares, in float32 at least."""
        self.experts, self.directions = self.experts.to(dtype), Directions(*(t.to(dtype) for t in self.directions))
        self.base = None if self.base is None else self.base.to(dtype)
        self.shares = self.shares.to(torch.promote_types(dtype, torch.float32))
        return self

    @property
    def rest(self) -> torch.Tensor:
        return 1 - self.shares.sum(-1) if self.base is not None else torch.zeros_like(self.shares[:, 0])

    def merged(self, directions: Directions | None = None, used: torch.Tensor | None = None) -> torch.Tensor:
        experts = self.experts if used is None else self.experts[used]
        return soft.merge_curved(self.shares, self.rest, experts, self.base, used, directions)

    def wanted(self) -> np.ndarray:
        base, full = None if self.base is None else double(self.base), in_full(self.directions)
        usage = double(self.directions.usage)
        return np.stack([curved_mean(s, double(self.experts), base, full, usage) for s in double(self.shares)])

    def error(self) -> tuple[float, float]:
        """Relative, of all merged matrices, and of what they answer to inputs whose second moment is C."""
        wanted = self.wanted()
        wrong = double(self.merged(self.directions)) - wanted
        common = np.einsum("i,icd->cd", double(self.directions.usage), in_full(self.directions))
        sizes = [np.einsum("grc,cd,grd->", m, common, m) for m in (wrong, wanted)]
        return np.linalg.norm(wrong) / np.linalg.norm(wanted), (sizes[0] / sizes[1]) ** 0.5


@quick
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 6),
    rank=st.integers(1, 4),
    groups=st.integers(1, 3),
    has_base=st.booleans(),
    data=st.data(),
)
def test_merged_matrices_equal_the_definition(seed, experts, rows, columns, rank, groups, has_base, data):
    """Read in full, and of the experts in use alone."""
    used = data.draw(st.integers(1, experts))
    case = Case(
        seed, experts=experts, rows=rows, columns=columns, rank=rank, groups=groups, used=used, has_base=has_base
    )
    wanted = case.wanted()
    for some in (None, case.used, torch.arange(experts)):
        found = case.merged(case.directions, some)
        assert found.shape == (groups, rows, columns)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-11)
    case.directions = case.directions._replace(leading=2 * case.directions.leading)
    if experts > 1 and used > 1:  # one expert alone is what it is, whatever it hears
        assert np.abs(case.wanted() - wanted).max() > 1e-6


def test_no_direction_and_equal_floors_are_a_plain_merge():
    for has_base in (True, False):
        case = Case(0, has_base=has_base)
        leading, floor, usage = case.directions
        for mass in (torch.full_like(usage, 1 / len(usage)), usage):
            found = case.merged(Directions(torch.zeros_like(leading), torch.ones_like(floor), mass))
            torch.testing.assert_close(found, case.merged(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e5])
def test_without_shares_the_base_expert_is_left_as_it_is(dtype, size):
    """Bit for bit, beside a segment that has some."""
    case = Case(1, groups=3).strong(common=True, size=size).to(dtype)
    case.shares[[0, 2]] = 0
    for some in (None, torch.tensor([1, 4])):
        if some is not None:
            case.shares[1, [i for i in range(8) if i not in some]] = 0
        found = case.merged(case.directions, some)
        assert torch.equal(found[0], case.base)
        assert torch.equal(found[2], case.base)
        assert not torch.equal(found[1], case.base)
    nobody = soft.merge_curved(case.shares[:1], case.rest[:1], case.experts[:0], case.base, some[:0], case.directions)
    assert torch.equal(nobody[0], case.base)


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize(
    ("dtype", "common", "size", "most"),
    [
        (torch.float64, True, 1e5, 1e-10),
        (torch.float32, False, 1e5, 1e-5),  # measured: 3e-6
        (torch.float32, True, 1e3, 2e-4),  # 4e-5
        (torch.float32, True, 1e5, 5e-3),  # 1e-3
        (torch.bfloat16, False, 1.0, 1e-2),  # 3e-3
        (torch.bfloat16, True, 1e3, 3e-2),
    ],
    ids=str,
)
def test_strong_directions_lose_little(dtype, common, size, most, has_base):
    """Also where experts have one of them in common, as the inputs of a model have: its largest energy."""
    for seed in range(3):
        case = Case(seed, groups=12, has_base=has_base).strong(common, size).to(dtype)
        assert max(case.error()) < most


def test_strong_directions_lose_little_under_autocast():
    case = Case(0, groups=12).strong(common=True, size=1e3).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert max(case.error()) < 3e-2


@pytest.mark.parametrize("has_base", [True, False])
def test_gradients_of_a_merge(has_base):
    case = Case(2, experts=3, rows=2, columns=4, rank=2, groups=2, used=3, has_base=has_base)
    parts = [t for t in (case.shares, case.rest, case.experts, case.base) if t is not None]
    parts = [t.clone().requires_grad_() for t in parts]

    def merge(shares, rest, experts, base=None):
        return soft.merge_curved(shares, rest, experts, base, None, case.directions)

    assert torch.autograd.gradcheck(merge, parts)


# --- a whole model ----------------------------------------------------------------------------------------------------


def routing(block, token: torch.Tensor) -> torch.Tensor:
    """The router's top-k values, zeros elsewhere; without a base expert rescaled to sum 1."""
    p = (block.gate.weight @ token).softmax(-1)
    p = torch.where(p >= p.sort(descending=True).values[block.gate.top_k - 1], p, 0)
    return p if block.has_base else p / p.sum()


def routed_by_hand(block, x: torch.Tensor, eta: float) -> torch.Tensor:
    """One document, ``[tokens, hidden]``, segment by segment and matrix by matrix from the definition."""
    values = [routing(block, token) for token in x]
    held, experts = block.curvature, block.experts
    width = experts.down_proj.shape[-1]
    inputs = curvatures(double(held.input_floor), double(held.input_directions))
    neurons = curvatures(double(held.neuron_floor), double(held.neuron_directions))
    three = experts.gate_up_proj[:, :width], experts.gate_up_proj[:, width:], experts.down_proj
    base = [None] * 3
    if block.has_base:
        base = [double(getattr(block.base_expert, f"{name}_proj").weight) for name in ("gate", "up", "down")]
    rows = []
    for start in range(0, len(x), SEGMENT):
        s = torch.full((EXPERTS,), 0.0 if block.has_base else 1 / EXPERTS)
        if start:
            s = eta * sum(values[:start]) / start
        gate, up, down = (
            torch.from_numpy(curved_mean(double(s), double(matrix), own, curvature, double(held.usage)))
            for matrix, own, curvature in zip(three, base, (inputs, inputs, neurons), strict=True)
        )
        for token in x[start : start + SEGMENT]:
            inner = gate @ token
            rows.append(down @ (inner * inner.sigmoid() * (up @ token)))
    return torch.stack(rows)


@torch.no_grad()
def logits_by_hand(model, tokens: torch.Tensor, eta: float) -> torch.Tensor:
    """One document through the float64 `model`, whose routed parts are replaced by the loops above."""
    for block in blocks(model):
        block.routed = lambda flat, token_ids, segments, memory, block=block: routed_by_hand(block, flat, eta)
    return model(tokens[None], use_cache=False).logits[0]


@over_families
@pytest.mark.parametrize(
    "fields", [{}, {"eta": 0.6, "rank": 1}, {"top_k": 1}, {"method": "smear"}, {"method": "smear", "top_k": 2}], ids=str
)
def test_logits_equal_the_definition(soft_model, family, fields):
    tokens, fields = ids(2, 14), CURVED | fields
    model, exact = soft_model(family, **fields), soft_model(family, dtype=torch.float64, **fields)
    expected = torch.stack([logits_by_hand(exact, row, fields.get("eta", 1.0)) for row in tokens])
    for grad in (True, False):  # without gradients only the experts in use may be read
        with torch.set_grad_enabled(grad):
            assert (model(tokens).logits - expected).abs().max() < 2e-5
    plain = soft_model(family, **(fields | {"curvature": "identity"}))(tokens).logits
    assert (plain - expected).abs().max() > 1e-2


@over_families
@over_bases
def test_an_unmeasured_curvature_is_the_identity(soft_model, family, fields):
    """As a freshly built model has it."""
    tokens, model = ids(2, 13), soft_model(family, **fields)
    plain = soft_model(family, **(fields | {"curvature": "identity"}))
    assert all(block.curvature is None for block in blocks(plain))
    expected = plain(tokens).logits
    assert (model(tokens).logits - expected).abs().max() > 1e-2
    for block in blocks(model):
        block.curvature = CalibratedCurvature(EXPERTS, 32, 16, 2)
    assert (model(tokens).logits - expected).abs().max() < 1e-5


@torch.no_grad()
@over_families
def test_smear_is_cached_and_causal(soft_model, family):
    model, tokens = soft_model(family, **SMEAR), ids(2, 19)
    expected = model(tokens, use_cache=False).logits
    first = model(tokens[:, :6], use_cache=True)
    rest = [model(tokens[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(6, 19)]
    assert (torch.cat([first.logits, *rest], 1) - expected).abs().max() < 2e-5
    for place in (3, 4, 9, 18):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 7) % 58 + 3
        after = model(changed).logits
        assert (expected[:, :place] - after[:, :place]).abs().max() < 1e-6
        assert (expected[:, place] - after[:, place]).abs().max() > 1e-2


def test_without_a_base_expert_no_mass_is_left_over(soft_model):
    """Shares of float32 that miss 1 by a rounding: no part of it may go to a direction of experts that are not used."""
    block = blocks(soft_model("qwen2_moe", **SMEAR))[0]
    case = Case(4, rows=32, columns=32, groups=1, used=2, has_base=False).strong(common=False).to(torch.float32)
    case.shares[0, case.used] = torch.tensor([torch.nextafter(torch.tensor(0.75), torch.tensor(0.0)), 0.25])
    assert 0 < 1 - case.shares.sum() < 1e-7
    neurons = Directions(torch.zeros(EXPERTS, 16, 2), torch.ones(EXPERTS), torch.full((EXPERTS,), 1 / EXPERTS))
    block.experts.gate_up_proj.data = case.experts
    tokens = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    _, (gate_up, _) = block.experts(tokens, case.shares, None, curvature=(case.directions, neurons))
    wanted = case.wanted()[0]
    error = np.linalg.norm(double(gate_up[0].detach()) - wanted)
    assert error < 1e-5 * np.linalg.norm(wanted)


@over_families
@over_bases
def test_gradients_reach_every_part_but_the_curvature(soft_model, family, fields):
    model, tokens = soft_model(family, **fields).train(), ids(2, 13)
    model(tokens, labels=tokens).loss.backward()
    held = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".curvature." in name:
            held += 1
            assert not tensor.requires_grad, name
            assert tensor.grad is None, name
        else:
            assert tensor.grad is not None, name
            assert torch.isfinite(tensor.grad).all(), name
            assert tensor.grad.abs().max() > 0, name
    assert held == len(NAMES) * len(blocks(model)) > 0


# --- configuration, files, conversion ---------------------------------------------------------------------------------


@over_families
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank": 0}, r"namex\.rank is 0; accepted: a whole number from 1"),
        ({"rank": -1}, r"namex\.rank is -1"),
        ({"rank": True}, r"namex\.rank is True"),
        ({"rank": False}, r"namex\.rank is False"),
        ({"rank": "2"}, r"namex\.rank is '2'"),
        ({"rank": 2.0}, r"namex\.rank is 2\.0"),
        ({"curvature": "diagonal"}, r"namex\.curvature is 'diagonal'; accepted: identity, calibrated"),
        ({"curvature": "Calibrated"}, r"namex\.curvature is 'Calibrated'"),
        ({"curvature": True}, r"namex\.curvature is True"),
        ({"eta": 1.01}, r"namex\.eta is 1\.01; accepted with a calibrated curvature: above 0 up to 1"),
        ({"eta": -1.0}, r"namex\.eta is -1\.0; accepted with a calibrated curvature"),
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(soft_model, hub_folder, family, fields, says):
    sizes = {"n_routed_experts" if family == "deepseek" else "num_experts": 8}
    namex = {"merge": "soft", **CURVED, **fields}
    with pytest.raises(ValueError, match=says):
        PATCHED[family](namex=namex, **sizes)
    with pytest.raises(ValueError, match=says):
        soft_model(family, **(CURVED | fields))
    live = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32)
    with pytest.raises(ValueError, match=says):
        patch_classes(live, namex)
    assert not any("curvature" in name for name, _ in live.named_parameters())


@over_families
def test_a_rank_is_read_with_a_calibrated_curvature_alone(family):
    for fields in ({"eta": 1.7}, {"curvature": "identity", "eta": 1.7}, {"curvature": None}, {"rank": 3}):
        choice = soft.soft_choice(PATCHED[family](namex={"merge": "soft", **fields}).namex)
        assert choice.rank is None, fields
    assert soft.soft_choice({"merge": "soft", **CURVED, "rank": 3}).rank == 3
    assert soft.soft_choice({"merge": "residual", **CURVED}) is None


@over_families
@over_bases
def test_round_trip_keeps_the_names(soft_model, tmp_path, family, fields):
    model, tokens = soft_model(family, **fields), ids(1, 13)
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
    assert {n for n, t in again.state_dict(keep_vars=True).items() if not t.requires_grad} == names
    assert (again.eval()(tokens).logits - model(tokens).logits).abs().max() < 1e-5


@over_families
def test_what_no_file_holds_becomes_the_identity(soft_model, patched_folder, tmp_path, family):
    """Not memory as it was found; and what a file does hold stays."""
    model = soft_model(family, **CURVED)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    kept = {name for name in stored if ".2.mlp.curvature." in name and not name.endswith(("usage", "neuron_floor"))}
    assert len(kept) == 3
    some = {name: tensor for name, tensor in stored.items() if ".curvature." not in name or name in kept}
    save_file(some, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensors are in no file, the first is .*\.curvature\."):
        load_patched(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(config)
    for one, held in ((AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), kept), (fresh, set())):
        seen = {name: tensor for name, tensor in one.state_dict().items() if ".curvature." in name}
        assert len(seen) == len(NAMES) * len(blocks(model))
        for name, tensor in seen.items():
            value = 1 / EXPERTS if name.endswith("usage") else float(name.endswith("floor"))
            assert torch.equal(tensor, stored[name] if name in held else torch.full_like(tensor, value)), name


@over_families
@over_bases
def test_a_live_model_is_converted(hub_folder, soft_model, family, fields):
    live = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.bfloat16).eval()
    namex = {"merge": "soft", "segment": SEGMENT, **fields}
    patch_classes(live, namex)
    held = [block.curvature for block in blocks(live)]
    assert len(held) > 0
    for curvature in held:
        assert not curvature.training
        tensors = curvature.state_dict(keep_vars=True).values()
        assert {(t.dtype, t.requires_grad) for t in tensors} == {(torch.bfloat16, False)}
        inputs, neurons = curvature(torch.empty(0))
        assert (inputs.leading.shape, neurons.leading.shape) == ((EXPERTS, 32, 2), (EXPERTS, 16, 2))
        assert (inputs.usage == 1 / EXPERTS).all()
        assert all((d.floor == 1).all() and not d.leading.any() for d in (inputs, neurons))
    expected = soft_model(family, **fields)
    assert [(n, type(m)) for n, m in live.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    live.float().load_state_dict(expected.state_dict())
    for parameter in live.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(live(ids(2, 13)).logits, expected(ids(2, 13)).logits)
    assert json.loads(live.config.to_json_string())["namex"] == namex
