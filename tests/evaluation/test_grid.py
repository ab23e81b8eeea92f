"""Recipe files times values: which cells there are, what they are called, and what is refused."""

from pathlib import Path

import pytest

from namex_hf import Recipe
from namex_hf.errors import RecipeError
from namex_hf.evaluation.grid import field_options, grid, recipe_files


def written(folder: Path, **recipes: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return [folder / f"{name}.yaml" for name in recipes]


def test_every_recipe_with_every_combination(tmp_path: Path):
    written(tmp_path / "a", ours="merge: grouped\nseed: 5", peer="merge: grouped\nmethod: ep-camex")
    cells = grid(recipe_files([tmp_path / "a"]), {"experts": [12, 8], "seed": [0, 1], "granularity": ["matrix"]})
    assert [cell.label for cell in cells] == [
        f"{name}, experts {experts}, seed {seed}" for name in ("ours", "peer") for experts in (12, 8) for seed in (0, 1)
    ]
    assert cells[3].recipe == Recipe(merge="grouped", experts=8, seed=1)
    assert cells[4].recipe == Recipe(merge="grouped", method="ep-camex", experts=12)
    one = cells[3]
    assert (one.title, one.family, one.line) == ("ours, seed 1", "ours, experts 8", "ours")
    assert one.slug == "ours-experts-8-seed-1"


def test_options_go_over_what_a_file_says_and_single_values_are_not_named(tmp_path: Path):
    files = recipe_files(written(tmp_path, one="merge: grouped\nexperts: 3\nmethod: ep-camex"))
    (cell,) = grid(files, {"experts": [5]})
    assert (cell.recipe.to_dict()["experts"], cell.recipe.merge.method, cell.label) == (5, "ep-camex", "one")


def test_without_files_the_options_are_the_recipe():
    cells = grid({}, field_options({"merge": ["grouped"], "experts": ["4", "2", "4"], "gamma": None}))
    assert [(cell.label, cell.recipe) for cell in cells] == [
        ("default, experts 4", Recipe(merge="grouped", experts=4)),
        ("default, experts 2", Recipe(merge="grouped", experts=2)),
    ]


def test_a_folder_gives_its_yaml_files_alone(tmp_path: Path):
    written(tmp_path, b="", a="")
    (tmp_path / "c.yml").write_text("")
    (tmp_path / "notes.txt").write_text("no recipe")
    written(tmp_path / "below", d="")
    assert list(recipe_files([tmp_path])) == ["a", "b", "c"]


def test_values_are_left_out_of_recipes_that_have_no_use_for_them(tmp_path: Path):
    """What no recipe uses, and what means nothing together, stays refused."""
    both = {"merge": ["grouped", "narrow"], "keep": [0.5], "fit": ["layer"]}
    cells = grid({}, {**both, "grouping": ["damage", "outputs"], "neurons": ["energy"]})
    assert [(cell.label, cell.unused) for cell in cells] == [
        ("default, merge grouped, grouping damage", ("neurons",)),
        ("default, merge grouped, grouping outputs", ("neurons",)),
        ("default, merge narrow", ("grouping",)),
    ]
    assert cells[2].recipe == Recipe(merge="narrow", keep=0.5, fit="layer", neurons="energy")
    with pytest.raises(RecipeError, match="'segment' belongs to merge 'soft'"):
        grid({}, {"merge": ["grouped", "narrow"], "keep": [0.5], "segment": [8]})
    with pytest.raises(RecipeError, match="merge 'narrow' keeps the router"):
        grid({}, {"merge": ["grouped", "narrow"], "keep": [0.5], "fit": ["router"]})


def test_a_member_that_the_rules_refuse_names_file_values_and_field(tmp_path: Path):
    (file,) = written(tmp_path, kept="base: shared")
    with pytest.raises(RecipeError) as refused:
        grid(recipe_files([file]), {"gamma": [0.5], "experts": [12, 8]})
    assert str(refused.value).startswith(f"{file} with gamma=0.5 experts=12: 'experts' belongs to merge 'grouped'")
    written(tmp_path, kept="bases: shared")
    with pytest.raises(RecipeError, match=f"^{file}: unknown recipe field 'bases'"):
        grid(recipe_files([file]), {})


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["nowhere.yaml"], "--recipes {0}/nowhere.yaml: no such file or folder; accepted: YAML files and folders"),
        (["empty"], "--recipes {0}/empty is a folder without recipes"),
        (["a/one.yaml", "b/one.yaml"], "--recipes {0}/a/one.yaml and {0}/b/one.yaml both have the label 'one'"),
        (["a/one.yaml", "b"], "both have the label 'one'"),
        (["a/two words.yaml", "a/two-words.yaml"], "both have the label 'two-words'"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, paths: list[str], said: str):
    (tmp_path / "empty").mkdir()
    for folder in ("a", "b"):
        written(tmp_path / folder, one="")
    for name in ("two words.yaml", "two-words.yaml"):
        (tmp_path / "a" / name).write_text("")
    with pytest.raises(RecipeError) as refused:
        recipe_files([tmp_path / path for path in paths])
    assert said.format(tmp_path) in str(refused.value)


def test_values_of_another_kind():
    with pytest.raises(RecipeError, match=r"recipe field 'experts' is '8.5'; accepted: int"):
        field_options({"experts": ["4", "8.5"]})


def test_words_for_true_and_false():
    cells = grid({}, field_options({"merge": ["soft"], "renormalise": ["false", "true"]}))
    assert [cell.recipe.to_dict()["renormalise"] for cell in cells] == [False, True]
    with pytest.raises(RecipeError, match="'renormalise' is 'no'; accepted: true, false"):
        grid({}, field_options({"merge": ["soft"], "renormalise": ["no"]}))
