"""``import namex_hf`` is light, and opens patched folders whichever of it and transformers is imported first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from namex_hf import Recipe, patch_checkpoint
from tests.helpers.toy_models import save_toy

ROOT = Path(__file__).parents[1]
OURS_FIRST = """
import importlib.util, sys
from concurrent.futures import ThreadPoolExecutor
import namex_hf
heavy = {"torch", "transformers", "numpy", "scipy", "rich", "huggingface_hub", "safetensors"}
assert not heavy & {*sys.modules}, heavy & {*sys.modules}
assert {"patch_model", "__version__"} <= {*dir(namex_hf)}
finders = list(sys.meta_path)
assert importlib.util.find_spec("transformers") is not None  # a look is no import
sys.modules["huggingface_hub"] = None
try:
    import transformers.models.auto.modeling_auto
except ImportError as error:
    assert "huggingface_hub" in str(error), error
else:
    raise AssertionError("an import without huggingface_hub")
assert "namex_hf.models" not in sys.modules
assert sys.meta_path == finders
for name in [name for name in sys.modules if name.partition(".")[0] in ("transformers", "huggingface_hub")]:
    del sys.modules[name]
with ThreadPoolExecutor(2) as threads:
    auto = list(threads.map(importlib.import_module, ["transformers.models.auto.modeling_auto"] * 2))
assert [type(finder).__module__ for finder in sys.meta_path].count("namex_hf.registration") == 0
assert namex_hf.Recipe().merge.kind == "residual"
"""
THEIRS_FIRST = """
import sys
import transformers
finders = list(sys.meta_path)
import namex_hf
assert sys.meta_path == finders
"""
OPENS = """
from transformers import AutoConfig, AutoModelForCausalLM
for name in sys.argv[1:]:
    assert type(AutoConfig.from_pretrained(name)).__module__.startswith("namex_hf.models"), name
    assert type(AutoModelForCausalLM.from_pretrained(name)).__module__.startswith("namex_hf.models"), name
"""
PARSES = """
import contextlib, io, sys
from namex_hf.commands.namex import main
for line in ("--help", "--version", "patch --help", "patch --help-all", "patch tiny --out o --metod x",
             "patch tiny --out o --method x", "compare --help", "push --help", "report --help", "inspect --x",
             "recipes", "completion bash --after patch --method"):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(line.split())
    heavy = {"torch", "transformers", "numpy", "scipy", "rich", "safetensors"} & {*sys.modules}
    assert not heavy, (line, heavy)
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A patched toy of each family."""
    folder = tmp_path_factory.mktemp("patched")
    for family in ("qwen2_moe", "deepseek"):
        patch_checkpoint(save_toy(folder / "toys" / family, family), folder / family, Recipe())
    return [folder / "qwen2_moe", folder / "deepseek"]


@pytest.mark.parametrize("imports", [OURS_FIRST, THEIRS_FIRST], ids=["ours first", "theirs first"])
def test_patched_folders_open(patched: list[Path], imports: str):
    command = [sys.executable, "-c", imports + OPENS, *map(str, patched)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr


def test_parsers_import_no_library():
    run = subprocess.run(
        [sys.executable, "-c", PARSES], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr


def test_an_unknown_name():
    import namex_hf

    with pytest.raises(AttributeError, match="no attribute 'patch_modle'"):
        _ = namex_hf.patch_modle


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_wait_for_a_short_time_unless_the_environment_says_otherwise(given: dict[str, str], found: str) -> None:
    """It is set before torch is imported, whose threads read it then."""
    code = (
        "import os, sys\nfrom namex_hf.commands.common import loading\nassert 'torch' not in sys.modules\n"
        "with loading():\n    print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **given}, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ran.stdout.strip() == found
