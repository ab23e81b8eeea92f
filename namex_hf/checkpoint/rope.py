"""The two forms in which a ``config.json`` states the rotary embedding.

transformers 5 writes ``rope_parameters`` alone. transformers 4, remote code written for it, and other programs read
``rope_theta`` and ``rope_scaling`` at the top level, and take a base of 10,000 without a word where they are missing.
"""

from collections.abc import Mapping
from typing import Any


def both_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with both forms, which say what transformers 5 reads from it.

    A configuration that states no base, or one for each kind of layer, is returned as it is: the form of transformers 4
    cannot state the latter.
    """
    # As transformers 5 reads them: a scaling at the top level wins over `rope_parameters`, a base there does not.
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = found.get("rope_theta", config.get("rope_theta")) if isinstance(found, dict) else None
    if theta is None or any(isinstance(value, dict) for value in found.values()):
        return dict(config)
    parameters = {**found, "rope_theta": theta, "rope_type": found.get("rope_type", found.get("type", "default"))}
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        **config,
        "rope_parameters": parameters,
        "rope_theta": theta,
        "rope_scaling": None if parameters["rope_type"] == "default" else scaling,
    }
