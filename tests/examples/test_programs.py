"""The examples that train, calibrate and weigh, as a user starts them, and the notebook."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"


def said(name: str, folder: Path, *arguments: object) -> str:
    """Standard output of an example that runs in an empty folder, without a network."""
    own = {"PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    run = subprocess.run(command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return run.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [
        float(number)
        for found in re.findall(pattern, text)
        for number in ([found] if isinstance(found, str) else found)
    ]


def test_patch_and_train(tmp_path: Path) -> None:
    """The loss falls, and what is saved is a stock model of half the width."""
    text = said("patch_and_train.py", tmp_path, "--out", "trained", "--tokens", 8192, "--steps", 5)
    assert "layer 0 (1 of 5 layers done)" in text
    patched, trained = numbers(r"held-out prose: ([\d.]+) patched, ([\d.]+) trained", text)
    assert trained < patched
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert type(model).__module__ == "transformers.models.qwen2_moe.modeling_qwen2_moe"
    assert model.config.moe_intermediate_size == 40


def test_own_text(tmp_path: Path) -> None:
    """Each of the two is better on its own kind of text."""
    text = said("own_text.py", tmp_path, "--tokens", 8192)
    (code, chats), (other_code, other_chats) = (
        numbers(rf"calibrated on {name}: perplexity ([\d.]+) on code, ([\d.]+) on chats", text)
        for name in ("code", "chats")
    )
    assert code < other_code
    assert chats > other_chats


def test_own_weighting(tmp_path: Path) -> None:
    """Both weightings merge; they are not the same."""
    uniform, central = numbers(r"perplexity ([\d.]+)", said("own_weighting.py", tmp_path))
    assert uniform != central
    assert min(uniform, central) > 1


def notebook() -> dict:
    return json.loads((EXAMPLES / "halve_tiny.ipynb").read_text("utf-8"))


def test_the_notebook_stores_no_outputs() -> None:
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 4
    assert [(cell["outputs"], cell["execution_count"]) for cell in cells] == [([], None)] * 4


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient", reason="nbclient is missing, which the extra 'dev' brings")
    pytest.importorskip("ipykernel", reason="ipykernel is missing, which the extra 'dev' brings")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = nbformat.read(EXAMPLES / "halve_tiny.ipynb", as_version=4)
    client.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(one.get("text", "") for one in cell.outputs) for cell in book.cells if cell.cell_type == "code"]
    assert "layer 4" in printed[1]
    assert "Qwen2MoeForCausalLM with experts of 40 neurons" in printed[2]
    before, after = numbers(r"mean +([\d.]+) +([\d.]+)", printed[2])
    assert before < after < 2 * before
    assert "apples" in printed[3]
