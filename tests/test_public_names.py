"""The public names are those that the page on versions lists, and they are typed."""

import re
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from namex_hf import errors

ROOT = Path(__file__).parents[1]


def test_the_page_lists_the_public_names():
    page = (ROOT / "docs" / "versions.md").read_text("utf-8")
    listed = {
        module: {*re.findall(r"`(\w+)`", names)}
        for module, names in re.findall(r"^\| `(namex_hf[\w.]*)` \| (.+) \|$", page, re.MULTILINE)
    }
    rooms = {f"namex_hf.{path.parent.name}" for path in ROOT.glob("namex_hf/*/__init__.py")}
    exports = {name: {*getattr(import_module(name), "__all__", ())} for name in {*rooms, *listed}}
    exports["namex_hf.errors"] = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert listed == {name: names for name, names in exports.items() if names}
    for module, names in listed.items():
        assert [name for name in sorted(names) if not hasattr(import_module(module), name)] == []


def test_the_package_says_that_it_is_typed():
    assert (files("namex_hf") / "py.typed").is_file()
