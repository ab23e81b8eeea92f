"""How alike the experts of every layer are, by weights and by outputs (the paper's Figures 1, 6 and 8)."""

from typing import Any

import numpy as np
import torch

from .picture import DIVERGING, Material, Picture, figure, limit, tiles

HEAD, ROW = 0.75, 1.5  # inches


def picture(material: Material) -> Picture | None:
    """A panel a layer; none where neither cosines nor answers are known."""
    by_weights = {layer: whole(material, layer) for layer in sorted(material.folder.cosines)}
    answers = material.answers
    by_outputs = {layer: one.cosines.numpy() for layer, one in answers.layers.items()} if answers else {}
    of_bases = material.folder.recipe.merge.has_base
    kinds = {
        f"by weights: domain vectors E_i - E_m{'' if of_bases else ' around zero'}": by_weights,
        "by outputs on text": by_outputs,
    }
    kinds = {title: panels for title, panels in kinds.items() if panels}
    if not kinds:
        return None
    rows = {title: tiles(len(panels))[0] for title, panels in kinds.items()}
    drawn = figure(sum(HEAD + ROW * count for count in rows.values()))
    parts: Any = drawn.subfigures(len(kinds), 1, squeeze=False, height_ratios=[HEAD + ROW * r for r in rows.values()])
    for part, (title, panels) in zip(parts[:, 0], kinds.items(), strict=True):
        _panels(part, title, panels)
    line = (
        "Each square is a pair of experts: blue where the two point the same way, orange where they point against each"
        " other, white where they have nothing in common (the diagonal is left out). By weights and"
        " by outputs there are two scales."
    )
    if answers:
        line += (
            f" Outputs: mean cosine over {answers.asked:,} tokens of packaged text, every expert asked about each of"
            " them, as the folder's routed experts alone make the text."
        )
    return Picture("1-similarity", "How alike the experts are", line, drawn)


def whole(material: Material, layer: int) -> np.ndarray:
    """Cosines ``[N, N]`` between whole experts, gate, up and down together."""
    grams = material.folder.domain_grams(layer)
    if grams is None:
        return material.folder.cosines[layer].mean(0).numpy()
    gram = grams.sum(0)
    lengths = gram.diagonal().sqrt()
    return (gram / (lengths[:, None] * lengths).clamp(min=torch.finfo(gram.dtype).tiny)).numpy()


def _panels(part: Any, title: str, panels: dict[int, np.ndarray]) -> None:
    blank = {layer: np.where(np.eye(len(p), dtype=bool), np.nan, p) for layer, p in panels.items()}
    most = limit(np.concatenate([p.ravel() for p in blank.values()]))
    rows, columns = tiles(len(panels))
    axes = part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    part.suptitle(title, fontsize=10)
    image = None
    for place in axes.ravel()[len(panels) :]:
        place.set_visible(False)
    for place, (layer, values) in zip(axes.ravel(), blank.items(), strict=False):
        image = place.imshow(values, cmap=DIVERGING, vmin=-most, vmax=most, interpolation="nearest")
        # Rounded first: no minus before 0.00.
        mean = f", mean {round(float(np.nanmean(values)), 2) + 0.0:.2f}" if len(values) > 1 else ""
        place.set_title(f"layer {layer}{mean}", fontsize=8)
        place.set_xticks([0, len(values) - 1])
        place.set_yticks([0, len(values) - 1])
        place.tick_params(labelbottom=place in axes[-1], labelleft=place in axes[:, 0])
    for place in axes[:, 0]:
        place.set_ylabel("expert")
    for place in axes[-1]:
        place.set_xlabel("expert")
    part.colorbar(image, ax=axes, label="cosine", shrink=0.85, pad=0.015)
