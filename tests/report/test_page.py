"""The page of a report: self-contained, escaped, and whole in a real browser."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")

from namex_hf.report.answers import answers
from namex_hf.report.card import card
from namex_hf.report.distances import distances
from namex_hf.report.folder import open_patched
from namex_hf.report.page import POLICY, page
from namex_hf.report.pictures import Material, Picture, draw
from tests.helpers.browser import browse, needs_browser

FORMS = ("qwen2_moe residual", "qwen2_moe calibrated")
LOOK = """<script>
window.addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const empty = [...document.images].filter((one) => !one.complete || !one.naturalWidth || !one.clientHeight);
  const dark = document.images[0].currentSrc !== document.images[0].src;
  const values = [...document.querySelectorAll(".values")];
  const under = values.filter((one) => {
    one.scrollIntoView();
    const mark = one.querySelector("rect").getBoundingClientRect();
    const hit = document.elementFromPoint(mark.x + mark.width / 2, mark.y + mark.height / 2);
    return one.contains(hit) && hit.textContent.length > 3;
  });
  const named = values.length > 0 && under.length === values.length;
  document.body.dataset.found =
    `overflow=${wide} empty=${empty.length} images=${document.images.length} dark=${dark} named=${named}`;
});
</script>"""


@pytest.fixture(scope="module")
def pages(patched: dict[str, Path]) -> dict[str, tuple[str, list[Picture]]]:
    found = {}
    for form in FORMS:
        folder = open_patched(patched[form])
        pictures = draw(Material(folder, answers(folder, 1024), distances(folder)))
        report = folder.report.with_perplexity({"prose": {"before": 2.0, "after": 3.0}})
        found[form] = page(report, folder.recipe.to_yaml(), pictures), pictures
    return found


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_fetched_or_run(pages: dict[str, tuple[str, list[Picture]]], form: str):
    text, _ = pages[form]
    assert f'content="{POLICY}"' in text
    assert not re.findall(r"<script|<iframe|<object|@import|\bon\w+=", text)
    for place in re.findall(r'(?:src|srcset|href)="([^"]*)"', text):
        assert place.startswith("data:")


@pytest.mark.parametrize("form", FORMS)
def test_every_picture_is_there_in_light_and_dark_with_its_line(pages: dict[str, tuple[str, list[Picture]]], form: str):
    text, pictures = pages[form]
    light, dark = re.findall(r'<img [^>]*src="([^"]*)"', text), re.findall(r'srcset="([^"]*)"', text)
    assert len(light) == len(dark) == len(pictures) > 4
    for one, other in zip(light, dark, strict=True):
        assert one != other
        for place in (one, other):
            assert b"<svg" in base64.b64decode(place.removeprefix("data:image/svg+xml;base64,"))
    for picture in pictures:
        assert picture.title in text
    assert "1.500" in text  # the ratio of the perplexities
    assert "namex-full" in text


def test_every_tag_is_closed(pages: dict[str, tuple[str, list[Picture]]]):
    open_tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "link", "img", "source"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Tags().feed(pages[FORMS[0]][0])
    assert open_tags == []


def test_what_a_checkpoint_says_is_escaped(patched: dict[str, Path]):
    folder = open_patched(patched[FORMS[0]])
    evil = '"><script>alert(1)</script>'
    report = replace(
        folder.report,
        source={**folder.report.source, "name": evil},
        run={**folder.report.run, "recipe": {**folder.report.run["recipe"], "method": evil}},
        versions={evil: evil},
        perplexity={evil: {"before": 1.0, "after": 1.0}},
        layers=[{**folder.report.layers[0], "games": [{**folder.report.layers[0]["games"][0], "status": evil}]}],
    )
    text = page(report, evil, [])
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6


def test_a_perplexity_of_zero_has_no_ratio(patched: dict[str, Path]):
    folder = open_patched(patched[FORMS[0]])
    report = folder.report.with_perplexity({"prose": {"before": 0.0, "after": 3.0}})
    assert ">nan<" in page(report, "", [])
    assert "| prose | 0.00 | 3.00 | nan |" in card(report, {})


def test_the_run_is_a_strip_of_numbers_with_a_better_command(patched: dict[str, Path]):
    """Of fewer experts: how many are left, and what keeps more of the model."""
    folder = open_patched(patched["qwen2_moe calibrated"])
    report = folder.report.with_perplexity({"mean": {"before": 2.0, "after": 3.0}})
    report = replace(report, answers={"problems": 200, "before": 140, "after": 105})
    text = page(report, "", [])
    strip = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    recipe = report.run["recipe"]
    assert strip["routed experts a layer"] == str(recipe["experts"])
    assert strip["exact answers"] == "105 of 200, before 140"
    assert strip["perplexity"] == "1.500 times"
    assert {"bytes", "time", "memory"} < {*strip}
    assert "neurons a routed expert" not in strip
    assert "--keep SHARE in place of --merge grouped" in text
    narrow = replace(report, run={**report.run, "recipe": {**recipe, "merge": "narrow", "width": 40}})
    assert "<dt>neurons a routed expert</dt><dd>40</dd>" in page(narrow, "", [])


def test_a_page_without_pictures_says_so(patched: dict[str, Path]):
    folder = open_patched(patched["qwen2_moe sparse"])
    pictures = draw(Material(replace(folder, cosines={})))
    assert pictures == []
    assert "has no data to draw" in page(folder.report, folder.recipe.to_yaml(), pictures)


@needs_browser
@pytest.mark.parametrize("form", FORMS)
def test_a_browser_has_nothing_to_complain_about(
    pages: dict[str, tuple[str, list[Picture]]], tmp_path: Path, form: str
):
    text, _ = pages[form]
    (tmp_path / "report.html").write_text(text)
    _, said = browse(tmp_path / "report.html")
    assert said == ""


@needs_browser
@pytest.mark.parametrize(("size", "dark"), [("1200,900", False), ("500,900", False), ("1200,900", True)])
def test_in_a_browser_every_picture_is_there_and_nothing_overflows(
    pages: dict[str, tuple[str, list[Picture]]], tmp_path: Path, size: str, dark: bool
):
    text, pictures = pages[FORMS[1]]
    text = text.replace(POLICY, "").replace("</body>", f"{LOOK}</body>")  # a script may look at it here
    (tmp_path / "report.html").write_text(text)
    ground = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    dom, _ = browse(tmp_path / "report.html", f"--window-size={size}", *ground)
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None
    assert found[1] == f"overflow=false empty=0 images={len(pictures)} dark={str(dark).lower()} named=true"
