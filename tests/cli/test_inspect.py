"""namex-inspect on plain, fused and patched folders."""

from pathlib import Path

import pytest

from namex_hf.commands import inspect, patch
from tests.helpers.checkpoints import change_config
from tests.helpers.toy_models import save_toy


def inspected(capsys: pytest.CaptureFixture[str], model: object) -> dict[str, str]:
    """The table, by its left column."""
    assert inspect.main([str(model)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    facts, last = {}, ""
    for line in said.out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:3]]
        if len(cells) == 2:  # else a border; no name: a long value goes on
            last = cells[0] or last
            facts[last] = f"{facts.get(last, '')} {cells[1]}".strip()
    return facts


def test_plain(toys: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    facts = inspected(capsys, toys["deepseek"])
    assert facts["family"] == "deepseek"
    assert facts["patched"] == "no"
    assert facts["layers"] == "3, of which 2 are MoE"
    assert facts["experts a layer"] == "8 of width 8, top-3"
    assert facts["shared expert"] == "width 16"
    assert facts["layout"] == "per expert"
    assert (facts["dtype"], facts["commit"]) == ("bfloat16", "none (local)")
    assert facts["bytes of routed experts"] == f"{2 * 8 * 3 * 8 * 16 * 2 / 1000:.2f} kB"
    assert facts["bytes of base experts"] == "0 B"


def test_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str], toy: Path):
    fused, _ = save_toy(tmp_path / "fused", fuse=True), capsys.readouterr()
    facts, stock = inspected(capsys, fused), inspected(capsys, toy)
    assert facts["layout"] == "fused"
    assert facts["bytes of routed experts"] == stock["bytes of routed experts"]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_patched(toys: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str):
    residual, grouped = tmp_path / "residual", tmp_path / "grouped"
    assert patch.main([str(toys[family]), "--out", str(residual), "--quiet", "--gamma", "0.5"]) == 0
    flags = ["--merge", "grouped", "--experts", "4", "--quiet"]
    assert patch.main([str(toys[family]), "--out", str(grouped), *flags]) == 0
    facts = inspected(capsys, residual)
    assert (facts["family"], facts["patched"]) == (family, "residual, namex-full, linear")
    assert "gamma=0.5" in facts["recipe"]
    assert facts["bytes of base experts"] != "0 B"
    facts = inspected(capsys, grouped)
    assert (facts["family"], facts["patched"]) == (family, "grouped, namex-full, linear")
    assert facts["experts a layer"] == "4 of width 8, top-3"


@pytest.mark.parametrize("namex", ["yes", 3, [], {"merge": "residual"}])
def test_somebody_elses_field_of_our_name(copied: Path, capsys: pytest.CaptureFixture[str], namex: object):
    change_config(copied, namex=namex)
    assert inspected(capsys, copied)["family"] == "qwen2_moe"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "accepted: deepseek, deepseek_v2"),
        ({"model_type": [1]}, "accepted: deepseek, deepseek_v2"),
        ({"hidden_size": None}, "'hidden_size' is None"),
        ({"hidden_size": 18}, "config.json makes it"),
    ],
)
def test_refused(copied: Path, capsys: pytest.CaptureFixture[str], changes: dict, says: str):
    change_config(copied, **changes)
    assert inspect.main([str(copied)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("namex-inspect: error: ")
    assert says in said.err
    assert said.err.count("\n") == 1


def test_nothing_and_a_revision_of_nothing(toy: Path, capsys: pytest.CaptureFixture[str]):
    assert inspect.main(["nothing-of-that-name"]) == 2
    assert "accepted: a folder" in capsys.readouterr().err
    assert inspect.main([str(toy), "--revision", "main"]) == 2
    assert "belongs to a Hub id" in capsys.readouterr().err
