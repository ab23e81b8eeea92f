"""The experiment's modules lie beside its script, which finds them there."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "experiments" / "loss_game"))
