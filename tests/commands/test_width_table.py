"""Widths near the one of a recipe, and what takes them."""

from pathlib import Path

from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.commands.width_table import width_table
from namex_hf.patching.plan import make_plan
from namex_hf.recipe import Recipe
from tests.helpers.toy_models import save_toy


def test_what_takes_half_of_1408_neurons_and_its_neighbours(tmp_path: Path) -> None:
    source = save_toy(tmp_path / "source", moe_intermediate_size=1408, tokenizer=True)
    plan = make_plan(open_checkpoint(source), Recipe(keep=0.5), "5GB", reads_text=False)
    assert {row[0]: row[1:] for row in width_table(plan).rows} == {
        "512": ["36.4%", "all, K-quants too", "2, 4, 8", "2, 4"],
        "640": ["45.5%", "Q8_0, Q5_0, Q4_0", "2, 4, 8", "one device"],
        "704 (this run)": ["50.0%", "Q8_0, Q5_0, Q4_0", "2, 4, 8", "none"],
        "768": ["54.5%", "all, K-quants too", "2, 4, 8", "2"],
    }
