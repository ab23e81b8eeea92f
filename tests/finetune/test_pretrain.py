"""Training from nothing: the script in short, and what its rows are."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scratch import ROWS, Schedule, balance_loss, mixed_batches, new_model, train

from namex_hf.errors import RecipeError, TrainingError, UsageError
from namex_hf.training.live_blocks import LiveLayer
from tests.helpers.process import script_process

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
    assert len(results(out)) == 2
    older = out / "smoe--top-2.0.json"  # of before a schedule had these fields
    run = json.loads(older.read_text())
    for name in ("balancing", "bias_rate", "router", "shared_expert", "eta"):
        del run["schedule"][name]
    del run["imbalance"]
    older.write_text(json.dumps(run))
    before = results(out)
    main([*asked, "1"])
    after = results(out)
    assert len(after) == 4
    assert before.items() < after.items()  # what was there was not trained again
    found = json.loads(after["namex-full-mom.1.json"])
    assert len(found["loss"]) == len(found["imbalance"]) == 3
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
    with pytest.raises(TrainingError, match="is of another schedule"):
        main([*asked, "--router", "topk_softmax"])


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
    with pytest.raises(UsageError, match=text):
        main(["--output_dir", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_refused_values_of_the_form(main, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(RecipeError, match=r"'eta' is 0\.0; accepted: a number above 0"):
        main([*out, "--eta", "0"])
    with pytest.raises(SystemExit):
        main([*out, "--router", "cosine"])
    assert "argument --router: invalid choice: 'cosine' (choose from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rows", "MoE"], "--rows MoE: accepted: "),
        (["--corpora", "sources"], "apt-get: No such file or directory"),
    ],
)
def test_refused_in_one_line_with_exit_status_2(tmp_path, arguments, text):
    arguments, log = ["--output_dir", str(tmp_path / "out"), *arguments], tmp_path / "log"
    process = script_process(SCRIPT, arguments, log, environment={"PATH": str(tmp_path)})
    process.join()
    assert process.exitcode == 2
    assert log.read_text().startswith(f"pretrain.py: error: {text}")
    assert len(log.read_text().splitlines()) == 1


def test_rows_begin_alike_and_are_live_where_a_base_walks():
    """All but SMEAR and SMoE have a base; top-1 and top-2, momentum and none begin with the same numbers."""
    models = {name: new_model(row, 0, 64, 32, experts=4) for name, row in ROWS.items()}
    for name, model in models.items():
        live = any(isinstance(module, LiveLayer) for module in model.modules())
        assert live == ("NAMEx" in name or "EP-CAMEx" in name)
        for part in ("model.embed_tokens.weight", "model.layers.3.mlp.experts.down_proj"):
            assert torch.equal(model.get_parameter(part), models["SMoE (Top-1)"].get_parameter(part))


PAPER = Schedule(router="topk_softmax", shared_expert="none", eta=0.5)
"""The paper's appendix D.1, with a base that counts."""


@torch.no_grad()
def test_the_papers_router_and_no_shared_expert():
    """A token of top-1 gets its expert's whole output and nothing else; of top-2 the softmax over the two logits."""
    inputs = torch.randn(1, 5, 128)
    for name in ("SMoE (Top-1)", "SMoE (Top-2)"):
        block = new_model(ROWS[name], 0, 64, 32, experts=4, schedule=PAPER).model.layers[1].mlp
        logits, index = (inputs[0] @ block.gate.weight.T).topk(ROWS[name].top_k)
        expected = torch.zeros(5, 128)
        for token in range(5):
            for weight, expert in zip(logits[token].softmax(-1), index[token], strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ inputs[0, token]).chunk(2)
                neurons = torch.nn.functional.silu(gate) * up
                expected[token] += weight * (block.experts.down_proj[expert] @ neurons)
        torch.testing.assert_close(block(inputs)[0], expected)


@pytest.mark.parametrize("name", ["CAMEx", "NAMEx-Full"])
def test_without_the_shared_expert_the_first_base_begins_as_it_would_have(name):
    with_one, without = (new_model(ROWS[name], 0, 64, 32, experts=4, schedule=s) for s in (Schedule(), PAPER))
    base = "model.layers.0.mlp.base_expert.up_proj.weight"
    assert torch.equal(without.get_parameter(base), with_one.get_parameter(base))
    assert torch.equal(with_one.get_parameter(base), with_one.model.layers[0].mlp.shared_expert.up_proj.weight)
    assert not any("shared_expert." in key for key, _ in without.named_parameters())
    assert (with_one.config.namex["eta"], without.config.namex["eta"]) == (1.0, 0.5)


@pytest.mark.parametrize("name", ["SMoE (Top-1)", "NAMEx-Full"])
def test_a_row_learns_in_the_papers_form(name):
    schedule = replace(PAPER, steps=12, sequences=4, length=32, warm_up=2, bargain_every=5)
    text = {"a": torch.arange(64).repeat(20), "b": torch.arange(63, -1, -1).repeat(20)}
    model = new_model(ROWS[name], 0, 64, 32, experts=4, schedule=schedule)
    found = train(model, ROWS[name], mixed_batches(text, schedule, 0), schedule, lambda: None)
    assert found["loss"][-1] < 0.9 * found["loss"][0]


def test_a_bias_balances_a_model_that_does_not_learn():
    """At a learning rate of 0, on one batch, only the bias changes: the load evens out. Else it stays as it is."""
    row, ids, loads = ROWS["SMoE (Top-1)"], torch.arange(64).repeat(4, 1), {}
    for balancing in ("loss", "bias"):
        schedule = Schedule(steps=24, peak=0.0, balancing=balancing, bias_rate=0.005)
        model = new_model(row, 0, 64, 64, experts=4)
        loads[balancing] = train(model, row, lambda step: ids, schedule, lambda: None)["imbalance"]
    assert loads["loss"][0] == loads["loss"][-1] == loads["bias"][0]
    assert loads["bias"][-1] < 0.5 * loads["bias"][0]


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
