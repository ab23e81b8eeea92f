"""Kill runs of `patch_checkpoint` at random moments, many times, and see whether each ends in the same bytes.

Every round begins a run in a process of its own, sends it SIGKILL at a random moment between its claim of the output
folder and its end, perhaps several times over, lets it finish, and compares weights, statistics, index, configuration
and recipe with those of an undisturbed run. Exit status 1 if anything differed, or if a killed folder had a
configuration, and so could pass for a model, before it was whole.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from namex_hf import Recipe
from tests.helpers.checkpoints import settled_files
from tests.helpers.killing import duration, kill_at, run, start
from tests.helpers.toy_models import odd_checkpoint

FORMS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "residual": (Recipe(base="shared"), {"shard_size": "60KB"}),
    "grouped": (Recipe(merge="grouped", experts=4), {"shard_size": "200KB"}),
    "exported": (Recipe(merge="grouped", experts=3), {"shard_size": "200KB", "export_as": "qwen2_moe"}),
}


@dataclass
class Tally:
    """What happened to the runs of one form."""

    undisturbed: float  # seconds, from claim to end
    rounds: int = 0
    kills: int = 0  # in the middle of a run
    late: int = 0  # the model was whole before the signal came
    partial: int = 0  # killed, a configuration there, and yet not the whole model
    different: int = 0  # finished, and other bytes than undisturbed


def campaign(source: Path, folder: Path, form: str, kills: int, lot: random.Random) -> Tally:
    """Kill runs of one form until ``kills`` have met one in its middle."""
    recipe, options = FORMS[form]
    seconds = duration(source, folder / "undisturbed", recipe, **options)
    wanted, tally = settled_files(folder / "undisturbed"), Tally(seconds)
    while tally.kills < kills:
        out = folder / f"round-{tally.rounds}"
        for _ in range(lot.randint(1, 3)):
            process = start(source, out, recipe, **options)
            if kill_at(process, out, lot.uniform(0, seconds)):
                tally.kills += 1
            else:
                tally.late += 1
                tally.partial += settled_files(out) != wanted
                break
        run(source, out, recipe, **options)
        tally.rounds += 1
        tally.different += settled_files(out) != wanted
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=30, help="in the middle of a run, of each form (default: 30)")
    parser.add_argument("--forms", nargs="+", choices=[*FORMS], default=[*FORMS], help="what is run (default: all)")
    parser.add_argument("--layers", type=int, default=13, help="of the checkpoint that is patched (default: 13)")
    parser.add_argument("--width", type=int, default=64, help="its hidden size (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    lot, begin, failed = random.Random(options.seed), time.perf_counter(), False
    print(f"{'form':>10} {'undisturbed':>12} {'rounds':>7} {'kills':>6} {'late':>5} {'partial':>8} {'different':>10}")
    with tempfile.TemporaryDirectory(prefix="crash-campaign-") as name:
        folder = Path(name)
        sizes = {
            "hidden_size": options.width,
            "moe_intermediate_size": options.width * 3 // 4,
            "num_hidden_layers": options.layers,
        }
        source = odd_checkpoint(folder / "model", "deepseek", torch.bfloat16, shards=5, tokenizer=True, **sizes)
        for form in options.forms:
            tally = campaign(source, folder / form, form, options.kills, lot)
            failed |= bool(tally.partial or tally.different)
            print(
                f"{form:>10} {tally.undisturbed:>10.2f} s {tally.rounds:>7} {tally.kills:>6} {tally.late:>5} "
                f"{tally.partial:>8} {tally.different:>10}",
                flush=True,
            )
    print(f"{'FAILED' if failed else 'all the same bytes'}; {time.perf_counter() - begin:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
