from typing import Any

import pytest
from transformers import AutoTokenizer

from namex_hf.checkpoint.resolve import PACKAGED
from tests.helpers.toy_models import toy_tokenizer


@pytest.fixture(scope="session", params=["tiny", "tiny-deepseek"])
def packaged_tokenizer(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(PACKAGED / request.param)


@pytest.fixture(scope="session")
def tiny() -> Any:
    return AutoTokenizer.from_pretrained(PACKAGED / "tiny")


@pytest.fixture(scope="session")
def letters() -> Any:
    """A token a byte, an end of text, no chat template."""
    return toy_tokenizer()
