"""Perplexity of a folder by other programs. Scripts for other interpreters are texts here."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONVERT = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
here = Path(sys.argv[0]).parent
sys.path[:0] = [str(here), str(here / "gguf-py")]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda model, tokenizer: "smollm"  # its table has no hash of the packaged tokenizers
runpy.run_path(sys.argv[0], run_name="__main__")
"""
VLLM = """
import json, math, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, rows = sys.argv[1], json.loads(sys.argv[2])
    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024)
    prompts = [{"prompt_token_ids": row} for row in rows]
    losses = []
    for answer, row in zip(model.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0)), rows):
        losses += [-one[token].logprob for one, token in zip(answer.prompt_logprobs[1:], row[1:])]
    print("perplexity", math.exp(sum(losses) / len(losses)))
"""


def program(name: str, variable: str) -> str:
    """A program that an environment variable names, or one on the path; skips the test where there is neither."""
    found = os.environ.get(variable) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on PATH, and {variable} does not name it")
    return found


def output(*command: str, cwd: Path) -> str:
    """Both streams of a program that ends well."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=cwd, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)
    text = run.stdout.decode("utf-8", "replace")
    assert run.returncode == 0, text[-3000:]
    return text


def llama_cpp() -> tuple[str, str]:
    """llama.cpp's converter and its program for perplexity; skips the test where they are not there."""
    convert = program("convert_hf_to_gguf.py", "NAMEX_LLAMA_CONVERT")
    return convert, program("llama-perplexity", "NAMEX_LLAMA_PERPLEXITY")


def by_llama_cpp(programs: tuple[str, str], folder: Path, text: Path, chunks: int, place: Path) -> float:
    """Perplexity of the second halves of the first ``chunks`` windows of 512 tokens, in float32.

    Args:
        place: a folder for the converted model.
    """
    convert, perplexity = programs
    model = place / "model.gguf"
    options = (str(folder), "--outfile", str(model), "--outtype", "f32")
    output(sys.executable, "-c", CONVERT, convert, *options, cwd=place)
    options = ("-m", str(model), "-f", str(text), "-c", "512", "--chunks", str(chunks), "-t", "1")
    (found,) = re.findall(r"Final estimate: PPL = ([\d.]+)", output(perplexity, *options, cwd=place))
    return float(found)


def vllm() -> str:
    """A Python that has vllm; skips the test where none is named."""
    python = os.environ.get("NAMEX_VLLM_PYTHON")
    if python is None:
        pytest.skip("NAMEX_VLLM_PYTHON does not name a Python that has vllm")
    return python


def by_vllm(python: str, folder: Path, rows: list[list[int]], place: Path) -> float:
    """Perplexity of rows of token ids, of each all but the first token."""
    (place / "score.py").write_text(VLLM)
    text = output(python, str(place / "score.py"), str(folder), json.dumps(rows), cwd=place)
    (found,) = re.findall(r"^perplexity ([\d.]+)$", text, re.MULTILINE)
    return float(found)
