"""Training from nothing: the script in short, and what its rows are."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from namex_hf.errors import TrainingError
from namex_hf.training.live_blocks import LiveLayer
from namex_hf.training.scratch import ROWS, Schedule, balance_loss, mixed_batches, new_model, train

SCRIPT = Path(__file__).parents[2] / "finetune" / "pretrain.py"
SHORT = ["--steps", "3", "--sequences", "2", "--length", "96", "--bargain_every", "2", "--score_tokens", "400"]


@pytest.fixture(scope="module")
def main():
    """The script's, in this process."""
    return runpy.run_path(str(SCRIPT))["main"]


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def test_two_rows_and_two_seeds_in_two_goes(main, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "wiki.txt").write_text("The base expert walks through the layers. " * 60)
    out = tmp_path / "out"
    asked = ["--output_dir", str(out), "--texts", str(tmp_path / "texts"), *SHORT]
    asked += ["--rows", "SMoE (Top-2)", "NAMEx-Full-Mom", "--seeds", "0"]
    main(asked)
    before = results(out)
    assert len(before) == 2
    main([*asked, "1"])
    after = results(out)
    assert len(after) == 4
    assert before.items() < after.items()  # what was there was not trained again
    found = json.loads(after["namex-full-mom.1.json"])
    assert len(found["loss"]) == 3
    assert [entry["step"] for entry in found["bargain"]] == [2]
    assert found["bargain"][0]["bargain/drift"] > 0
    assert set(found["scores"]) == {"arithmetic", "code", "dictionary", "manual", "prose", "wiki"}
    assert set(found["trained_on"]) == {"arithmetic", "code", "dictionary", "manual", "prose"}
    table, printed = (out / "table.md").read_text(), capsys.readouterr().out
    assert table in printed
    assert f"{out / 'convergence.png'}: L2 distance" in printed
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "convergence.svg").stat().st_size > 10_000
    assert "NAMEx-Full-Mom" in table
    assert "+-" in table
    with pytest.raises(TrainingError, match="is of another schedule"):
        main([*asked, "--peak", "0.001"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rows", "MoE"], r"--rows MoE: accepted: SMoE \(Top-1\), "),
        (["--steps", "0"], "--steps 0: accepted: from 1"),
        (["--peak", "nan"], "--peak nan: accepted: from 0"),
        (["--texts", "nowhere"], "--texts nowhere: no .txt file is there"),
        (["--length", "1000000"], "--length 1000000: the shortest text has"),
    ],
)
def test_refused(main, tmp_path, arguments, text):
    with pytest.raises(TrainingError, match=text):
        main(["--output_dir", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rows", "MoE"], "--rows MoE: accepted: "),
        (["--corpora", "sources"], "apt-get: No such file or directory"),
    ],
)
def test_refused_in_one_line_with_exit_status_2(tmp_path, arguments, text):
    command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path / "out"), *arguments]
    kept = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pretrain.py: error: {text}")
    assert len(done.stderr.splitlines()) == 1


def test_rows_begin_alike_and_are_live_where_a_base_walks():
    """All but SMEAR and SMoE have a base; top-1 and top-2, momentum and none begin with the same numbers."""
    models = {name: new_model(row, 0, 64, 32, experts=4) for name, row in ROWS.items()}
    for name, model in models.items():
        live = any(isinstance(module, LiveLayer) for module in model.modules())
        assert live == ("NAMEx" in name or "EP-CAMEx" in name)
        for part in ("model.embed_tokens.weight", "model.layers.3.mlp.experts.down_proj"):
            assert torch.equal(model.get_parameter(part), models["SMoE (Top-1)"].get_parameter(part))


def test_the_form_of_appendix_d1():
    """Softmax over the values of top-k alone, and routed experts alone: one block against its own parts."""
    model = new_model(ROWS["SMoE (Top-2)"], 0, 64, 32, experts=4, router="topk_softmax", shared_expert=False)
    stock = new_model(ROWS["SMoE (Top-2)"], 0, 64, 32, experts=4)
    torch.manual_seed(1)
    block, hidden = model.model.layers[1].mlp, torch.randn(6, 128)
    logits, chosen = (hidden @ block.gate.weight.T).topk(2)
    expected = 0
    for rank in range(2):
        gate, up = torch.einsum("th,trh->tr", hidden, block.experts.gate_up_proj[chosen[:, rank]]).chunk(2, dim=-1)
        neurons = torch.nn.functional.silu(gate) * up
        output = torch.einsum("tr,thr->th", neurons, block.experts.down_proj[chosen[:, rank]])
        expected = expected + logits.softmax(-1)[:, rank, None] * output
    torch.testing.assert_close(block(hidden[None])[0], expected)
    count = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (stock, model)]
    assert count[0] - count[1] == 4 * (3 * 128 * 128 + 128)
    live = new_model(ROWS["NAMEx-Full"], 0, 64, 32, experts=4, router="topk_softmax")
    assert torch.equal(live.model.layers[1].mlp.gate(hidden)[1], torch.ones(6, 1))  # top-1


@pytest.mark.parametrize("name", ["SMoE (Top-1)", "SMEAR", "CAMEx", "NAMEx-Full"])
def test_a_row_learns(name):
    schedule = Schedule(steps=12, sequences=4, length=32, warm_up=2, bargain_every=5)
    text = {"a": torch.arange(64).repeat(20), "b": torch.arange(63, -1, -1).repeat(20)}
    model, steps = new_model(ROWS[name], 0, 64, 32, experts=4), []
    found = train(model, ROWS[name], mixed_batches(text, schedule, 0), schedule, lambda: steps.append(1))
    assert found["loss"][-1] < 0.9 * found["loss"][0]
    assert len(steps) == 12
    assert len(found["bargain"]) == (2 if name == "NAMEx-Full" else 0)


def test_the_balance_loss_is_one_where_experts_are_used_alike():
    even = torch.eye(4).repeat(8, 1) * 5
    assert balance_loss((even, even), 1) == pytest.approx(1.0, rel=1e-6)
    crowded = torch.tensor([[5.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert balance_loss((even, crowded), 1) > 2


def test_batches_are_a_function_of_step_and_seed():
    schedule = Schedule(sequences=3, length=16)
    text = {"a": torch.arange(500), "b": torch.arange(500, 1000)}
    one, same, other = (mixed_batches(text, schedule, seed) for seed in (0, 0, 1))
    assert torch.equal(one(4), same(4))
    assert not torch.equal(one(4), other(4))
    assert not torch.equal(one(4), one(5))
    assert one(0).shape == (3, 16)
