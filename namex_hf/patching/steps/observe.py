"""What the text says of experts that stay: tokens and gate values that each receives."""

import torch

from ...merging.experts import grams
from ...merging.record import cosines
from .step import LayerWork, Step


class Observe(Step):
    """Also the cosines between experts, where there is no base expert around which they are compared."""

    def __call__(self, work: LayerWork) -> None:
        experts, routing = work.mixture.experts, work.required_text.routing
        usage = routing.count(experts.count).tolist()
        work.record |= {"usage": usage, "mass": routing.mass(experts.count).tolist(), "games": []}
        if not work.merge.has_base:
            with work.source.named(work.layer):
                gram = grams(experts, experts.zeros(), "expert", work.recipe.device)
            work.statistics["cosines"] = cosines(gram)
        work.statistics["usage"] = torch.tensor(usage)


STEP = Observe
