"""Both forms of the rotary embedding in a ``config.json``: what transformers 5 reads stays what it was."""

import logging
from copy import deepcopy
from typing import Any

import pytest
from transformers import AutoConfig

from namex_hf.checkpoint.rope import both_forms

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[dict[str, Any], float, dict[str, Any] | None]] = {
    "new": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
    "old": ({"rope_theta": 5e5}, 5e5, None),
    "old-nothing-scaled": ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
    "new-yarn": ({"rope_parameters": {**YARN, "rope_theta": 1e6}}, 1e6, YARN),
    "old-yarn": ({"rope_theta": 1e6, "rope_scaling": OLD_YARN}, 1e6, {**OLD_YARN, "rope_type": "yarn"}),
    "two-bases": ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_theta": 1e4}, 7e4, None),
    "two-scalings": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rope_scaling": YARN}
        | {"rope_theta": 9e4},
        9e4,
        YARN,
    ),
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same(family: str, case: str, caplog: pytest.LogCaptureFixture, monkeypatch):
    import namex_hf.models  # noqa: F401  (registers deepseek)

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config, theta, scaling = CASES[case]
    wanted = AutoConfig.for_model(family, **deepcopy(config)).rope_parameters  # it changes what it is given
    caplog.clear()
    written = both_forms(config)
    found = AutoConfig.for_model(family, **deepcopy(written))
    assert warnings_of(caplog) == []
    assert found.rope_parameters == wanted
    assert found.rope_parameters["rope_theta"] == written["rope_theta"] == theta
    assert written["rope_scaling"] == scaling
    assert both_forms(written) == written


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 4},
        {"rope_scaling": None},
        {"rope_theta": 1e4, "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": None}},
        {"rope_theta": 1e4, "rope_parameters": "odd"},
    ],
)
def test_what_has_no_form_of_transformers_4_stays(config: dict[str, Any]):
    assert both_forms(config) == config
