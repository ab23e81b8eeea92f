"""Constants of the fits of a layer to its target."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FitSettings:
    """How a layer with fewer experts is fitted. The defaults are those of every recipe."""

    grouping_tokens: int = 4096  # whose expert outputs decide the groups
    rounds: int = 2  # of fitting rows and downs in turn
    sweeps: int = 2  # over the downs, in each round
    batch: int = 1024  # tokens of a step, of either fit
    chunk_bytes: int = 256 << 20  # of expert outputs that are held at once, while their products are taken
    router_tokens: int = 16384  # that the router's rows are fitted on
    router_rate: float = 0.05  # of Adam, relative to the root mean square of the rows' entries
    router_check_every: int = 25  # steps
    rate: float = 0.05  # of a step of the layer's fit, relative to the root mean square of a matrix
    warm_up: int = 20  # steps
    check_every: int = 50  # steps
    checked_tokens: int = 4096  # of those held out, so that a check is no dearer than four steps
    patience: float = 0.25  # of all steps, after which a fit that has not become better is given up


DEFAULTS = FitSettings()
