"""Smaller models in other programs: equal perplexity. Skipped where a program is not there; docs/clients.md has more.

NAMEX_LLAMA_CONVERT and NAMEX_LLAMA_PERPLEXITY name llama.cpp's ``convert_hf_to_gguf.py`` and ``llama-perplexity`` where
these are not on the path, NAMEX_VLLM_PYTHON a Python that has vllm.
"""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_checkpoint
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import HELD_OUT, perplexity
from tests.helpers.elsewhere import by_llama_cpp, by_vllm, llama_cpp, vllm

TEXT, WINDOW, CHUNKS = HELD_OUT / "prose.txt", 512, 8
RECIPES = {
    "grouped": Recipe(merge="grouped", experts=8),
    "narrow": Recipe(keep=0.5, calibration_tokens=8192),
}


@pytest.fixture(scope="module", params=RECIPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("patched") / request.param
    patch_checkpoint("tiny", out, RECIPES[request.param])
    return out


@pytest.fixture(scope="module")
def ids(folder: Path) -> torch.Tensor:
    """``[CHUNKS, WINDOW]`` from the beginning of the text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    every = tokenizer(TEXT.read_text("utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    return every[: CHUNKS * WINDOW].view(CHUNKS, WINDOW)


@torch.no_grad()
def of_second_halves(folder: Path, ids: torch.Tensor) -> float:
    """As llama.cpp counts: of each window the tokens after the first of its second half."""
    logits = load(folder)(ids).logits.log_softmax(-1)[:, WINDOW // 2 : -1]
    return math.exp(-float(logits.gather(-1, ids[:, WINDOW // 2 + 1 :, None]).double().mean()))


@pytest.fixture(scope="module", name="llama")
def llama_programs() -> tuple[str, str]:
    return llama_cpp()


@pytest.fixture(scope="module", name="python")
def vllm_python() -> str:
    return vllm()


def test_in_llama_cpp(llama: tuple[str, str], folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """It keeps its cache in float16."""
    found = by_llama_cpp(llama, folder, TEXT, CHUNKS, tmp_path)
    assert found == pytest.approx(of_second_halves(folder, ids), rel=3e-4)


def test_in_vllm(python: str, folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    found = by_vllm(python, folder, ids.tolist(), tmp_path)
    assert found == pytest.approx(perplexity(load(folder), ids.flatten()), rel=1e-4)
