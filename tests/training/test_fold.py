"""A trained curvature becomes part of the experts, and nothing else changes."""

import pytest
import torch

from namex_hf import load_patched
from namex_hf.recipe import Recipe
from namex_hf.training.fold import fold_curvature

over_families = pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
SOFT = {"merge": "soft", "segment": 4}


@over_families
@pytest.mark.parametrize("fields", [{}, {"rank": 2, "eta": 0.5}, {"method": "smear"}, {"routing": "cosine"}], ids=str)
def test_the_folded_model_is_the_same_function(make_model, family, fields, tmp_path):
    model = make_model(family, {**SOFT, **fields, "curvature": "kronecker"})
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".curvature." in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    tokens = torch.randint(0, 41, (2, 13), generator=draw)
    wanted = model(tokens).logits.detach()
    plain = make_model(family, {**SOFT, **fields, "rank": None})
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if ".curvature." not in name})
    assert (plain(tokens).logits - wanted).abs().max() > 1e-2
    assert fold_curvature(model) is model
    assert (model(tokens).logits - wanted).abs().max() < 1e-4
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert Recipe.from_dict(model.config.namex).to_dict()["curvature"] == "identity"
    model.save_pretrained(tmp_path)
    again = load_patched(tmp_path, dtype=torch.float32).eval()
    assert (again(tokens).logits - wanted).abs().max() < 1e-4


@over_families
def test_nothing_to_fold(make_model, family):
    model = fold_curvature(make_model(family, {**SOFT, "curvature": "kronecker"}))
    with pytest.raises(
        ValueError, match="found curvature 'identity'; accepted: merge 'soft' with curvature 'kronecker'"
    ):
        fold_curvature(model)
    with pytest.raises(ValueError, match="found another merge; accepted: merge 'soft'"):
        fold_curvature(make_model(family, {"merge": "residual"}))
