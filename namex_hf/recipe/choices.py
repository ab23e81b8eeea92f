"""The values that fields of a recipe accept, the default first where there is one."""

from functools import cache
from pathlib import Path
from typing import Literal

MergeKind = Literal["residual", "soft", "grouped", "narrow"]
Method = Literal["namex-full", "namex", "ep-camex", "camex", "smear", "smoe"]
Disagreement = Literal["zero", "mean"]
Granularity = Literal["matrix", "expert"]
Scale = Literal["simplex", "lemma"]
Solver = Literal["newton", "ccp"]
Metric = Literal["euclidean", "calibrated"]
Power = Literal["equal", "usage", "loss"]
FirstLayer = Literal["merged", "sparse"]
MomentumKind = Literal["none", "complex", "quaternion"]
CurvatureKind = Literal["identity", "calibrated", "diagonal", "kronecker"]
Align = Literal["none", "weights", "activations"]
RoutingSpan = Literal["token", "all", "previous", "prompt"]
Operator = Literal["merge", "keep", "random", "shared"]
Budget = Literal["equal", "damage"]
Grouping = Literal["damage", "outputs", "router", "weights", "none"]
Down = Literal["merge", "refit"]
Target = Literal["layer", "model"]
Neurons = Literal["second_order", "energy", "gradient", "random"]
FitKind = Literal["none", "router", "layer"]
RoutingKind = Literal["linear", "cosine", "stable"]
Temperature = Literal["norms", "entropy"]
Calibrate = Literal["after", "before"]
ErrorWeights = Literal["none", "source", "sequence"]

IMPLIED_WEIGHTINGS: dict[str, str] = {"namex-full": "nash", "namex": "nash", "ep-camex": "uniform", "keep": "usage"}
"""By method and operator; those that are not here settle no weights."""


def _weightings() -> dict[str, bool]:
    """The names of the files in ``merging/weightings``, which are not imported: they need torch."""
    folder = Path(__file__).parents[1] / "merging" / "weightings"
    found = {path.stem: path.parent != folder for path in sorted(folder.rglob("[a-z]*.py")) if path.stem != "weighting"}
    return {name: found[name] for name in (*IMPLIED_WEIGHTINGS.values(), *found)}


WEIGHTINGS = _weightings()
"""Names of weightings, and whether each reads calibration text. `merging.weightings.register_weighting` adds others."""
WEIGHTINGS_OFFERED = "namex_hf.weightings"
"""Group of entry points: modules of other packages that register weightings when they are imported."""


@cache
def load_offered() -> None:
    """Import what installed packages offer, once, and not before a recipe names what is not known."""
    from importlib.metadata import entry_points  # which takes longer than all else that a wrong option needs

    for offered in entry_points(group=WEIGHTINGS_OFFERED):
        offered.load()
