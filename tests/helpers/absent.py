"""Python code in a process where this package is absent."""

import os
import subprocess
import sys
from pathlib import Path

ABSENT = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "namex_hf":
            raise ModuleNotFoundError("No module named 'namex_hf'", name=name)

sys.meta_path.insert(0, Absent())
try:
    import namex_hf
    sys.exit("namex_hf is importable here")
except ModuleNotFoundError:
    pass

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

folders, out = json.loads(sys.argv[1]), sys.argv[2]
"""


def child(code: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run `code` where nothing of this checkout is on the path, the cache is empty and the network is off."""
    cwd.mkdir(exist_ok=True)
    (cwd / "child.py").write_text(ABSENT + code)
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {
        "HF_HOME": f"{cwd}/hf",
        "HF_MODULES_CACHE": f"{cwd}/modules",
        "HF_HUB_OFFLINE": "1",
        "HOME": f"{cwd}",
    }
    command = [sys.executable, "-I", "child.py", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
