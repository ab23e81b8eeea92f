"""Results of every kind, opened by other versions of transformers, where this package is absent.

``python benchmarks/open_elsewhere.py DIR PYTHON...`` writes the results below DIR. This Python and every PYTHON (each
of an environment with torch and transformers) opens them. A cell of the table has the greatest difference of a logit
from this Python's, and what else differs: 32 greedy tokens with a cache, or the model after it was saved and opened
again. A model that does not open has the first line of its error there.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TEXT, GROUPED = {"calibration_tokens": 8192}, {"merge": "grouped", "experts": 8}
RECIPES: dict[str, dict[str, Any]] = {
    "residual": {},
    "soft-token": {"merge": "soft"},
    "soft-segment": {"merge": "soft", "segment": 16},
    "cosine": {"routing": "cosine"},
    "stable": {"routing": "stable", **TEXT},
    "grouped": GROUPED,
    "grouped-damage": {**GROUPED, **TEXT, "budget": "damage", "curvature": "calibrated"},
}


def write(out: Path) -> list[str]:
    """The packaged models and the results of all recipes; those that are complete are used again."""
    from namex_hf import Recipe, patch_checkpoint
    from namex_hf.resources import PACKAGED

    folders = []
    for name in ("tiny", "tiny-deepseek"):
        for kind, fields in RECIPES.items():
            patch_checkpoint(name, out / name / kind, Recipe(**fields))
        folders += [PACKAGED / name, *(out / name / kind for kind in RECIPES)]
    folders.append(out / "tiny-deepseek" / "grouped-qwen2_moe")
    patch_checkpoint("tiny-deepseek", folders[-1], Recipe(**GROUPED), export_as="qwen2_moe")
    return list(map(str, folders))


def facts(folder: str, saved: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    model, ids = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval(), torch.arange(50, 114).view(2, 32)
    how = {"do_sample": False, "max_new_tokens": 32, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    with torch.no_grad():
        logits, text = model(ids).logits, model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        model.save_pretrained(saved)
        again = AutoModelForCausalLM.from_pretrained(saved, **kwargs).eval()(ids).logits
    return {"logits": logits, "text": text, "saved": torch.equal(again, logits)}


def child(out: Path, folders: list[str]) -> None:
    import torch
    import transformers

    answers: dict[str, Any] = {"version": transformers.__version__}
    for number, folder in enumerate(folders):
        try:
            answers[folder] = facts(folder, out / str(number))
        except Exception as error:  # whatever another version raises belongs into the table
            answers[folder] = f"{type(error).__name__}: {error}".splitlines()[0]
    torch.save(answers, out / "answers.pt")


def cell(answer: Any, here: dict[str, Any]) -> str:
    if isinstance(answer, str):
        return answer
    differs = f"{float((answer['logits'] - here['logits']).abs().max()):.0e}"
    text = "" if answer["text"].equal(here["text"]) else ", another text"
    return differs + text + ("" if answer["saved"] else ", another model when saved")


def main(out: Path, pythons: list[str]) -> None:
    import torch

    from namex_hf.evaluation.table import Table

    folders, by_python = write(out), []
    for number, python in enumerate([sys.executable, *pythons]):
        work = out / f"python-{number}"
        work.mkdir(exist_ok=True)
        environment = {**os.environ, "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([python, "-I", __file__, "--child", work, *folders], env=environment, check=True)
        by_python.append(torch.load(work / "answers.pt"))
    table = Table(["", *(answers["version"] for answers in by_python)], [])
    for folder in folders:
        cells = [cell(answers[folder], by_python[0][folder]) for answers in by_python]
        table.rows.append(["/".join(Path(folder).parts[-2:]), *cells])
    print(*table.markdown(), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--child":
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:])
