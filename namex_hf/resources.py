"""What lies in the package beside its code: models, texts."""

from pathlib import Path

PACKAGED = Path(__file__).parent / "packaged"


def packaged_models() -> list[str]:
    """Names of the models inside this package."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/config.json"))
