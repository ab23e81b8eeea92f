"""`--stable_stage 1`: StableMoE's first stage on chats, by the script."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from namex_hf import load_patched
from namex_hf.training.stable_moe.routing_hooks import stable_routers

CONFIG = Path(__file__).parents[2] / "namex_hf" / "packaged" / "tiny" / "config.json"
STABLE = {"routing": "stable", "calibration_tokens": 8192}


@pytest.fixture
def stage_one(tmp_path: Path) -> dict[str, Any]:
    """Arguments, but for the recipe those of `plain`."""
    path = tmp_path / "stable.yaml"
    path.write_text(json.dumps(STABLE))
    return {"recipe": str(path), "stable_stage": 1, "scores": ["none"], "max_steps": 2, "save_steps": 1}


def test_the_first_stage_assigns_experts_to_the_ids_of_the_chats(run, plain, stage_one, tmp_path):
    """Its loss in the first step, where nothing has trained yet, is that of linear routing and the student's terms."""
    ended = run(tmp_path / "out", **stage_one)
    assert ended.code == 0, ended.said
    first, linear = ended.losses[0], plain.losses[0]
    terms = 0.3 * (first["stable/balance"] + first["stable/distillation"])
    own = linear["loss"] - json.loads(CONFIG.read_text())["router_aux_loss_coef"] * linear["aux_loss"]
    assert first["loss"] == pytest.approx(own + terms, rel=1e-5)
    assert first["stable/distillation"] == pytest.approx(math.log(16), abs=2e-3)  # the student begins with no choice
    assert "aux_loss" not in first
    assert ended.report["training"]["trainable"]["student"] == 5 * 50 * (4096 + 16)

    model = load_patched(ended.out)
    assert model.config.namex["routing"] == "stable"
    assert not [name for name in model.state_dict() if "student" in name]
    tables = torch.stack([router.assignment for router in stable_routers(model)])
    assigned = tables[:, :, 0] >= 0
    assert torch.equal(assigned, assigned[:1].expand_as(assigned))
    assert 50 < int(assigned[0].sum()) == ended.report["training"]["assigned"] < 2 * 2 * 128


REFUSED = {
    "another stage": ({"stable_stage": 3}, "--stable_stage 3: accepted: 1"),
    "an adapter": ({"use_peft": True}, "--use_peft does not go with --stable_stage 1"),
    "another balance loss": ({"router_aux_loss_coef": 0.1}, "--router_aux_loss_coef does not go with --stable_stage 1"),
    "another router": ({"recipe": None}, "StableMoE's first stage trains routing 'stable'; found routing 'linear'"),
}


@pytest.mark.parametrize(("changes", "text"), REFUSED.values(), ids=REFUSED)
def test_what_the_first_stage_goes_without(run, stage_one, tmp_path, changes, text):
    ended = run(tmp_path / "out", **stage_one | changes)
    assert ended.code == 2, ended.said
    assert text in ended.said.strip().splitlines()[-1]
    assert not ended.out.exists()
