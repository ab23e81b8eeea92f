"""Which command a verdict names."""

from typing import Any

import pytest

from namex_hf import Recipe
from namex_hf.evaluation.verdict import better


def run(tokens: int | None = 65536, **fields: Any) -> dict[str, Any]:
    """As a report has it."""
    text = {} if tokens is None else {"calibration": {"tokens": tokens}}
    return {"recipe": Recipe(**fields).to_dict(), **text}


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (run(merge="grouped", experts=8, fit="layer"), "--keep SHARE in place of --merge grouped"),
        (run(keep=0.5), "--fit layer"),
        (run(keep=0.5, fit="layer"), "--calibration-tokens 262144."),
        (run(16384, keep=0.5, fit="layer"), "--calibration-tokens 65536."),
        (run(131072, keep=0.5, fit="layer"), "--calibration-tokens 262144."),
    ],
)
def test_a_command_that_loses_less(made: dict[str, Any], named: str) -> None:
    hint = better(made)
    assert hint is not None
    assert named in hint


@pytest.mark.parametrize("made", [run(262144, keep=0.5, fit="layer"), run(None)])
def test_none_where_none_is_known(made: dict[str, Any]) -> None:
    assert better(made) is None
