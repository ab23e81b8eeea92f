"""``first_layer: sparse``: the first MoE layer is the stock block, all later ones are as under ``merged``."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from namex_hf.models import PATCHED
from namex_hf.models.configuration_namex import FIRST_LAYERS, stays_sparse
from namex_hf.models.soft import SoftRouting
from namex_hf.recipe import FIELDS

FORMS = [
    {"merge": "residual"},
    {"merge": "soft"},
    {"merge": "soft", "segment": 4, "top_k": 2},
    {"merge": "soft", "curvature": "kronecker", "rank": 1},
    {"merge": "soft", "curvature": "calibrated", "rank": 2},
    {"merge": "soft", "method": "smear"},
]


def mixtures(model) -> list:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def hidden(model) -> torch.Tensor:
    return torch.randn(2, 11, model.config.hidden_size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", PATCHED)
@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("fields", FORMS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_the_first_block_is_the_stock_one(hub_folder, namex_model, family, renormalises, fields):
    """Bit for bit, whatever top-k and renormalisation the merge has; and it holds no more tensors than that one."""
    if renormalises and fields["merge"] == "residual":
        pytest.skip("residual needs mass that top-k leaves over")
    stock = AutoModelForCausalLM.from_pretrained(
        hub_folder(family, norm_topk_prob=renormalises), dtype=torch.float32
    ).eval()
    for parameter in stock.parameters():  # kernels round by alignment, which the file's header decides
        parameter.data = parameter.data.clone()
    model = namex_model(family, norm_topk_prob=renormalises, first_layer="sparse", **fields)
    one, other, x = mixtures(model)[0], mixtures(stock)[0], hidden(model)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("family", PATCHED)
@pytest.mark.parametrize("fields", FORMS[:2], ids=lambda fields: fields["merge"])
def test_later_blocks_are_those_of_merged(namex_model, family, fields):
    sparse, merged = namex_model(family, first_layer="sparse", **fields), namex_model(family, **fields)
    x = hidden(sparse)
    same = [
        torch.equal(one(x, None), other(x, None)) for one, other in zip(mixtures(sparse), mixtures(merged), strict=True)
    ]
    assert same == [False] + [True] * (len(same) - 1)
    assert len(same) > 1
    kinds = [isinstance(block, SoftRouting) for block in mixtures(sparse)]
    assert kinds == [False] + [fields["merge"] == "soft"] * (len(same) - 1)


@pytest.mark.parametrize("family", PATCHED)
def test_by_segment_with_and_without_a_cache(namex_model, tokens, family):
    """The first layer keeps nothing in the cache; the state of the others goes on by itself."""
    model = namex_model(family, torch.float64, merge="soft", segment=4, first_layer="sparse")
    model.set_experts_implementation("eager")  # of the sparse block: torch's grouped_mm has no float64
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    half = model(tokens[:, :5], use_cache=True)
    rest = model(tokens[:, 5:], past_key_values=half.past_key_values).logits
    torch.testing.assert_close(torch.cat([half.logits, rest], 1), model(tokens).logits, rtol=1e-9, atol=1e-9)


def test_assignments_have_the_top_k_of_their_block(namex_model):
    model = namex_model("qwen2_moe", merge="soft", top_k=2, routing="stable", first_layer="sparse")
    assert [block.stable_router.assignment.shape[1] for block in mixtures(model)] == [3, 2, 2]
    ids = torch.arange(3, 15)[None]
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "shape", "first"),
    [
        ("qwen2_moe", {"num_hidden_layers": 6, "mlp_only_layers": [1], "decoder_sparse_step": 2}, 3),
        ("qwen2_moe", {"num_hidden_layers": 3}, 0),
        ("deepseek", {"num_hidden_layers": 6, "first_k_dense_replace": 1, "moe_layer_freq": 2}, 2),
        ("deepseek", {"num_hidden_layers": 3, "first_k_dense_replace": 3}, None),
    ],
)
def test_which_layer_is_the_first(family, shape, first):
    config = PATCHED[family](namex={"first_layer": "sparse"}, **shape)
    found = [layer for layer in range(config.num_hidden_layers) if stays_sparse(config, layer)]
    assert found == ([] if first is None else [first])
    config.namex = {"first_layer": "merged"}
    assert not any(stays_sparse(config, layer) for layer in range(config.num_hidden_layers))


def test_values_are_those_of_the_recipe():
    assert FIELDS["first_layer"].choices == FIRST_LAYERS
    with pytest.raises(ValueError, match=r"namex.first_layer is 'dense'; accepted: merged, sparse"):
        PATCHED["deepseek"](namex={"first_layer": "dense"})
