"""``merge: soft`` in both families: against plain loops from the definition, causal, padded, packed, trained."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline

from namex_hf.models import PATCHED, load_patched, soft
from namex_hf.models.convert import patch_classes

FAMILIES = ["qwen2_moe", "deepseek"]
pytestmark = pytest.mark.parametrize("family", FAMILIES)
SPANS = ["all", "previous", "prompt"]
SEGMENT = 4
CURVED = {"curvature": "calibrated", "rank": 2, "eta": 0.9}
over_curvatures = pytest.mark.parametrize("fields", [{}, CURVED], ids=["identity", "curved"])
over_fields = pytest.mark.parametrize(
    "fields", [*({"routing_span": span} for span in SPANS), CURVED], ids=[*SPANS, "curved"]
)


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def soft_blocks(model):
    return [m for m in model.modules() if isinstance(m, soft.SoftRouting)]


# --- the definition in loops, float64 ---------------------------------------------------------------------------------


def is_source(before: int, token: int, segment: int, span: str, prompt: int) -> bool:
    """Whether the routing of token `before` counts for the merged expert of `token`; positions in one document."""
    if span == "prompt" and token >= prompt:
        return before < prompt
    own, other = token // segment, before // segment
    return other == own - 1 if span == "previous" else other < own


def routing(tensors, name: str, x: torch.Tensor, top_k: int) -> torch.Tensor:
    p = (tensors[f"{name}.gate.weight"] @ x).softmax(-1)
    chosen = sorted(range(len(p)), key=lambda i: -p[i].item())[:top_k]
    return torch.stack([p[i] if i in chosen else 0 * p[i] for i in range(len(p))])


def swiglu(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    inner = gate @ x
    return down @ (inner * inner.sigmoid() * (up @ x))


def matrices(tensors, name: str) -> list[torch.Tensor]:
    return [tensors[f"{name}.{p}_proj.weight"] for p in ("gate", "up", "down")]


def merged_by_hand(tensors, name: str, s: torch.Tensor, eta: float) -> list[torch.Tensor]:
    """E_m + eta sum_i s_i (E_i - E_m), expert by expert."""
    base = matrices(tensors, f"{name}.base_expert")
    merged = list(base)
    for i in range(len(s)):
        for place, matrix in enumerate(matrices(tensors, f"{name}.experts.{i}")):
            merged[place] = merged[place] + eta * s[i] * (matrix - base[place])
    return merged


def block_by_hand(family, tensors, name, x, *, eta=1.0, segment=SEGMENT, top_k=3, span="all", prompt=10**9):
    """One document, token by token, ``[tokens, hidden] -> [tokens, hidden]``."""
    routed = [routing(tensors, name, t, top_k) for t in x]
    rows = []
    for token, t in enumerate(x):
        sources = [r for before, r in enumerate(routed) if is_source(before, token, segment, span, prompt)]
        s = sum(sources) / len(sources) if sources else torch.zeros_like(routed[0])
        y = swiglu(*merged_by_hand(tensors, name, s, eta), t)
        if family == "deepseek":
            y = y + swiglu(*matrices(tensors, f"{name}.shared_experts"), t)
        else:
            gate = (tensors[f"{name}.shared_expert_gate.weight"] @ t).sigmoid()
            y = y + gate * swiglu(*matrices(tensors, f"{name}.shared_expert"), t)
        rows.append(y)
    return torch.stack(rows)


def logits_by_hand(model, family, tensors, tokens: torch.Tensor, **how) -> torch.Tensor:
    """One unpadded document; attention and norms are the float64 `model`'s own, the experts are the loops above."""
    inner = model.model
    hidden = inner.embed_tokens(tokens[None])
    positions = torch.arange(len(tokens))[None]
    cos_sin = inner.rotary_emb(hidden, positions)
    mask = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for number, layer in enumerate(inner.layers):
        normed = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attn(normed, position_embeddings=cos_sin, attention_mask=mask)[0]
        normed = layer.post_attention_layernorm(hidden)
        if hasattr(layer.mlp, "base_expert"):
            out = block_by_hand(family, tensors, f"model.layers.{number}.mlp", normed[0], **how)[None]
        else:
            out = layer.mlp(normed)
        hidden = hidden + out
    return model.lm_head(inner.norm(hidden))[0]


@pytest.fixture
def reference(patched_folder, soft_model):
    """``reference("qwen2_moe", tokens, span="all", ...)`` in float64; ``prompt`` is the length of the first pass."""

    def make(family: str, tokens: torch.Tensor, **how) -> torch.Tensor:
        stored = load_file(patched_folder(family) / "model.safetensors")
        tensors = {name: t.double() for name, t in stored.items()}
        model = soft_model(family, dtype=torch.float64)
        with torch.no_grad():
            return logits_by_hand(model, family, tensors, tokens, **how)

    return make


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("eta", "segment", "length", "top_k"), [(1.0, 4, 18, None), (0.6, 4, 13, 5), (1.7, 5, 5, 1)])
def test_logits_equal_the_definition(soft_model, reference, family, span, eta, segment, length, top_k):
    tokens = ids(2, length)
    model = soft_model(family, eta=eta, segment=segment, top_k=top_k, routing_span=span)
    how = {"eta": eta, "segment": segment, "top_k": top_k or 3, "span": span}
    expected = torch.stack([reference(family, row, **how) for row in tokens])
    for grad in (True, False):  # without gradients only the experts in use may be read
        with torch.set_grad_enabled(grad):
            assert (model(tokens).logits - expected).abs().max() < 2e-5
    other = reference(family, tokens[0], **(how | {"span": "previous" if span == "all" else "all"}))
    if length > 2 * segment and span != "prompt":
        assert (other - expected[0]).abs().max() > 1e-2  # the spans differ where there are three segments


def test_fields_have_an_effect(soft_model, family):
    tokens = ids(1, 13)
    plain = soft_model(family)(tokens).logits
    for fields in ({"eta": 0.5}, {"segment": 5}, {"top_k": 2}, {"routing_span": "previous"}):
        changed = soft_model(family, **fields)(tokens).logits
        assert (changed - plain).abs().max() > 1e-3, fields
        assert torch.allclose(changed[:, :4], plain[:, :4], atol=1e-5), fields  # the first segment is the base's


def test_defaults(soft_model, family):
    model = soft_model(family)
    weights = model.state_dict()
    model.config.namex = {"merge": "soft", "routing_span": "all"}
    for block in soft_blocks(model):
        block.add_parts(model.config)
    model.load_state_dict(weights)
    for block in soft_blocks(model):
        assert (block.eta, block.gate.top_k) == (1.0, 3)
    tokens = ids(1, 70)
    first = soft_model(family, segment=64, routing_span="all")(tokens).logits
    assert torch.equal(model(tokens).logits, first)


def test_base_cancels_where_all_mass_is_routed(soft_model, family):
    x, layout = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(3)), None
    for top_k, cancels in ((8, True), (3, False)):
        model = soft_model(family, top_k=top_k)
        layout = model.model._lay_out(soft.soft_choice(model.config.namex), ids(1, 11), None, None, None)
        block = soft_blocks(model)[0]
        before = block(x, None, layout, None)
        for parameter in block.base_expert.parameters():
            torch.nn.init.normal_(parameter)
        change = (block(x, None, layout, None) - before).abs()
        assert change[:, :4].max() > 0.1
        assert (change[:, 4:].max() < 1e-5) == cancels


@over_fields
def test_future_tokens_leave_the_past_alone(soft_model, family, fields):
    model, tokens = soft_model(family, **fields), ids(2, 19)
    before = model(tokens).logits
    for place in range(19):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 7) % 58 + 3
        after = model(changed).logits
        if place:
            assert (before[:, :place] - after[:, :place]).abs().max() < 1e-6
        assert (before[:, place] - after[:, place]).abs().max() > 1e-2


def test_a_token_changes_no_expert_of_its_own_segment(soft_model, family):
    """Attention carries a change to the tokens that follow; the merged expert must not, within the segment."""
    model = soft_model(family)
    layout = model.model._lay_out(soft.soft_choice(model.config.namex), ids(1, 12), None, None, None)
    block = soft_blocks(model)[0]
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    changed[:, 5] += 1
    moved = (block(x, None, layout, None) - block(changed, None, layout, None)).abs().amax(-1)[0] > 1e-4
    assert moved.tolist() == [False] * 5 + [True, False, False] + [True] * 4


@over_fields
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["given", "none"])
def test_padding_changes_nothing(soft_model, family, fields, side, positions):
    model, lengths, width = soft_model(family, **fields), (14, 9, 3), 17
    rows = [ids(1, length, seed=length)[0] for length in lengths]
    tokens, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[number, place], mask[number, place] = row, 1
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0) if positions == "given" else None
    logits = model(tokens, attention_mask=mask, position_ids=position_ids).logits
    for number, row in enumerate(rows):
        assert (logits[number][mask[number] == 1] - model(row[None]).logits[0]).abs().max() < 2e-5


@over_fields
def test_packed_documents_stay_apart(soft_model, family, fields):
    model, rows = soft_model(family, **fields), [ids(1, n, seed=n) for n in (7, 1, 12, 4)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(row).logits for row in rows], 1)
    assert (packed - alone).abs().max() < 2e-5


def test_nothing_but_padding_is_finite(soft_model, family):
    tokens, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    model = soft_model(family)
    logits = model(tokens, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    assert (logits[0] - model(tokens[:1]).logits[0]).abs().max() < 2e-5
    assert torch.isfinite(model(tokens[1:], attention_mask=mask[1:]).logits).all()


# --- how it is computed -----------------------------------------------------------------------------------------------


@over_curvatures
@pytest.mark.parametrize("most", [1, 2])
def test_chunks_of_groups_give_the_same(soft_model, family, monkeypatch, fields, most):
    """In passes that make experts, carry them on, and do both: the same output, and the same experts kept."""
    model, rows = soft_model(family, **fields), [ids(1, n, seed=n)[0] for n in (20, 15, 6)]
    tokens, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for number, row in enumerate(rows):
        tokens[number, 20 - len(row) :], mask[number, 20 - len(row) :] = row, 1
    uncached = model(tokens, attention_mask=mask, use_cache=False).logits[mask == 1]
    merge, chunks = soft.merge_curved, []
    monkeypatch.setattr(soft, "merge_curved", lambda *a: chunks.append(len(a[0])) or merge(*a))

    def passes():
        """Logits and kept experts of every pass, and how many groups were made at once."""
        cache, found = DynamicCache(config=model.config), []
        for start, stop in ((0, 9), (9, 11), (11, 15), (15, 20)):
            chunks.clear()
            logits = model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
            found.append((logits, [m.merged for m in cache.memories.values() if m.merged is not None], list(chunks)))
        return found

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            whole = passes()
            size = 3 * 32 * 16 * 4
            if fields:  # twice, and three times the neurons by all directions in float32, for gate and for up
                size = 2 * size + 3 * 4 * (2 * 16) * (8 * 2)
            with monkeypatch.context() as patch:
                patch.setattr(soft, "LARGEST", 1 if most == 1 else most * size + size // 2)
                parts = passes()
        assert [len(set(made)) for _, _, made in whole] == [1] * 4
        assert (torch.cat([logits for logits, _, _ in parts], 1)[mask == 1] - uncached).abs().max() < 2e-5
        for (logits, kept, made), (expected, wanted, groups) in zip(parts, whole, strict=True):
            assert (logits - expected).abs().max() < 2e-5
            steps = [range(0, count, most) for count in groups[::2]]  # gate and up in one, then down
            assert made == [n for step in steps for start in step for n in [min(most, step.stop - start)] * 2]
            assert len(kept) == len(wanted) == len(soft_blocks(model))
            for three, all_three in zip(kept, wanted, strict=True):
                assert [t.shape for t in three] == [t.shape for t in all_three]
                assert all((one - other).abs().max() < 1e-5 for one, other in zip(three, all_three, strict=True))
        assert max(max(made) for _, _, made in whole) > 2


@torch.no_grad()
@over_curvatures
def test_only_experts_in_use_are_read(soft_model, family, fields):
    model, tokens = soft_model(family, top_k=1, segment=2, routing_span="previous", **fields), ids(1, 4)
    with torch.enable_grad():  # all of them are
        expected, seen = model(tokens).logits.detach(), []
    for block in soft_blocks(model):
        block.gate.register_forward_hook(lambda _m, _a, out: seen.append(out[2][:2].unique().tolist()))
    model(tokens)
    for block, used in zip(soft_blocks(model), seen, strict=True):
        unused = [i for i in range(8) if i not in used]  # two tokens before the second segment choose one expert each
        assert len(unused) >= 6
        block.experts.gate_up_proj[unused] = torch.nan
        block.experts.down_proj[unused] = torch.nan
    assert (model(tokens).logits - expected).abs().max() < 2e-5
    for block in soft_blocks(model):
        block.experts.gate_up_proj.fill_(torch.nan)
    assert (model(tokens[:, :2]).logits - expected[:, :2]).abs().max() < 2e-5  # the base alone: none is read


def test_experts_are_read_once_a_pass(soft_model, family, monkeypatch):
    """One product over the expert axis for all segments of the batch, whatever their number."""
    calls = []
    merge = soft.merge_experts
    monkeypatch.setattr(soft, "merge_experts", lambda *a: calls.append(a[0].shape) or merge(*a))
    model = soft_model(family)
    model(ids(3, 18))
    assert len(calls) == 2 * len(soft_blocks(model))  # gate and up in one
    assert set(calls) == {(15, 8)}  # three rows of five segments


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", ["all", "previous"])
def test_gradients_equal_the_definition(soft_model, patched_folder, family, span):
    tokens, weights = ids(1, 11)[0], torch.randn(11, 61, generator=torch.Generator().manual_seed(4))
    model = soft_model(family, eta=0.8, routing_span=span)
    (model(tokens[None]).logits[0] * weights).sum().backward()
    tensors = {n: t.double() for n, t in load_file(patched_folder(family) / "model.safetensors").items()}
    moe = {n: t.requires_grad_() for n, t in tensors.items() if ".mlp.gate." in n or "expert" in n}
    exact = soft_model(family, dtype=torch.float64)
    (logits_by_hand(exact, family, tensors, tokens, eta=0.8, span=span) * weights).sum().backward()
    actual, moved = dict(model.named_parameters()), []
    for name, tensor in moe.items():
        if name in actual:
            found = actual[name].grad
        else:
            prefix, rest = name.split(".experts.")
            number, projection = int(rest.split(".")[0]), rest.split(".")[1]
            fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
            found = actual[f"{prefix}.experts.{fused}"].grad[number]
            if projection != "down_proj":
                found = found[:16] if projection == "gate_proj" else found[16:]
        assert (found - tensor.grad).abs().max() < 1e-4 * max(1.0, float(tensor.grad.abs().max())), name
        if tensor.grad.abs().max() > 1e-3:
            moved.append(name)
    assert len(moved) > 0.8 * len(moe)  # an expert that no token chose has none
    assert {n for n in moe if "base_expert" in n or ".gate." in n} <= set(moved)


def test_gradients_reach_every_part(soft_model, family):
    model, tokens = soft_model(family).train(), ids(2, 13)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_every_parameter_gets_a_gradient_in_one_segment(soft_model, family):
    """Zeros, not None: data-parallel training waits for every parameter."""
    model, tokens = soft_model(family).train(), ids(1, 3)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@over_curvatures
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(soft_model, family, reentrant, fields):
    gradients, tokens = [], ids(2, 13)
    for checkpointing in (False, True):
        model = soft_model(family, **fields).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        # what is recorded in a reentrant checkpoint has no gradient, in stock models neither
        model(tokens, labels=tokens, output_router_logits=not reentrant).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_training_keeps_no_experts_in_the_cache(soft_model, family):
    model, tokens = soft_model(family), ids(1, 13)
    expected = model(tokens).logits
    model.train()
    first = model(tokens[:, :6], use_cache=True)
    merged = [m.merged for m in first.past_key_values.memories.values()]
    assert all(t.numel() == 0 for pair in merged for t in pair)
    last = model(tokens[:, 6:], past_key_values=first.past_key_values)
    assert (torch.cat([first.logits, last.logits], 1) - expected).abs().max() < 2e-5


def test_auxiliary_loss_is_the_familys_own(soft_model, patched_folder, family):
    """The routers see other hidden states than under residual, save in the first MoE layer; the loss is made alike."""
    tokens = ids(2, 13)
    model = soft_model(family, top_k=2)
    output = model(tokens, labels=tokens, output_router_logits=True)
    residual = load_patched(patched_folder(family), dtype=torch.float32)(tokens, output_router_logits=True)
    assert len(output.router_logits) == len(residual.router_logits) == len(soft_blocks(model))
    assert torch.allclose(output.router_logits[0], residual.router_logits[0], atol=1e-5)
    probabilities = [x.softmax(-1) for x in output.router_logits]
    if family == "qwen2_moe":
        p = torch.cat(probabilities)
        slots = torch.zeros_like(p).scatter(1, p.topk(3).indices, 1.0)
        expected = 8 * (slots.mean(0) * p.mean(0)).sum()
    else:
        expected = 0
        for p in probabilities:
            p = p.view(2, 13, 8)
            slots = torch.zeros_like(p).scatter(2, p.topk(3).indices, 1.0)
            expected = expected + (8 / 3 * slots.mean(1) * p.mean(1)).sum(-1).mean()
    assert output.aux_loss.item() == pytest.approx(expected.item(), rel=1e-4)
    plain = model(tokens, labels=tokens).loss
    coefficient = model.config.router_aux_loss_coef
    assert (output.loss - plain).item() == pytest.approx(coefficient * output.aux_loss.item(), rel=1e-3)


@over_curvatures
def test_autocast_averages_in_float32(soft_model, family, fields):
    model, tokens = soft_model(family, **fields), ids(1, 13)
    expected, seen = model(tokens).logits, []
    for block in soft_blocks(model):
        block.experts.register_forward_pre_hook(lambda _m, a: seen.append(a[1]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits
    assert {s.dtype for s in seen} == {torch.float32}
    assert (logits - expected).norm() < 0.05 * expected.norm()


@over_curvatures
def test_bfloat16(soft_model, family, fields):
    tokens = ids(2, 13)
    expected = soft_model(family, **fields)(tokens).logits
    half = soft_model(family, dtype=torch.bfloat16, **fields)
    with torch.no_grad():
        difference = half(tokens).logits.float() - expected
    assert difference.norm() < 0.05 * expected.norm()


def adapted(model, **targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, **targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


@pytest.mark.parametrize(
    "targets",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]},
        {"target_modules": r".*base_expert\.(gate|up|down)_proj"},
    ],
    ids=["experts", "base"],
)
def test_adapters_are_seen(soft_model, family, targets):
    pytest.importorskip("peft")
    tokens = ids(2, 13)
    plain = soft_model(family)(tokens).logits
    wrapped = adapted(soft_model(family), **targets)
    logits = wrapped(tokens).logits
    assert (logits - plain).abs().max() > 1e-2
    wrapped(tokens, labels=tokens).loss.backward()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    cached, uncached = (
        wrapped.generate(input_ids=tokens, attention_mask=mask, use_cache=c, **greedy) for c in (True, False)
    )
    assert torch.equal(cached, uncached)
    merged = wrapped.merge_and_unload()
    assert (merged(tokens).logits - logits).abs().max() < 1e-4


@torch.no_grad()
@over_curvatures
def test_weights_that_are_off_the_device(soft_model, family, fields):
    accelerate = pytest.importorskip("accelerate")
    model, tokens = soft_model(family, **fields), ids(2, 13)
    expected = model(tokens).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert soft_blocks(model)[0].base_expert.up_proj.weight.is_meta
    first = model(tokens[:, :6], use_cache=True)
    last = model(tokens[:, 6:], past_key_values=first.past_key_values)
    assert (torch.cat([first.logits, last.logits], 1) - expected).abs().max() < 2e-5


# --- configuration, files, conversion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eta", "1"),
        ("eta", float("nan")),
        ("eta", True),
        ("segment", 0),
        ("segment", 4.0),
        ("top_k", 0),
        ("top_k", 9),
        ("top_k", "3"),
        ("routing_span", "next"),
    ],
)
def test_fields_out_of_range_are_refused(soft_model, family, field, value):
    sizes = {"n_routed_experts" if family == "deepseek" else "num_experts": 8}
    with pytest.raises(ValueError, match=rf"namex\.{field}"):
        PATCHED[family](namex={"merge": "soft", field: value}, **sizes)
    with pytest.raises(ValueError, match=rf"namex\.{field}"):
        soft_model(family, **{field: value})


def test_a_router_that_renormalises_is_read_before_it_does(soft_model, patched_folder, family):
    config = AutoConfig.from_pretrained(patched_folder(family))
    config.namex, config.norm_topk_prob = {"merge": "soft", "segment": SEGMENT}, True
    model = AutoModelForCausalLM.from_pretrained(patched_folder(family), config=config, dtype=torch.float32).eval()
    tokens = ids(1, 13)
    assert (model(tokens).logits - soft_model(family)(tokens).logits).abs().max() < 1e-5


def test_round_trip_keeps_the_names(soft_model, patched_folder, tmp_path, family):
    model, tokens = soft_model(family, eta=0.5), ids(1, 13)
    model.save_pretrained(tmp_path)
    before = load_file(patched_folder(family) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["namex"] == model.config.namex
    assert {p.name for p in tmp_path.glob("*.py")} == {p.name for p in patched_folder(family).glob("*.py")}
    again = load_patched(tmp_path, dtype=torch.float32).eval()
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert (again(tokens).logits - model(tokens).logits).abs().max() < 1e-5


def test_new_experts_are_initialised(hub_folder, family):
    fields = json.loads((hub_folder(family) / "config.json").read_text())
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "auto_map")}
    config = PATCHED[family](**fields, namex={"merge": "soft"})
    model = AutoModelForCausalLM.from_pretrained(hub_folder(family), config=config, dtype=torch.float32)
    for block in soft_blocks(model):
        for parameter in block.base_expert.parameters():
            assert 0.01 < parameter.std() < 0.04  # initializer_range is 0.02: not left as uninitialised memory
    assert len(soft_blocks(model)) == (3 if family == "qwen2_moe" else 2)
    scratch = AutoModelForCausalLM.from_config(config)
    assert 0.01 < soft_blocks(scratch)[0].experts.gate_up_proj.std() < 0.04


def test_a_live_model_is_converted(hub_folder, patched_folder, soft_model, family):
    model = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32).eval()
    namex = {"merge": "soft", "segment": SEGMENT, "eta": 0.5, "top_k": 2}
    patch_classes(model, namex)
    stored = load_file(patched_folder(family) / "model.safetensors")
    bases = {name: tensor for name, tensor in stored.items() if ".base_expert." in name}
    assert not model.load_state_dict(bases, strict=False).unexpected_keys
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    expected, tokens = soft_model(family, eta=0.5, top_k=2), ids(2, 13)
    assert model.config.namex == namex
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    outputs = [m(tokens, labels=tokens, output_router_logits=True) for m in (model, expected)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_conversion_refuses_before_it_changes_anything(hub_folder, family):
    model = AutoModelForCausalLM.from_pretrained(hub_folder(family), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"namex\.top_k"):
        patch_classes(model, {"merge": "soft", "top_k": 99})
    assert not any("base_expert" in name for name, _ in model.named_parameters())
    assert not hasattr(model.config, "namex")


def test_hidden_states_and_attentions_are_recorded(soft_model, family):
    model = soft_model(family)
    model.set_attn_implementation("eager")
    output = model(ids(2, 11), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 11, 11)] * 3


def test_embeddings_instead_of_ids(soft_model, family):
    model, tokens = soft_model(family), ids(2, 11)
    logits = model(inputs_embeds=model.model.embed_tokens(tokens)).logits
    assert torch.equal(logits, model(tokens).logits)


def test_pipeline(soft_model, tmp_path, family):
    model = soft_model(family)
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generate.model) is type(model)
    prompts = ["w5 w9 w7", "w4 w8 w9 w6 w11 w12"]
    outputs = generate(prompts, max_new_tokens=6, do_sample=False, return_tensors=True, batch_size=2)
    for prompt, [output] in zip(prompts, outputs, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        found = [token for token in output["generated_token_ids"] if token]
        assert found == [token for token in expected[0].tolist() if token]
