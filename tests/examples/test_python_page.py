"""The blocks of docs/python.md, in their order, in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_blocks_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(re.findall(r"^## ", page, re.MULTILINE))
    (tmp_path / "page.py").write_text("\n".join(blocks))
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    widths = {
        name: json.loads((tmp_path / "out" / name / "config.json").read_text())["moe_intermediate_size"]
        for name in ("half", "quarter", "own")
    }
    assert widths == {"half": 40, "quarter": 20, "own": 40}
    lines = run.stdout.splitlines()
    assert "NamexQwen2MoeForCausalLM namex-full" in lines
    assert "layer 4, 5 of 5" in lines
    assert "recipe field 'experts' is 99" in lines[-1]
