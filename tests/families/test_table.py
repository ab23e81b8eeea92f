"""The table of docs/families.md is what tiny models of all families do."""

from pathlib import Path

import pytest

from tests.helpers.family_table import PAGE, parts, table


@pytest.mark.all_families
def test_the_page_has_the_table(tmp_path: Path) -> None:
    assert parts(PAGE.read_text("utf-8"))[1] == table(tmp_path), "python -m tests.helpers.family_table writes it"
