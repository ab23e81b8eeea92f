"""``merge: soft`` with a cache: as without one, at every boundary, reordered, selected, cropped, and as remote code."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from namex_hf.models import remote_code, soft, soft_cache
from namex_hf.models.arguments import Arguments
from tests.helpers.absent import child

FAMILIES = ["qwen2_moe", "deepseek"]
over_families = pytest.mark.parametrize("family", FAMILIES)
CAUSAL = ["all", "previous"]
CURVED = {"curvature": "calibrated", "rank": 2}
over_causal = pytest.mark.parametrize(
    "fields", [*({"routing_span": span} for span in CAUSAL), CURVED], ids=[*CAUSAL, "curved"]
)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SEGMENT = 4
CLOSE = 2e-5


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def in_passes(model, tokens, sizes, cache=None, **kwargs) -> torch.Tensor:
    """Logits of `tokens`, fed in passes of these sizes; the last goes on to the end."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts, start = [], 0
    while start < tokens.shape[1]:
        size = sizes[min(len(parts), len(sizes) - 1)]
        stop = min(start + size, tokens.shape[1])
        piece = {name: value[:, start:stop] for name, value in kwargs.items() if name == "position_ids"}
        if "attention_mask" in kwargs:
            piece["attention_mask"] = kwargs["attention_mask"][:, :stop]
        parts.append(model(tokens[:, start:stop], past_key_values=cache, **piece).logits)
        start = stop
    return torch.cat(parts, 1)


def padded(rows, width, side):
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[number, place], mask[number, place] = row, 1
    return tokens, mask


@over_families
@over_causal
@pytest.mark.parametrize("sizes", [(1,), (6, 1), (3, 5, 2), (4,), (13, 1)])
def test_cached_passes_equal_one(soft_model, family, fields, sizes):
    model, tokens = soft_model(family, eta=0.9, **fields), ids(2, 23)  # five boundaries
    assert (in_passes(model, tokens, sizes) - model(tokens, use_cache=False).logits).abs().max() < CLOSE


@over_families
@over_causal
@pytest.mark.parametrize("positions", ["given", "none"])
@pytest.mark.parametrize("sizes", [(9, 1), (12, 3)])
def test_cached_rows_cross_boundaries_at_their_own_time(soft_model, family, fields, positions, sizes):
    model, rows = soft_model(family, **fields), [ids(1, n, seed=n)[0] for n in (24, 21, 15)]
    tokens, mask = padded(rows, 24, "left")
    kwargs = {"attention_mask": mask}
    if positions == "given":
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    logits = in_passes(model, tokens, sizes, **kwargs)
    for number, row in enumerate(rows):
        alone = model(row[None], use_cache=False).logits[0]
        assert (logits[number][mask[number] == 1] - alone).abs().max() < CLOSE


def test_going_on_after_right_padding(soft_model):
    model, rows = soft_model("qwen2_moe"), [ids(1, n, seed=n)[0] for n in (13, 10)]
    tokens, mask = padded([rows[0][:7], rows[1][:4]], 7, "right")
    cache = DynamicCache(config=model.config)
    model(tokens, attention_mask=mask, past_key_values=cache)
    for step in range(6):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        token = torch.stack([rows[0][7 + step], rows[1][4 + step]])[:, None]
        positions = torch.tensor([[7 + step], [4 + step]])
        out = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for number, row in enumerate(rows):
            alone = model(row[None, : int(positions[number]) + 1], use_cache=False).logits[0, -1]
            assert (out[number, -1] - alone).abs().max() < CLOSE


@pytest.mark.parametrize("sizes", [(20,), (6, 1), (3, 5), (11, 4)])
def test_padding_in_the_middle(soft_model, sizes):
    """As between the turns of a conversation in a batch: a row stands still while another goes on."""
    model, rows = soft_model("qwen2_moe"), [ids(1, 20)[0], ids(1, 15, seed=5)[0]]
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 6:11] = 0
    tokens = torch.stack([rows[0], torch.cat([rows[1][:6], torch.zeros(5, dtype=torch.long), rows[1][6:]])])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = in_passes(model, tokens, sizes, attention_mask=mask, position_ids=positions)
    for number, row in enumerate(rows):
        alone = model(row[None], use_cache=False).logits[0]
        assert (logits[number][mask[number] == 1] - alone).abs().max() < CLOSE


@over_families
@over_causal
def test_generation_equals_uncached_argmax(soft_model, family, fields):
    model, tokens = soft_model(family, **fields), ids(2, 6)
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=17, **GREEDY)
    assert generated.shape == (2, 23)
    expected = model(generated, use_cache=False).logits.argmax(-1)
    assert torch.equal(generated[:, 6:], expected[:, 5:-1])
    assert len(generated[0, 6:].unique()) > 4  # not a loop that any model would give


@over_families
def test_generation_of_padded_rows(soft_model, family):
    model, rows = soft_model(family), [ids(1, n, seed=n)[0] for n in (11, 6, 2)]
    tokens, mask = padded(rows, 11, "left")
    generated = model.generate(tokens, attention_mask=mask, max_new_tokens=14, **GREEDY)
    for number, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), max_new_tokens=14, **GREEDY)
        assert torch.equal(generated[number, 11:], alone[0, len(row) :])


@over_families
def test_prompt_routes_once(soft_model, family):
    """After the first pass one expert, s the mean over all of it, as a block in loops has it."""
    model, tokens = soft_model(family, routing_span="prompt"), ids(2, 16)
    cache = DynamicCache(config=model.config)
    before = model(tokens[:, :10], past_key_values=cache).logits
    assert (before - soft_model(family)(tokens[:, :10]).logits).abs().max() < CLOSE  # the prompt itself: as under `all`
    calls, routed = [], {}
    blocks = [m for m in model.modules() if isinstance(m, soft.SoftRouting)]
    for block in blocks:
        block.experts.register_forward_pre_hook(lambda m, a: calls.append((m, a[1])))
    for place in range(10, 16):
        model(tokens[:, place : place + 1], past_key_values=cache)
    assert [module for module, _ in calls] == [block.experts for block in blocks]
    for number, (module, shares) in enumerate(calls):
        memory = [m for m in cache.memories.values() if m.index is not None][number]
        for row in range(2):
            routed = torch.zeros(8)
            for index, value in zip(memory.index[row, :10], memory.value[row, :10], strict=True):
                for i, v in zip(index.tolist(), value.tolist(), strict=True):
                    routed[i] += v / 10
            assert (shares[row] - routed).abs().max() < 1e-6, module
    other = in_passes(model, tokens, (12, 1))[:, 12:]
    assert (other - in_passes(model, tokens, (10, 1))[:, 12:]).abs().max() > 1e-3  # it does depend on the first pass


def test_prompt_generates_with_padding(soft_model):
    model, rows = soft_model("qwen2_moe", routing_span="prompt"), [ids(1, n, seed=n)[0] for n in (11, 6)]
    tokens, mask = padded(rows, 11, "left")
    generated = model.generate(tokens, attention_mask=mask, max_new_tokens=9, **GREEDY)
    for number, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), max_new_tokens=9, **GREEDY)
        assert torch.equal(generated[number, 11:], alone[0, len(row) :])


# --- what is kept -----------------------------------------------------------------------------------------------------


@over_families
def test_nothing_is_merged_again_inside_a_segment(soft_model, family):
    model, tokens, calls = soft_model(family), ids(2, 20), []
    blocks = [m for m in model.modules() if isinstance(m, soft.SoftRouting)]
    for block in blocks:
        block.experts.register_forward_pre_hook(lambda _m, a: calls.append(len(a[1])))
    cache, made = DynamicCache(config=model.config), []
    for place in (slice(0, 6), *(slice(p, p + 1) for p in range(6, 20))):
        calls.clear()
        model(tokens[:, place], past_key_values=cache)
        made.append(list(calls))
    first, boundary, inside = [4] * len(blocks), [2] * len(blocks), []
    assert made == [first] + [boundary if place % SEGMENT == 0 else inside for place in range(6, 20)]


def test_only_the_rows_that_cross_are_merged(soft_model):
    model, rows = soft_model("deepseek"), [ids(1, n, seed=n)[0] for n in (12, 10)]
    tokens, mask = padded(rows, 12, "left")
    shares = []
    for module in model.modules():
        if isinstance(module, soft.SoftExperts):
            module.register_forward_pre_hook(lambda _m, a: shares.append((len(a[1]), a[3] is not None)))
    in_passes(model, tokens, (8, 1), attention_mask=mask)
    # row 0 has a boundary at its columns 4 and 8, row 1 at 6 and 10
    assert shares == [(4, False)] * 2 + [(1, True)] * 4


def test_bytes_of_the_state(soft_model):
    model = soft_model("qwen2_moe")
    cache = model(ids(2, 9), use_cache=True).past_key_values
    top_k = 2 * 9 * 3 * (2 + 4)
    expert = 3 * 32 * 16 * 4
    assert cache.routing_bytes == 3 * (top_k + 2 * expert) + 2 * 9 * 8 + 2 * 2 * 8


# --- the cache object -------------------------------------------------------------------------------------------------


@over_families
def test_a_plain_cache_is_filled_in_place(soft_model, family):
    model, tokens = soft_model(family), ids(2, 14)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        output = model(tokens[:, :9], past_key_values=cache)
        assert output.past_key_values is cache
        assert isinstance(cache, soft_cache.SoftCache)
        last = model(tokens[:, 9:], past_key_values=cache).logits
        assert (last - model(tokens).logits[:, 9:]).abs().max() < CLOSE
    mask, cache = torch.ones(2, 14, dtype=torch.long), DynamicCache(config=model.config)
    kwargs = {"max_new_tokens": 6, **GREEDY}
    generated = model.generate(tokens, attention_mask=mask, past_key_values=cache, **kwargs)
    assert torch.equal(generated, model.generate(tokens, attention_mask=mask, use_cache=False, **kwargs))
    # and a second turn on the same cache
    turn = torch.cat([generated, ids(2, 3, seed=9)], 1)
    again = model.generate(turn, attention_mask=torch.ones_like(turn), past_key_values=cache, **kwargs)
    assert torch.equal(again, model.generate(turn, attention_mask=torch.ones_like(turn), use_cache=False, **kwargs))


def test_caches_that_cannot_be_right_are_refused(soft_model, hub_folder):
    model, tokens = soft_model("qwen2_moe"), ids(1, 6)
    stock = AutoModelForCausalLM.from_pretrained(hub_folder("qwen2_moe"), dtype=torch.float32)
    filled = stock(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 6 tokens that no model with merge 'soft' has routed"):
        model(tokens, past_key_values=filled)
    with pytest.raises(TypeError, match=r"StaticCache.*DynamicCache"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(TypeError, match=r"StaticCache.*DynamicCache"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2, **GREEDY)
    ours = model(tokens, use_cache=True).past_key_values
    for layer in ours.layers:
        layer.crop(-2)  # behind the cache's back
    with pytest.raises(ValueError, match="keys of 4 tokens and the routing of 6"):
        model(tokens, past_key_values=ours)


def test_a_pass_that_breaks_off_is_noticed(soft_model):
    model, tokens = soft_model("qwen2_moe"), ids(1, 6)
    cache = model(tokens, use_cache=True).past_key_values
    hook = model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens[:, :1], past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="broke off"):
        model(tokens[:, :1], past_key_values=cache)


@over_families
def test_beam_search_scores_are_those_of_the_sequences(soft_model, family):
    model, rows = soft_model(family), [ids(1, n, seed=n)[0] for n in (7, 5)]
    tokens, mask = padded(rows, 7, "left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, "length_penalty": 0.0}
    output = model.generate(
        tokens, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **beams, **GREEDY
    )
    uncached = model.generate(tokens, attention_mask=mask, use_cache=False, **beams, **GREEDY)
    assert torch.equal(output.sequences, uncached)
    moved = output.beam_indices[:, :12]
    assert (moved[:, 1:] != moved[:, :-1]).any()  # rows were reordered on the way
    for number, sequence in enumerate(output.sequences):
        prompt = rows[number // 2]
        whole = sequence[7 - len(prompt) :]
        logits = model(whole[None], use_cache=False).logits[0].log_softmax(-1)
        score = logits[len(prompt) - 1 : -1].gather(1, whole[len(prompt) :, None]).sum()
        assert output.sequences_scores[number].item() == pytest.approx(score.item(), abs=1e-3)


def test_sampling_several_sequences(soft_model):
    model, tokens = soft_model("qwen2_moe"), ids(2, 6)
    kwargs = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
    kwargs |= {"do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    output = model.generate(tokens, **kwargs)
    logits = model(output.sequences, use_cache=False).logits[:, 5:-1]
    assert (torch.stack(output.logits, 1) - logits).abs().max() < CLOSE
    assert len(output.sequences.unique(dim=0)) > 3


@over_families
@pytest.mark.parametrize("span", [*CAUSAL, "prompt"])
def test_rows_can_be_picked_repeated_and_reordered(soft_model, family, span):
    model, tokens = soft_model(family, routing_span=span), ids(3, 24)
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    whole = in_passes(model, tokens, (6, 1))
    for name, (argument, rows) in changes.items():
        cache = model(tokens[:, :6], use_cache=True).past_key_values
        getattr(cache, name)(argument)
        logits = in_passes(model, tokens[rows, 6:], (1,), cache)
        assert (logits - whole[rows, 6:]).abs().max() < CLOSE, name
    cache = model(tokens[:, :6], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([False, True, True]))
    assert (in_passes(model, tokens[1:, 6:], (1,), cache) - whole[1:, 6:]).abs().max() < CLOSE


def test_rows_share_kept_experts(soft_model):
    """Reordering moves no merged weights; those that no row uses any more are dropped in the next pass."""
    model, tokens = soft_model("qwen2_moe"), ids(3, 6)
    cache = model(tokens, use_cache=True).past_key_values
    before = [memory.merged for memory in cache.memories.values()]
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    assert all(m.merged is b for m, b in zip(cache.memories.values(), before, strict=True))
    model(tokens[:, :1], past_key_values=cache)
    assert [len(memory.merged[0]) for memory in cache.memories.values()] == [1, 1, 1]
    assert cache.history.slot.tolist() == [0, 0, 0]


@over_families
@over_causal
def test_cropping_is_exact_at_every_length(soft_model, family, fields):
    model, tokens, other = soft_model(family, **fields), ids(2, 15), ids(2, 10, seed=8)
    whole = DynamicCache(config=model.config)
    in_passes(model, tokens, (13, 1), whole)
    for left in range(15):
        expected = model(torch.cat([tokens[:, :left], other], 1), use_cache=False).logits[:, left:]
        for sizes in ((1,), (10,)):  # token by token, and across boundaries that the removed tokens had crossed too
            cache = copy.deepcopy(whole)
            cache.crop(left - 15)
            assert cache.get_seq_length() == cache.history.columns == left
            until = 6 if sizes == (1,) else 10
            logits = in_passes(model, other[:, :until], sizes, cache)
            assert (logits - expected[:, :until]).abs().max() < CLOSE, (left, sizes)


def test_cropping_inside_a_segment_keeps_its_expert(soft_model):
    model, tokens, calls = soft_model("deepseek"), ids(1, 11), []
    cache = model(tokens, use_cache=True).past_key_values
    cache.crop(-2)  # nine are left; the third segment began with the ninth
    for module in model.modules():
        if isinstance(module, soft.SoftExperts):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    model(tokens[:, 9:10], past_key_values=cache)
    assert not calls
    cache.crop(-2)
    model(tokens[:, 8:9], past_key_values=cache)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="positive value"):
        cache.crop(4)


def test_cropping_a_prompt(soft_model):
    model, tokens = soft_model("qwen2_moe", routing_span="prompt"), ids(1, 14)
    cache = DynamicCache(config=model.config)
    whole = in_passes(model, tokens, (8, 1), cache)
    cache.crop(-4)
    assert (in_passes(model, tokens[:, 10:], (2,), cache) - whole[:, 10:]).abs().max() < CLOSE
    cache.crop(-9)  # into the prompt: what is left of it routes
    expected = in_passes(model, tokens, (5, 1))[:, 5:]
    assert (in_passes(model, tokens[:, 5:], (1,), cache) - expected).abs().max() < CLOSE


@over_families
def test_assisted_generation(soft_model, family):
    model, tokens = soft_model(family), ids(1, 4).repeat(1, 4)
    mask = torch.ones_like(tokens)
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=14, **GREEDY)
    crops = []
    crop = soft_cache.SoftCache.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft_cache.SoftCache, "crop", lambda self, n: crops.append(n) or crop(self, n))
        looked_up = model.generate(tokens, attention_mask=mask, max_new_tokens=14, prompt_lookup_num_tokens=3, **GREEDY)
    assert any(crops)
    assert torch.equal(looked_up, expected)
    helper = soft_model(family, eta=0.5)
    assisted = model.generate(tokens, attention_mask=mask, max_new_tokens=14, assistant_model=helper, **GREEDY)
    assert torch.equal(assisted, expected)


def test_reset_and_copy(soft_model):
    model, tokens = soft_model("qwen2_moe"), ids(2, 14)
    expected = model(tokens).logits
    cache = model(tokens[:, :6], use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    for one in (cache, twin):
        assert (model(tokens[:, 6:], past_key_values=one).logits - expected[:, 6:]).abs().max() < CLOSE
    cache.reset()
    assert cache.routing_bytes == 0
    assert (in_passes(model, tokens[:1], (5, 1), cache) - expected[:1]).abs().max() < CLOSE


def test_residual_models_get_no_soft_cache(patched_folder):
    model = AutoModelForCausalLM.from_pretrained(patched_folder("qwen2_moe"), dtype=torch.float32)
    assert type(model(ids(1, 5), use_cache=True).past_key_values) is DynamicCache
    assert type(model(ids(1, 5), past_key_values=StaticCache(config=model.config, max_cache_len=8)).past_key_values)


@over_families
@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_read_in_chunks_routes_whole(soft_model, family, beams):
    """``routing_span: prompt`` under ``prefill_chunk_size``: logits of every step, with padding, as of one pass."""
    model = soft_model(family, routing_span="prompt")
    tokens, mask = padded([ids(1, 19)[0], ids(1, 12, 2)[0]], 19, "left")
    how = {"attention_mask": mask, "num_beams": beams, "max_new_tokens": 7, "output_logits": True, **GREEDY}
    whole = model.generate(tokens, return_dict_in_generate=True, **how)
    for size in (1, 5, 18, 19):
        found = model.generate(tokens, return_dict_in_generate=True, prefill_chunk_size=size, **how)
        assert torch.equal(found.sequences, whole.sequences)
        assert max((a - b).abs().max() for a, b in zip(found.logits, whole.logits, strict=True)) < CLOSE


@over_families
def test_only_chunks_of_one_prompt_are_put_together(soft_model, family):
    """What comes after the prompt's passes is routed by the prompt alone, a later turn too."""
    model, tokens = soft_model(family, routing_span="prompt"), ids(2, 19)
    turn = ids(2, 8, seed=5)
    found = []
    for size in (None, 3):
        cache = DynamicCache(config=model.config)
        name = {"past_key_values" if "past_key_values" in names_of(model) else "cache": cache}
        first = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, prefill_chunk_size=size, **name, **GREEDY
        )
        longer = torch.cat([first, turn], 1)
        how = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, **name, **GREEDY}
        found.append(model.generate(longer, attention_mask=torch.ones_like(longer), prefill_chunk_size=size, **how))
        assert cache.history.prompt == 19
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert max((a - b).abs().max() for a, b in zip(found[0].logits, found[1].logits, strict=True)) < CLOSE


def names_of(model) -> tuple[str, ...]:
    return Arguments.of(type(model).forward).names


# --- remote code ------------------------------------------------------------------------------------------------------

CHILD = """
tokens, tensors = torch.tensor(json.loads(sys.argv[3])), {}
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    tensors[name + ".logits"] = model(tokens).logits.detach()
    kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 9}
    for beams in (1, 2):
        made = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_beams=beams, **kwargs)
        tensors[f"{name}.{beams}"] = made.contiguous()
save_file(tensors, out)
"""


def soft_folder(source: Path, folder: Path, model) -> str:
    """A copy of a patched folder with the recipe of `model`; without base experts or with a curvature as it has it."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["namex"] = model.config.namex
    (folder / "config.json").write_text(json.dumps(config))
    held = model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t for n, t in tensors.items() if ".base_expert." not in n or n in held}
    tensors |= {n: t for n, t in held.items() if ".curvature." in n}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    names = {path.name for path in remote_code(config["model_type"]).files}
    assert {"soft.py", "soft_cache.py", "soft_curvature.py", "soft_segments.py"} <= names
    assert names == {path.name for path in folder.glob("*.py")}
    return str(folder)


def test_remote_code_without_the_package(soft_model, patched_folder, tmp_path):
    tokens, folders = ids(2, 11), {}
    kinds = {"previous": {"routing_span": "previous"}, "smear": {"method": "smear"}, "curved": CURVED}
    for family in FAMILIES:
        for kind, fields in kinds.items():
            name = f"{family}_{kind}"
            folders[name] = soft_folder(patched_folder(family), tmp_path / name, soft_model(family, **fields))
    out = tmp_path / "out.safetensors"
    done = child(CHILD, [json.dumps(folders), str(out), json.dumps(tokens.tolist())], tmp_path / "cwd")
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|deprecated", done.stderr, re.IGNORECASE), done.stderr
    made = load_file(out)
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert type(model).__module__.startswith("namex_hf.models")
        assert (made[f"{name}.logits"] - model(tokens).logits).abs().max() < CLOSE
        for beams in (1, 2):
            kwargs = {"max_new_tokens": 9, "num_beams": beams, **GREEDY}
            expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **kwargs)
            assert torch.equal(made[f"{name}.{beams}"], expected)
