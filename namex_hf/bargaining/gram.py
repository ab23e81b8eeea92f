"""Gram matrices of domain vectors, streamed: a layer is never copied in float32.

A domain vector is the difference between an expert and the base expert, tau_i = E_i - E_m (Nguyen et al., Expert
Merging in Sparse MoE with Nash Bargaining, section 3). The game between the experts depends on K_ij = tau_i . tau_j
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: 4 MiB of float32 a chunk: the fastest for 60 experts of 2.9 million bf16 entries. 1 to 16 MiB fit a shared cache and
#: are within a few per cent. 64 MiB is a fifth slower, since each chunk goes through memory.
CHUNK_BYTES = 4 * 2**20


def domain_gram(
    experts: Tensor | Sequence[Tensor],
    base: Tensor | None,
    chunk_bytes: int = CHUNK_BYTES,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gram matrix of the domain vectors tau_i = E_i - E_m.

    Args:
        experts: [N, D...], or a sequence of N tensors [D...] (memory-mapped tensors need not be stacked). Any floating
            dtype; read chunk by chunk, never converted as a whole.
        base: [D...], the base expert E_m. It is not rounded to the experts' dtype: pass it in float32 if it is a mean.
            None: a base of zero.
        chunk_bytes: size of the working buffer, in bytes.
        device: device that multiplies the chunks; by default that of the experts.

    Returns:
        float64 [N, N] on `device`, exactly symmetric. Differences and products are taken in float32 (float64 if the
        experts or the base are float64), and the chunks' Gram matrices are summed in float64. The Gram matrix of whole
        experts is the sum over their matrices. The same device, threads and chunk size give the same bits.

    Memory: one buffer of `chunk_bytes`, a chunk of the base, and three [N, N] matrices. An expert whose dimensions
    D... are not contiguous is copied, flat, in its own dtype.

    Raises:
        ValueError: no experts, shapes of experts and base that differ, a dtype that is not floating, chunk_bytes < 1.
    """
    _check(experts, base, chunk_bytes)
    target = torch.device(device) if device is not None else experts[0].device
    double = any(t.dtype == torch.float64 for t in (*experts, *(() if base is None else (base,))))
    dtype = torch.float64 if double else torch.float32
    total = _UpperGram(len(experts), dtype, target)
    for _, chunk in chunks(experts, base, dtype, target, chunk_bytes):
        total.add(chunk)
    return total.symmetric()


def gram_of(
    vectors: Tensor | Sequence[Tensor], chunk_bytes: int = CHUNK_BYTES, device: torch.device | str | None = None
) -> Tensor:
    """Gram matrix float64 [N, N] of the vectors [N, D...] themselves: `domain_gram` with a base of zero."""
    return domain_gram(vectors, None, chunk_bytes, device)


def cosine(gram: Tensor) -> Tensor:
    """Cosines [..., N, N], within [-1, 1], between the vectors of a Gram matrix [..., N, N]; zero rows give zeros."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0)
    # One factor at a time: the product of two lengths can overflow although the cosine does not.
    scaled = (inverse[..., :, None] * gram * inverse[..., None, :]).clamp(-1, 1)
    return scaled + torch.diag_embed((lengths > 0).to(scaled) - scaled.diagonal(dim1=-2, dim2=-1))


def _check(experts: Tensor | Sequence[Tensor], base: Tensor | None, chunk_bytes: int) -> None:
    if isinstance(experts, Tensor) and experts.dim() < 2:
        raise ValueError(f"experts have the shape {list(experts.shape)}; accepted is [N, D...], or N tensors [D...]")
    if len(experts) == 0:
        raise ValueError("there are no experts; at least one is needed")
    shape = experts[0].shape if base is None else base.shape
    for index, expert in enumerate(experts):
        if expert.shape != shape:
            raise ValueError(f"expert {index} has the shape {list(expert.shape)}; the others have {list(shape)}")
    for tensor in (*experts, *(() if base is None else (base,))):
        if not tensor.is_floating_point():
            raise ValueError(f"experts and base must be floating point, found {tensor.dtype}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; at least 1 is needed")


def chunks(
    vectors: Tensor | Sequence[Tensor],
    base: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[tuple[slice, Tensor]]:
    """Columns, and the vectors minus the base there, ``[N, columns]`` in one buffer that is filled again and again.

    Args:
        vectors, base: as the experts and the base of `domain_gram`; None: a base of zero.
        dtype, device: of the buffer.
    """
    # Stacked tensors are one strided copy a chunk in the place of N.
    stacked = vectors.detach().flatten(1) if isinstance(vectors, Tensor) else None
    flat = [] if stacked is not None else [vector.detach().flatten() for vector in vectors]
    origin = None if base is None else base.detach().flatten()
    count, width = len(vectors), vectors[0].numel()
    columns = max(1, min(width, chunk_bytes // (count * dtype.itemsize)))
    buffer = torch.empty(count, columns, dtype=dtype, device=device)
    for start in range(0, width, columns):
        place = slice(start, min(start + columns, width))
        chunk = buffer[:, : place.stop - start]
        if stacked is not None:
            chunk.copy_(stacked[:, place])
        else:
            for row, vector in zip(chunk, flat, strict=True):
                row.copy_(vector[place])
        if origin is not None:
            chunk.sub_(origin[place].to(device, dtype))
        yield place, chunk


class _UpperGram:
    """Sum in float64 of the chunks' Gram matrices, without the lower left block, which saves 1/4 of the work."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.half = min(count, -(-count // 32) * 16)
        self.sum = torch.zeros(count, count, dtype=torch.float64, device=device)
        self.top = torch.empty(self.half, count, dtype=dtype, device=device)
        self.corner = torch.empty(count - self.half, count - self.half, dtype=dtype, device=device)

    def add(self, chunk: Tensor) -> None:
        half = self.half
        self.sum[:half] += torch.mm(chunk[:half], chunk.T, out=self.top)
        if half < len(chunk):
            self.sum[half:, half:] += torch.mm(chunk[half:], chunk[half:].T, out=self.corner)

    def symmetric(self) -> Tensor:
        return self.sum.triu() + self.sum.triu(1).T
