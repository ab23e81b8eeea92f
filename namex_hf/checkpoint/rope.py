"""The two forms of the rotary embedding in a ``config.json``.

transformers 5 writes ``rope_parameters`` alone. transformers 4, its remote code, and other programs read ``rope_theta``
and ``rope_scaling`` at the top level. If these are missing, they silently use a base of 10,000.
"""

from collections.abc import Mapping
from typing import Any


def both_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with both forms of the parameters that transformers 5 reads from it.

    A configuration without a base, or with a base for each kind of layer, is returned as it is: the form of
    transformers 4 cannot state the latter.
    """
    # In transformers 5 a scaling at the top level takes precedence over `rope_parameters`; a base there does not.
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = stated.get("rope_theta", config.get("rope_theta")) if isinstance(stated, dict) else None
    if theta is None or any(isinstance(value, dict) for value in stated.values()):
        return dict(config)
    parameters = {**stated, "rope_theta": theta, "rope_type": stated.get("rope_type", stated.get("type", "default"))}
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        **config,
        "rope_parameters": parameters,
        "rope_theta": theta,
        "rope_scaling": None if parameters["rope_type"] == "default" else scaling,
    }
