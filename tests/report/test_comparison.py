"""What is written of given numbers: tables and their warnings, the page, the picture."""

import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from namex_hf.checkpoint.resolve import resolve
from namex_hf.evaluation.compare import FLOOR, ORIGINAL, Comparison, ComparisonPlan, assemble, make_plan_of
from namex_hf.evaluation.compare_table import answers, costs, markdown, notes, quality
from namex_hf.evaluation.equal_bytes import SizedRow
from namex_hf.evaluation.grid import grid, recipe_files
from namex_hf.evaluation.rows import row_of
from namex_hf.evaluation.settings import Settings
from namex_hf.report.comparison import page, write
from namex_hf.report.frontier import frontier
from tests.helpers.browser import browse, needs_browser
from tests.helpers.measurements import WINDOWS, result

SETTINGS = Settings(dict.fromkeys(WINDOWS, "a text"), 1024, 80)


def planned(tmp_path: Path, name: str = "a", **options: list[Any]) -> ComparisonPlan:
    (tmp_path / f"{name}.yaml").write_text("merge: grouped")
    (tmp_path / "b.yaml").write_text("merge: grouped\nmethod: ep-camex")
    cells = grid(recipe_files([tmp_path / f"{name}.yaml", tmp_path / "b.yaml"]), {"experts": [8, 4], **options})
    return make_plan_of(resolve("tiny-deepseek"), SETTINGS, cells)


def measured(plan: ComparisonPlan, **changes: Any) -> Comparison:
    """Worse with fewer experts; the floor is far off."""
    results = {ORIGINAL: result(0, experts=16), FLOOR: result(1, 3.0, 0)}
    for number, cell in enumerate(plan.cells, 2):
        experts = cell.recipe.to_dict()["experts"] or 0
        results[cell.label] = {**result(number, 0.4 - experts / 25, experts), **changes}
    return assemble(plan, results, {})


def test_every_row_has_a_cell_for_every_title(tmp_path: Path):
    found = measured(planned(tmp_path, seed=[0, 1, 2]))
    for titles, rows in (quality(found), costs(found)):
        assert {len(row) for row in rows} == {len(titles)}
    titles, rows = quality(found)
    told = dict(zip(titles, rows[6], strict=True))
    assert told["recipe"] == "a, mean of 3 seeds"
    for column in ("mean (95 %)", "code", "prose", "exact, %"):
        assert re.fullmatch(r"[\d.]+ ± [\d.]+", told[column])


def test_a_worst_domain_and_an_interval_are_those_of_the_row(tmp_path: Path):
    found = measured(planned(tmp_path))
    titles, rows = quality(found)
    row, told = found.rows[2], dict(zip(titles, rows[3], strict=True))
    assert told["worst"] == f"{max(row.ratios.values()):.3f} {max(row.ratios, key=row.ratios.__getitem__)}"
    assert row.difference_interval is not None
    low, high = row.difference_interval
    assert told["to the original (95 %)"] == f"{100 * row.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def test_answers_have_a_row_a_kind_with_the_paired_difference(tmp_path: Path):
    found = measured(planned(tmp_path))
    titles, rows = answers(found)
    assert [row[0] for row in rows] == [row.title for row in found.rows]
    shown, length = dict(zip(titles, rows[2], strict=True)), found.rows[2].answers["packaged"]["tokens"]
    assert (shown["kind"], shown["problems"]) == ("packaged", "80")
    assert shown["tokens"] == f"{length.value:.1f} ({length.difference:+.1f} ± {length.stderr:.1f})"
    assert rows[0][5] == f"{found.rows[0].answers['packaged']['tokens'].value:.1f}"
    assert "How each model answers" in page(found, [])


def test_another_router_is_compared_with_itself_unmerged_too(tmp_path: Path):
    """Beside the differences to the original, those to the same router without merging, which name its row."""
    for name, text in (("full", ""), ("smoe", "method: smoe"), ("linear", "routing: linear")):
        (tmp_path / f"{name}.yaml").write_text(f"routing: cosine\n{text}" if name != "linear" else text)
    cells = grid(recipe_files([tmp_path / f"{name}.yaml" for name in ("full", "smoe", "linear")]), {})
    plan = make_plan_of(resolve("tiny-deepseek"), SETTINGS, cells)
    found = measured(plan)
    titles, rows = quality(found)
    shown = {row[0]: dict(zip(titles, row, strict=True)) for row in rows}
    full, smoe = (found.results[name] for name in ("full", "smoe"))
    row = row_of("full", full, smoe)
    low, high = row.interval
    assert shown["full"]["same router, unmerged"] == "smoe"
    assert shown["full"]["mean to it (95 %)"] == f"{row.ratio:.3f} ({low:.3f} to {high:.3f})"
    answered = 100 * (sum(full["right"]) - sum(smoe["right"])) / len(full["right"])
    assert shown["full"]["exact to it (95 %)"].startswith(f"{answered:+.1f} (")
    for other in ("original", "smoe", "linear"):
        assert {shown[other][title] for title in titles if title.endswith(("unmerged", "to it (95 %)"))} == {""}
    assert any(note.startswith("Same router, unmerged: ") for note in notes(found))
    assert "unmerged" not in markdown(measured(planned(tmp_path)))


def test_times_that_are_not_comparable_are_named(tmp_path: Path):
    plan = planned(tmp_path)
    alike = " ".join(notes(measured(plan)))
    assert "not comparable" not in alike
    assert "Mean of" not in alike
    assert "rows were measured with different numbers of threads" in " ".join(notes(measured(plan, threads=2)))
    both = {label: {**one, "at_once": 3} for label, one in measured(plan).results.items()}
    assert "not comparable: 3 models were measured side by side" in " ".join(notes(assemble(plan, both, {})))


def test_the_same_recipe_and_failures_are_named(tmp_path: Path):
    plan = planned(tmp_path)
    found = measured(plan)
    same = replace(found, plan=replace(plan, same={**plan.same, "c": "a, experts 8"}), failed={"d": "no | more"})
    assert "The same recipe as a, experts 8, measured once: c." in notes(same)
    assert "* Failed: d: no | more." in markdown(same)


def test_what_comes_from_files_is_escaped(tmp_path: Path):
    evil = "a|b<script>"
    plan = planned(tmp_path, evil)
    found = replace(measured(plan), failed={evil: evil})
    text = page(found, [])
    assert text.count("<script") == 1  # that of sorting
    assert text.count("a|b&lt;script&gt;") >= 5
    rows = [line for line in markdown(found).splitlines() if line.startswith("| a")]
    assert rows
    assert all(line.startswith("| a\\|b<script> |") for line in rows)


def test_the_picture_has_a_line_a_recipe_and_the_mean_of_seeds(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")
    from namex_hf.report.pictures.comparison import picture

    found = measured(planned(tmp_path, seed=[0, 1]))
    drawn = picture(found)
    assert drawn is not None
    mean, worst = drawn.figure.axes
    assert [one.get_label() for one in mean.containers] == ["a", "b"]
    means = {(row.line, row.experts): row for row in found.rows if row.seeds}
    for axes in (mean, worst):
        for container in axes.containers:
            points = container.lines[0].get_xydata().tolist()
            rows = [means[container.get_label(), experts] for experts in (4, 8)]
            heights = [row.ratio if axes is mean else row.worst[1] for row in rows]
            assert points == [[4, pytest.approx(heights[0])], [8, pytest.approx(heights[1])]]
    bars = mean.containers[0].lines[2][0].get_segments()
    row = means["a", 4]
    assert row.spread is not None
    assert bars[0][:, 1].tolist() == pytest.approx([row.ratio - row.spread["ratio"], row.ratio + row.spread["ratio"]])
    assert [text.get_text() for text in mean.texts] == [f"routed experts removed: {found.rows[1].ratio:.2f}, above"]
    assert mean.get_yscale() == "linear"


def test_a_steep_picture_is_logarithmic_and_shows_a_near_floor(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")
    from namex_hf.report.pictures.comparison import picture

    found = measured(planned(tmp_path))
    rows = [replace(row, ratio=row.ratio * 10) if row.experts == 4 else row for row in found.rows]
    drawn = picture(replace(found, rows=rows))
    assert drawn is not None
    mean = drawn.figure.axes[0]
    assert mean.get_yscale() == "log"
    assert [text.get_text() for text in mean.texts] == [f"routed experts removed: {found.rows[1].ratio:.2f}"]
    row = next(row for row in found.rows if row.line == "a" and row.experts == 8)
    low, high = mean.containers[0].lines[2][0].get_segments()[1][:, 1].tolist()
    assert (low, high) == pytest.approx(row.interval)


def test_without_a_cell_there_is_a_page_and_no_picture(tmp_path: Path):
    plan = planned(tmp_path)
    found = assemble(plan, {ORIGINAL: result(0, experts=16)}, {cell.label: "no" for cell in plan.cells})
    assert write(found, tmp_path) is True
    assert "<img" not in (tmp_path / "index.html").read_text()
    assert not (tmp_path / "comparison.png").exists()


# --- answers over bytes ----------------------------------------------------------------------------------------------


def with_bytes(found: Comparison) -> Comparison:
    """Rows of 10, 8, 7 and 6 MB ... and shares that fall, but for one that is below a smaller model's."""
    sizes = {row.label: 10 - place for place, row in enumerate(row for row in found.rows if row.label != FLOOR)}
    shares = {10: 0.9, 9: 0.7, 8: 0.8, 7: 0.3, 6: 0.2}
    rows = [
        replace(row, exact=shares[sizes[row.label]], costs={**row.costs, "bytes": 1e6 * sizes[row.label]})
        if row.label in sizes
        else replace(row, costs={**row.costs, "bytes": 1e6})
        for row in found.rows
    ]
    return replace(found, rows=rows)


def test_no_model_of_the_frontier_is_surpassed_by_one_of_as_few_bytes(tmp_path: Path):
    found = with_bytes(measured(planned(tmp_path)))
    drawn = frontier(found)
    assert drawn is not None
    assert [(point.megabytes, point.exact) for point in drawn.points] == [
        (10, 90), (9, 70), (8, 80), (7, 30), (6, 20)
    ]  # fmt: skip
    assert [point.megabytes for point in drawn.pareto_front] == [6, 7, 8, 10]
    x, y = drawn.x, drawn.y
    assert x.place(6) < x.place(10)
    assert y.place(20) > y.place(90)
    assert drawn.left < x.place(6) < x.place(10) < drawn.right
    for axis in (x, y):
        assert 2 <= len(axis.ticks()) <= 7
        for place, text in axis.ticks():
            assert place == axis.place(float(text))
    assert "original: 90.0 % in 10.00 MB" in drawn.description


def test_models_of_equal_bytes_are_the_points_where_they_were_measured(tmp_path: Path):
    found = with_bytes(measured(planned(tmp_path)))
    sized = [SizedRow(found.rows[0], f"{bits} bit", bits, bits * 10**6) for bits in (16, 8, 4)]
    drawn = frontier(replace(found, sized=sized))
    assert drawn is not None
    assert [point.label for point in drawn.points] == [
        f"original, {bits} bit: 90.0 % in {bits}.00 MB" for bits in (16, 8, 4)
    ]
    assert frontier(replace(found, sized=sized[:1])) is None
    without = [replace(row, exact=None) for row in found.rows]
    others = frontier(replace(found, rows=without))
    assert others is not None
    assert others.points[0].exact == 100 * without[0].answers["packaged"]["right"].value  # of kinds that were asked
    assert frontier(replace(found, rows=[replace(row, answers={}) for row in without])) is None


def test_the_picture_of_the_docs_is_that_of_their_table() -> None:
    """`python benchmarks/answers_figure.py` writes it."""
    found = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "answers_figure.py"))
    assert len(found["points"]()) >= 16
    assert found["PICTURE"].read_text("utf-8") == found["picture"]()


SORT = """<script>
window.addEventListener("load", () => {
  const table = document.querySelectorAll("table")[0];
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const first = () => [...table.querySelectorAll("td:first-child")].map((one) => one.textContent).join("|");
  const place = [...table.querySelectorAll("th")].findIndex((one) => one.textContent === "exact, %");
  table.querySelectorAll("th button")[place].click();
  const rising = first();
  table.querySelectorAll("th button")[place].click();
  table.parentNode.scrollLeft = 200;
  const left = (one) => one.getBoundingClientRect().left;
  const stuck = Math.abs(left(table.querySelector("td")) - left(table.parentNode)) < 1;
  document.body.dataset.found = `wide=${wide} stuck=${stuck} rising=${rising} falling=${first()}`;
});
</script>"""


@needs_browser
@pytest.mark.parametrize("size", ["500,900", "1280,900"])
def test_in_a_browser_tables_are_sorted_and_their_first_column_stays(tmp_path: Path, size: str):
    found = with_bytes(measured(planned(tmp_path)))
    text = page(found, [])
    (tmp_path / "page.html").write_text(text)
    dom, said = browse(tmp_path / "page.html", f"--window-size={size}")
    assert said == ""  # the policy lets the script of sorting run
    assert dom.count("<button>") > 10
    policy = re.search(r'content="(default-src[^"]*)"', text)
    assert policy is not None
    (tmp_path / "page.html").write_text(text.replace(policy[1], "").replace("</body>", f"{SORT}</body>"))
    dom, _ = browse(tmp_path / "page.html", f"--window-size={size}")
    seen = re.search(r'data-found="wide=(\w+) stuck=(\w+) rising=([^"]*) falling=([^"]*)"', dom)
    assert seen is not None
    rows = ["original" if row.label == ORIGINAL else row.title for row in sorted(found.rows, key=lambda one: one.exact)]
    assert seen[1] == "false"
    assert seen[2] == "true"
    assert [one for one in seen[3].split("|") if "perplexity" not in one] == rows
    assert [one for one in seen[4].split("|") if "perplexity" not in one] == rows[::-1]
