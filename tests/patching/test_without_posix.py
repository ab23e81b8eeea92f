"""Where Python has no POSIX modules, as on Windows: everything imports, and a run patches and reports."""

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.toy_models import save_toy

# Other libraries take POSIX modules for granted where the system is not Windows, so these two alone do without.
SCRIPT = """
import builtins, sys

def hide(name, globals=None, *rest, real=builtins.__import__, **named):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if name in ("fcntl", "resource") and importer in ("namex_hf", "filelock"):
        raise ImportError(name)
    return real(name, globals, *rest, **named)

builtins.__import__ = hide
from namex_hf.commands.patch import main
sys.exit(main([*sys.argv[1:], "--method", "ep-camex"]))
"""


def test_without_posix_modules(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(save_toy(tmp_path / "model")), "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((out / "namex/report.json").read_text())["totals"]["peak_resident_bytes"] is None
    assert "peak memory" not in ended.stdout
    assert not (out / ".namex").exists()
