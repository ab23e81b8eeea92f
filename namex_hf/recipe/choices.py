"""The values that fields of a recipe accept, the default first where there is one."""

from functools import cache
from typing import Literal

MergeKind = Literal["residual", "soft", "grouped"]
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
FitKind = Literal["none", "router", "layer"]
RoutingKind = Literal["linear", "cosine", "stable"]
Temperature = Literal["norms", "entropy"]
Calibrate = Literal["after", "before"]

WEIGHTINGS: dict[str, bool] = {"nash": False, "uniform": False, "usage": True, "saliency": True}
"""Names of weightings, and whether each reads calibration text. `merging.weightings.register_weighting` adds others."""
WEIGHTINGS_OFFERED = "namex_hf.weightings"
"""Group of entry points: modules of other packages that register weightings when they are imported."""
IMPLIED_WEIGHTINGS: dict[str, str] = {"namex-full": "nash", "namex": "nash", "ep-camex": "uniform"}
"""By method; a method that is not here settles no weights."""


@cache
def load_offered() -> None:
    """Import what installed packages offer, once, and not before a recipe names what is not known."""
    from importlib.metadata import entry_points  # which takes longer than all else that a wrong option needs

    for offered in entry_points(group=WEIGHTINGS_OFFERED):
        offered.load()
