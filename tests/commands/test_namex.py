"""``namex``: every command by its name, recipes by theirs, answers as JSON, and what was probably meant."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers

from namex_hf import Recipe, __version__, resources
from namex_hf.commands.common import Parser
from namex_hf.commands.completion import words_after
from namex_hf.commands.namex import COMMANDS, main
from namex_hf.commands.recipe_options import add_recipe_options
from namex_hf.recipe import FIELDS
from tests.helpers.toy_models import save_toy

ROOT = Path(__file__).parents[2]
RECIPES = {
    path.relative_to(ROOT / "patches").with_suffix("").as_posix(): path for path in (ROOT / "patches").rglob("*.yaml")
}
Said = pytest.CaptureFixture[str]


def said(capsys: Said, *arguments: object) -> str:
    """What a command prints that ends well and has nothing to complain of."""
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def complaint(capsys: Said, *arguments: object) -> str:
    """The one line of a command that is refused."""
    try:
        status: object = main([str(argument) for argument in arguments])
    except SystemExit as ended:  # of the parser
        status = ended.code
    printed = capsys.readouterr()
    assert (status, printed.out, printed.err.count("\n")) == (2, "", 1)
    return printed.err


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer."""
    return save_toy(tmp_path_factory.mktemp("toys") / "toy")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers(capsys: Said, name: str):
    assert name in said(capsys)
    for flag, answer in (("--version", f"namex_hf {__version__}\n"), ("--help", f"usage: namex {name} ")):
        with pytest.raises(SystemExit) as ended:
            main([name, flag])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(answer)
    assert complaint(capsys, name, "--jsno").startswith(f"namex {name}: error: ")


def test_the_help_shows_the_common_options_and_no_refused_combination(capsys: Said):
    with pytest.raises(SystemExit):
        main(["patch", "--help"])
    text = capsys.readouterr().out
    for flag in ("out", "dry-run", "recipe", "merge", "experts", "method", "routing", "disagreement", "help-all"):
        assert f"--{flag} " in text
    for flag in ("ccp-iterations", "shard-size", "routing-span"):
        assert f"--{flag} " not in text
    assert "belongs to" not in text
    assert text.count("\n  namex patch ") == 3  # examples


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("ptach tiny", "no command 'ptach'; accepted: patch, compare,"),
        ("ptach tiny", "did you mean 'patch'?"),
        ("--versoin", "unrecognized arguments: --versoin; did you mean '--version'?"),
        ("patch tiny --out o --metod=namex", "unrecognized arguments: --metod=namex; did you mean '--method'?"),
        (
            "patch tiny --out o --method names",
            "'names'; accepted: namex-full, namex, ep-camex, camex, smear, smoe; did",
        ),
        ("patch tiny --out o --method names", "did you mean 'namex'?"),
        ("patch tiny --out o --method 3", "accepted: namex-full, namex, ep-camex, camex, smear, smoe\n"),
        ("patch tiny --out o --recipe deepseek-moe/namex-full", "did you mean 'deepseek-moe-16b/namex-full'?"),
        ("compare tiny --out o --recipes nmaex", "--recipes nmaex: no such file or folder; accepted: a YAML file, or"),
        ("completion tcsh", "invalid choice: 'tcsh'"),
    ],
)
def test_what_was_meant(capsys: Said, arguments: str, says: str):
    assert says in complaint(capsys, *arguments.split())


def test_what_a_field_of_a_file_was_meant_to_be(capsys: Said, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("metod: namex\n")
    assert complaint(capsys, "patch", "tiny", "--out", "o", "--recipe", tmp_path / "recipe.yaml").endswith(
        "; did you mean 'method'?\n"
    )


def test_recipes(capsys: Said):
    lines = said(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == sorted(RECIPES)
    assert f"# {lines[0].partition('  ')[2].strip()}" == RECIPES[min(RECIPES)].read_text().splitlines()[0]
    listed = {recipe["name"]: recipe for recipe in json.loads(said(capsys, "recipes", "--json"))}
    assert listed.keys() == RECIPES.keys()
    name = "qwen1.5-moe-a2.7b/grouped-30-namex-full"
    assert Path(listed[name]["file"]).samefile(RECIPES[name])
    assert Recipe.from_dict(listed[name]["fields"]) == Recipe.from_yaml(RECIPES[name])


def test_a_recipe_by_its_name(capsys: Said, toy: Path, tmp_path: Path):
    command = ["patch", toy, "--out", tmp_path / "out", "--recipe", "qwen1.5-moe-a2.7b/grouped-30-namex-full"]
    assert "recipe field 'experts' is 30; this model has 8" in complaint(capsys, *command)
    what = json.loads(said(capsys, *command, "--experts", 4, "--dry-run", "--json"))
    assert (what["layers"], what["experts"], what["kept"], what["effort"]) == (3, 8, 4, None)
    assert not (tmp_path / "out").exists()


def test_a_file_goes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name = min(RECIPES)
    assert resources.recipe_path(name).samefile(RECIPES[name])
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("method: namex\n")
    assert resources.recipe_path(name) == Path(name)


def test_recipes_in_the_package_go_before_those_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a wheel ``patches/`` lies inside the package."""
    monkeypatch.setattr(resources, "HERE", tmp_path / "namex_hf")
    assert resources.packaged_recipes() == {}
    shutil.copytree(ROOT / "patches", tmp_path / "patches")
    assert resources.packaged_recipes()[min(RECIPES)].parts[-3:] == ("patches", *f"{min(RECIPES)}.yaml".split("/"))
    inside = tmp_path / "namex_hf" / "patches" / "only.yaml"
    inside.parent.mkdir(parents=True)
    inside.write_text("{}")
    assert resources.packaged_recipes() == {"only": inside}


def test_a_patch_prints_its_report(capsys: Said, toy: Path, tmp_path: Path):
    command = ["patch", toy, "--out", tmp_path / "out", "--quiet", "--json"]
    first = json.loads(said(capsys, *command))
    assert first == json.loads((tmp_path / "out" / "namex" / "report.json").read_text())
    assert [layer["layer"] for layer in first["layers"]] == [0, 1, 2]
    assert json.loads(said(capsys, *command)) == first  # complete before
    facts = json.loads(said(capsys, "inspect", tmp_path / "out", "--json"))
    assert facts["patched"] == "residual, namex-full, linear"
    assert facts["bytes of base experts"] == 3 * 3 * 8 * 16 * 2


def test_the_environment(capsys: Said):
    facts = json.loads(said(capsys, "env", "--json"))
    assert facts["namex_hf"] == __version__
    assert facts["python"] == sys.version.split()[0]
    assert (facts["torch"], facts["transformers"]) == (torch.__version__, transformers.__version__)
    assert facts["extras"].keys() == {"ccp", "train", "eval", "report"}
    assert facts["devices"][0].startswith("cpu (")
    assert f"torch             {torch.__version__}" in said(capsys, "env").splitlines()


def test_an_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    env = import_module("namex_hf.commands.env")
    monkeypatch.setattr(
        env.metadata,
        "requires",
        lambda name: ["torch<3,>=2.13", "no-such-package>=1; extra == 'ccp'", "x; extra == 'dev'"],
    )
    installed = version("torch")  # without the build, where that is not part of the wheel's version
    assert env.required() == {"torch": installed, "extras": {"ccp": {"no-such-package": "not installed"}}}


def test_words_that_may_follow():
    assert words_after([]) == list(COMMANDS)
    assert {"tiny", "--out", "--routing-span"} <= {*words_after(["patch"])}
    assert words_after(["patch", "tiny", "--routing"]) == ["linear", "cosine", "stable"]
    assert words_after(["patch", "--renormalise"]) == ["false", "true"]
    assert words_after(["patch", "--recipe"]) == sorted(RECIPES)
    assert words_after(["patch", "tiny", "--out"]) == []  # a folder, which the shell completes
    assert words_after(["nothing"]) == []
    assert [name for name in COMMANDS if not words_after([name])] == ["tune"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(capsys: Said):
    lines = [
        f'namex() {{ "{sys.executable}" -m namex_hf "$@"; }}',
        said(capsys, "completion", "bash"),
        "COMP_WORDS=(namex patch --disagreement m) COMP_CWORD=3",
        '_namex && echo "${COMPREPLY[@]}"',
    ]
    run = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "mean\n", "")


def test_fields_of_the_parser_are_those_of_the_recipe():
    parser = Parser(prog="namex")
    add_recipe_options(parser)
    options = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert [name for name in FIELDS if name in options] == [*Recipe().to_dict(), "device"]
    assert options["method"].metavar == "namex-full|namex|ep-camex|camex|smear|smoe"
    assert options["renormalise"].metavar == "false|true"
    assert options["renormalise"].help.endswith(" (default: false)")
    assert options["experts"].metavar == "INT"
    assert "default" not in options["experts"].help
