"""Real runs on the packaged model: processes, files, resuming, failing."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import CalibrationError, CheckpointError, OutputError, RecipeError
from namex_hf.evaluation.closeness import window_closeness
from namex_hf.evaluation.compare import (
    BEGINS,
    ENDED,
    FLOOR,
    KNOWN,
    ORIGINAL,
    ComparisonPlan,
    RunOptions,
    compare,
    make_plan_of,
)
from namex_hf.evaluation.compare_table import quality
from namex_hf.evaluation.generation import as_chat, generated_answers
from namex_hf.evaluation.grid import Cell, grid, recipe_files
from namex_hf.evaluation.loading import load, tokenizer_of
from namex_hf.evaluation.perplexity import perplexities, text_ids
from namex_hf.evaluation.problems.kinds import ALL
from namex_hf.evaluation.settings import Settings
from namex_hf.progress import ProgressEvent
from namex_hf.report.comparison import as_json
from tests.helpers.killing import hold_folder
from tests.helpers.process import SERVER

SOURCE = "tiny-deepseek"


def quiet(event: ProgressEvent) -> None:
    pass


class Heard(list[tuple[str, str]]):
    """Which cells began, and which were known. Args: out: where no model may be left of a cell that has ended."""

    def __init__(self, out: Path | None = None) -> None:
        super().__init__()
        self.out = out

    def __call__(self, event: ProgressEvent) -> None:
        if event.stage in (BEGINS, KNOWN):
            self.append((event.model, event.stage))
        if event.stage == ENDED and self.out:
            assert not list((self.out / "work").iterdir())


def cells(**options: list) -> list[Cell]:
    return grid({}, {"merge": ["grouped"], **options})


def planned(few: Settings, *of: Cell) -> ComparisonPlan:
    return make_plan_of(resolve(SOURCE), few, list(of))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_then_more_recipes_then_nothing_is_measured_twice(few: Settings, tmp_path: Path):
    out, how = tmp_path / "out", RunOptions(keep=True)
    twelve, eight = cells(experts=[12, 8])
    heard = Heard()
    found = compare(planned(few, twelve), out, how, heard)
    assert heard == [(ORIGINAL, BEGINS), (FLOOR, BEGINS), (twelve.label, BEGINS)]
    assert not (out / "work").exists()

    kept = out / "models" / twelve.slug
    patch_checkpoint(SOURCE, tmp_path / "alone", Recipe(merge="grouped", experts=12))
    for file in ("model.safetensors", "config.json"):
        assert (kept / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    scored = {}
    tokenizer = tokenizer_of(kept)
    for name, folder in (("before", resolve(SOURCE).folder), ("after", kept)):
        scored[name] = perplexities(load(folder), tokenizer, few.texts, few.tokens)
    assert [row.label for row in found.rows] == [ORIGINAL, FLOOR, twelve.label]
    row = found.rows[2]
    assert row.ratio == pytest.approx(scored["after"]["mean"] / scored["before"]["mean"], rel=1e-5)
    assert row.interval is not None
    assert row.interval[0] <= row.ratio <= row.interval[1]
    assert row.recipe == Recipe(merge="grouped", experts=12).to_dict()
    assert row.costs["bytes"] == sum(span.size for span in resolve(kept).spans.values())
    assert 0 < row.costs["seconds"] < 60
    assert 1e8 < row.costs["peak_resident_bytes"] < 2e9
    if Path("/proc/self/clear_refs").is_file():
        assert row.costs["bytes"] * 2 < row.costs["memory"] < 2e9  # bfloat16, loaded in float32
        assert found.rows[1].costs["memory"] is None
    assert min(row.costs["prefill"], row.costs["decode"]) > 0
    assert found.rows[1].ratio > row.ratio > 1
    assert found.rows[1].costs["prefill"] is None

    before = (out / "cells/results.jsonl").read_bytes()
    heard = Heard(out)
    twice = replace(twelve, name="again")  # the same recipe in another file
    more = compare(planned(few, twelve, eight, twice), out, RunOptions(jobs=2), heard)
    assert heard == [(ORIGINAL, KNOWN), (FLOOR, KNOWN), (twelve.label, KNOWN), (eight.label, BEGINS)]
    after = (out / "cells/results.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 1 + 4, "the run, and four models"
    assert not (out / "models" / eight.slug).exists()
    assert [row.label for row in more.rows] == [ORIGINAL, FLOOR, twelve.label, twice.label, eight.label]
    assert replace(more.rows[3], label="", title="", line=None) == replace(row, label="", title="", line=None)

    assert [more.results[label]["at_once"] for label in (twelve.label, eight.label)] == [1, 2]

    told = json.loads(as_json(more))
    stored = [json.loads(line) for line in (out / told["rows"][2]["file"]).read_text().splitlines()]
    assert [one["result"] for one in stored if one.get("key") == told["rows"][2]["key"]] == [more.results[twelve.label]]
    assert told["rows"][2]["recipe"]["experts"] == 12
    assert told["run"]["texts"].keys() == {"prose"}

    report = kept / "namex/report.json"
    other = json.loads(report.read_text())
    other["run"]["recipe"]["gamma"] = 0.5
    report.write_text(json.dumps(other))  # a model that is to be kept and is another's is made again
    heard = Heard()
    compare(planned(few, twelve), out, how, heard)
    assert heard == [(ORIGINAL, KNOWN), (FLOOR, KNOWN), (twelve.label, BEGINS)]
    assert json.loads(report.read_text())["run"]["recipe"] == row.recipe

    assert refused(planned(replace(few, tokens=512)), out).startswith(
        f"{out} belongs to a run with another tokens; use --overwrite or another folder"
    )


def test_closeness_is_that_of_the_written_model_and_only_where_asked_for(few: Settings, tmp_path: Path):
    (twelve,) = cells(experts=[12])
    plan = planned(replace(few, closeness=True), twelve)
    found = compare(plan, tmp_path / "out", RunOptions(keep=True), quiet)
    original, floor, row = found.rows
    assert original.closeness is None
    models = [load(folder) for folder in (resolve(SOURCE).folder, tmp_path / "out" / "models" / twelve.slug)]
    ids = text_ids(tokenizer_of(resolve(SOURCE).folder), few.texts, few.tokens)["prose"]
    accepted, diverged = window_closeness(*models, ids)
    assert row.closeness["acceptance"].value == pytest.approx(sum(accepted) / len(accepted), rel=1e-6)
    assert row.closeness["divergence"].value == pytest.approx(sum(diverged) / len(diverged), rel=1e-5)
    assert floor.closeness["acceptance"].value < row.closeness["acceptance"].value < 1
    shown = dict(zip(*[quality(found).titles, quality(found).rows[3]], strict=True))
    assert shown["accepted, %"].startswith(f"{100 * row.closeness['acceptance'].value:.1f} ± ")
    assert "KL, nats" not in quality(replace(found, plan=planned(few, twelve))).titles


def test_kinds_of_problems_are_asked_in_place_of_the_packaged_ones(few: Settings, tmp_path: Path):
    """A chat and a one-line kind, of which each answer is what the loaded model writes."""
    asked = replace(few, tokens=64, problems=3, kinds=("lookup", "chats"))
    found = compare(planned(asked), tmp_path / "out", RunOptions(), quiet)
    folder, original = resolve(SOURCE).folder, found.original
    model, tokenizer = load(folder), tokenizer_of(folder)
    assert original["right"] is None
    assert list(original["answers"]) == ["lookup", "chats"]
    for kind, measured in original["answers"].items():
        problems = asked.made()[kind]
        chat = kind == "chats"
        prompts = [as_chat(tokenizer, one.turns) if chat else one.prompt for one in problems]
        written = generated_answers(model, tokenizer, prompts, ALL[kind].NEW_TOKENS, chat=chat, one_line=not chat)
        assert measured["right"] == [ALL[kind].check(a.text, b) for a, b in zip(written, problems, strict=True)]
        assert measured["tokens"] == [one.tokens for one in written]
        assert measured["cut"] == [one.cut for one in written]
    assert refused(planned(replace(asked, problem_seed="choices")), tmp_path / "out").startswith(
        f"{tmp_path / 'out'} belongs to a run with another "
    )


def test_a_kind_that_the_model_cannot_be_asked(few: Settings, tmp_path: Path):
    source = Path(shutil.copytree(resolve(SOURCE).folder, tmp_path / "source"))
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 300}))
    for kind, said in (
        ("tools", "source: its tokenizer has no chat template; --kinds tools needs one"),
        ("copying", r"source attends to 300 tokens; --kinds copying needs \d+ with the answer"),
    ):
        with pytest.raises(CheckpointError, match=said):
            make_plan_of(resolve(source), replace(few, problems=50, kinds=(kind,)), [])


def refused(plan: ComparisonPlan, out: Path) -> str:
    """What is said to a run on a folder, which is left as it was."""

    def found() -> dict[str, bytes]:
        return {name: data for name, (data, _) in contents(out).items()} if out.is_dir() else {}

    before = found()
    with pytest.raises(OutputError) as error:
        compare(plan, out, RunOptions(), quiet)
    assert found() == before
    return str(error.value)


def test_a_source_that_changed_in_place(few: Settings, tmp_path: Path):
    """Touched: known. A damaged cell: measured again. Other bytes: refused, and measured anew with ``overwrite``."""
    source, out = Path(shutil.copytree(resolve(SOURCE).folder, tmp_path / "source")), tmp_path / "out"

    def plan() -> ComparisonPlan:
        return make_plan_of(resolve(source), few, [])

    first = compare(plan(), out, RunOptions(), quiet)
    for path in source.iterdir():
        path.touch()
    heard = Heard()
    assert compare(plan(), out, RunOptions(), heard).original == first.original
    assert heard == [(ORIGINAL, KNOWN), (FLOOR, KNOWN)]
    for path in (out / "cells").iterdir():
        path.write_text(path.read_text().replace(".", ".1", 1))
    heard = Heard()
    again = compare(plan(), out, RunOptions(), heard)
    assert heard == [(ORIGINAL, BEGINS), (FLOOR, BEGINS)]
    assert again.original["losses"] == first.original["losses"]
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data + b"\n" if name.endswith(".json") else data[:-1] + b"?")
        assert refused(plan(), out).endswith(f"another source; use --overwrite or another folder ({name}: other bytes)")
        if name != "model.safetensors":
            (source / name).write_bytes(data)
    heard = Heard()
    compare(plan(), out, RunOptions(overwrite=True), heard)
    assert heard == [(ORIGINAL, BEGINS), (FLOOR, BEGINS)]
    heard = Heard()
    compare(plan(), out, RunOptions(overwrite=True), heard)
    assert heard == [(ORIGINAL, BEGINS), (FLOOR, BEGINS)]


def test_folders_that_are_refused(few: Settings, tmp_path: Path):
    plan = planned(few)
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(plan, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").write_text("mine")
    assert "holds something else" in refused(plan, tmp_path / "other")
    assert "is the model's own folder" in refused(plan, plan.checkpoint.folder / "out")
    claimed, release = SERVER.Event(), SERVER.Event()
    process = SERVER.Process(target=hold_folder, args=(tmp_path / "held", claimed, release))
    process.start()
    claimed.wait()
    (tmp_path / "held" / ".namex" / "run.json").write_text(json.dumps(plan.run))  # of the same run
    try:
        assert "is in use by another run" in refused(plan, tmp_path / "held")
    finally:
        release.set()
        process.join()


def test_a_cell_that_fails_is_told_of_and_the_others_go_on(few: Settings, tmp_path: Path):
    """Its calibration text goes away after all was checked; another's process is killed."""
    text = tmp_path / "calibration.txt"
    text.write_text((Path(resolve(SOURCE).folder).parent / "calibration" / "prose.txt").read_text("utf-8")[:40000])
    reads = {"calibration_data": [str(text)], "calibration_tokens": [2048], "fit": ["router"], "fit_steps": [10]}
    (fails,) = cells(experts=[12], **reads)
    killed, stands = cells(experts=[8, 4])
    fails = replace(fails, name="fails")

    def disturb(event: ProgressEvent) -> None:
        if event.model == fails.label and event.stage == BEGINS:
            text.unlink()
        if event.model == killed.label and event.stage.startswith("perplexity"):
            for process in multiprocessing.active_children():
                process.kill()

    out = tmp_path / "out"
    found = compare(planned(few, fails, killed, stands), out, RunOptions(keep=True), disturb)
    assert found.failed.keys() == {fails.label, killed.label}
    assert found.failed[fails.label].startswith(f"calibration data {text}: no such file or folder")
    assert found.failed[killed.label] == "its process was killed by signal 9 (out of memory?)"
    assert [row.label for row in found.rows] == [ORIGINAL, FLOOR, stands.label]
    assert sorted(path.name for path in (out / "models").iterdir()) == [stands.slug]


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ({"experts": [17]}, RecipeError, "the default recipe with merge=grouped experts=17: recipe field 'experts' is"),
        (
            {"experts": [8], "calibration_data": ["no.txt"], "fit": ["router"]},
            CalibrationError,
            "no.txt fit=router: cal",
        ),
    ],
)
def test_recipes_that_do_not_fit_the_model(few: Settings, values: dict, kind: type, said: str):
    with pytest.raises(kind) as error:
        planned(few, *cells(**values))
    assert said in str(error.value)


def test_a_file_with_a_reference_s_label(few: Settings, tmp_path: Path):
    (tmp_path / "original.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"original.yaml: label 'original' is that of another row; rename the file"):
        planned(few, *grid(recipe_files([tmp_path / "original.yaml"]), {}))


def test_two_cells_of_one_folder_name(few: Settings, tmp_path: Path):
    (tmp_path / "a.yaml").write_text("momentum: complex")
    of = grid(recipe_files([tmp_path / "a.yaml"]), {"beta": ["0.9,0.2", "0.9, 0.2"]})
    with pytest.raises(RecipeError, match=r"with beta=0.9, 0.2: label 'a, beta 0.9, 0.2' is that of another row"):
        planned(few, *of)


def test_a_text_without_tokens(few: Settings):
    with pytest.raises(CalibrationError, match="--texts prose has 0 tokens; accepted: texts of 2 or more"):
        planned(replace(few, texts={"prose": ""}))
