"""The tables of docs/merging.md on smaller models: ``python benchmarks/smaller_tables.py --out DIR``.

Each is a call of ``namex compare`` with a folder of its own, the more important ones first. 1,000 word problems are
generated for each model to answer. All take hours: a run that was killed is continued by the same command, and finished
parts are not made again. ``--only NAME ...`` makes some.
"""

import argparse
from pathlib import Path

from namex_hf.commands.compare import main as compare

MODELS = ("tiny", "tiny-deepseek", "tiny-qwen3")
RECIPES = Path(__file__).parent / "recipes"
FEWER = ("--recipes", RECIPES / "ours" / "namex-full.yaml", RECIPES / "peers" / "reap.yaml", "--fit", "layer")
CHOICES = ("--problem-seed", "choices")  # problems that no other part has
PARTS = {
    "half": ("--keep", 0.5, "--fit", "none", "layer", "--seed", 0, 1, 2),
    "shares": ("--keep", 0.75, 0.25, "--fit", "none", "layer"),
    "half-fewer": (*FEWER, "--keep", 0.5, "--seed", 0, 1, 2),
    "shares-fewer": (*FEWER, "--keep", 0.75, 0.25),
    "controls": ("--keep", 0.5, "--neurons", "energy", "gradient", "random", "--seed", 0, 1, 2),
    "random": ("--keep", 0.75, 0.25, "--neurons", "random"),
    "weights": ("--keep", 0.5, "--fit", "layer", "--error-weights", "none", "sequence", *CHOICES),
    "before": ("--keep", 0.5, "--calibrate", "after", "before", *CHOICES),
    "text": ("--keep", 0.5, "--fit", "none", "layer", "--calibration-tokens", 4096, 16384, 262144),
    "least-text": ("--keep", 0.5, "--calibration-tokens", 1024),  # too little for a fit, which holds some back
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for each model and part goes there")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--problems", type=int, default=1000, help="default: %(default)s")
    options = parser.parse_args()
    status = 0
    for part in options.only:
        for model in options.models:
            folder = options.out / f"{part}-{model}"
            problems = ("--kinds", "arithmetic", "--problems", options.problems)
            status |= compare([model, "--out", str(folder), *map(str, (*PARTS[part], *problems))])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
