"""References are computed in float64; `test_products` alone has products of bfloat16."""

import pytest

from namex_hf.merging import routing


@pytest.fixture(autouse=True)
def products_of_float32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__.rpartition(".")[2] != "test_products":
        monkeypatch.setattr(routing, "multiplies_bfloat16", lambda kind: False)
