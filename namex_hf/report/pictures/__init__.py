"""The pictures of a report, a file each. They need matplotlib, the extra ``report``."""

from matplotlib import rc_context

from . import groups, layer_errors, propagation, similarity, stability, training, usage, utilities, weights
from .picture import STYLE, Material, Picture

ORDER = (similarity, weights, propagation, utilities, stability, usage, groups, layer_errors, training)


def draw(material: Material) -> list[Picture]:
    """All pictures for which a folder has the data, in their order."""
    with rc_context(STYLE):
        pictures = [one for module in ORDER if (one := module.picture(material)) is not None]
        for one in pictures:
            one.figure.draw_without_rendering()
            one.figure.set_layout_engine("none")  # laid out once: every file of a picture is the same picture
    return pictures


__all__ = ["Material", "Picture", "draw"]
