"""The wheel in an environment of its own: every command works without the clone, or names the extra that it needs."""

import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from namex_hf import __version__
from namex_hf.errors import install
from tests.helpers.wheel import ROOT, build, environment_with, of_extras_alone

pytest.importorskip("hatchling", reason="the wheel is built with hatchling, which the extra 'dev' brings")
Command = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("--keep", "0.5", "--calibration-tokens", "4096")
WHERE = """
import importlib.util, json, sys
import namex_hf
from namex_hf.resources import beside, packaged_models, packaged_recipes
paths = [beside("finetune") / "configs", beside("eval") / "tasks", beside("eval") / "recipes"]
paths += packaged_recipes().values()
present = [name for name in sys.argv[1:] if importlib.util.find_spec(name.replace("-", "_"))]
print(json.dumps([namex_hf.__file__, packaged_models(), list(map(str, paths)), present]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A program of the environment in an empty folder, without what the tests' own environment says."""
    folder = tmp_path_factory.mktemp("far")
    own = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PATH": f"{place}/bin"}
    own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

    def started(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(place / "bin" / program), *arguments]
        return subprocess.run(
            command, cwd=folder, env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
        )

    return started


@pytest.fixture(scope="module")
def namex(run: Command) -> Callable[..., str]:
    """Standard output of a command that ends well."""

    def ended(*arguments: str) -> str:
        done = run("namex", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return ended


def test_it_holds_what_the_repository_holds(wheel: Path) -> None:
    """Every file of the package, and what lies beside it and is needed at run time."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = set[str]()
    for folder in ("namex_hf", "patches", "finetune/configs", "eval/recipes", "eval/tasks"):
        inside = "" if folder == "namex_hf" else "namex_hf/"
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {f"{inside}{path.relative_to(ROOT).as_posix()}" for path in files}
    assert names == wanted | {"namex_hf/eval/paper_tables.json"}


def test_everything_comes_from_the_wheel_and_no_extra_is_there(run: Command, place: Path) -> None:
    extras = of_extras_alone()
    assert {"accelerate", "datasets", "peft", "trl", "lm-eval", "matplotlib", "cvxpy", "psutil"} <= extras
    done = run("python", "-c", WHERE, *sorted(extras))
    assert done.returncode == 0, done.stderr
    module, models, paths, present = json.loads(done.stdout)
    assert present == []
    assert models == ["tiny", "tiny-deepseek", "tiny-qwen3"]
    assert len(paths) == len(list((ROOT / "patches").rglob("*.yaml"))) + 3
    for path in map(Path, [module, *paths]):
        assert path.is_relative_to(place), path
        assert path.exists(), path


def test_commands_that_say_what_there_is(namex: Callable[..., str]) -> None:
    assert namex("--version") == f"namex_hf {__version__}\n"
    recipes = {path.relative_to(ROOT / "patches").with_suffix("") for path in (ROOT / "patches").rglob("*.yaml")}
    assert [Path(line.split()[0]) for line in namex("recipes").splitlines()] == sorted(recipes, key=str)
    assert json.loads(namex("inspect", "tiny", "--json"))["family"] == "qwen2_moe"


def test_from_a_model_to_the_hub(run: Command, namex: Callable[..., str]) -> None:
    """A model is patched, drawn without matplotlib, checked for the Hub, and opened by transformers alone."""
    done = run("namex", "patch", "tiny", "--out", "half", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "Perplexity is 1." in done.stdout
    drawn = run("namex", "report", "half", "--out", "page")
    assert (drawn.returncode, Path(drawn.stdout.strip())) == (0, Path("page/report.html"))
    for said in (done.stderr, drawn.stderr):
        assert [line for line in said.splitlines() if "namex-hf[" in line] == [
            f"no pictures: they need the extra 'report': {install('report')}"
        ]
    assert "model.safetensors" in namex("push", "half", "--repo", "u/n", "--dry-run")


def test_a_comparison(run: Command) -> None:
    short = ("--tokens", "512", "--problems", "0", "--json")
    done = run("namex", "compare", "tiny", "--out", "compared", *QUICK, *short)
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["original"]["costs"]["bytes"] > rows["default"]["costs"]["bytes"]


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("tune", "--output_dir", "tuned"), "train"),
        (("score", "half", "--tasks", "namex_sums"), "eval"),
        (("patch", "tiny", "--out", "ccp", "--method", "namex", "--solver", "ccp"), "ccp"),
    ],
)
def test_what_needs_an_extra_names_it_in_one_line(run: Command, arguments: tuple[str, ...], extra: str) -> None:
    done = run("namex", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.endswith(f"pip install 'namex-hf[{extra}]', in a clone pip install '.[{extra}]'\n")
