"""Sizes of published models by formula, against those that their repositories state for 16 bit."""

import published_bytes
import pytest

from namex_hf.quantising.matrices import matrices_of


@pytest.mark.parametrize(("name", "billions"), [("Qwen1.5-MoE-A2.7B", 14.3), ("Qwen3-30B-A3B", 30.5)])
def test_parameters_are_those_of_the_model(name: str, billions: float) -> None:
    matrices = matrices_of(published_bytes.checkpoint_of(name))
    storage = matrices.storage(4)
    assert storage.unquantised.bytes / 2e9 == pytest.approx(billions, abs=0.05)
    assert storage.unquantised.bytes == matrices.checkpoint.size
