"""Bargaining between experts: Gram matrices of domain vectors and the exact Nash solution. Matrices only, no models."""

from .gram import CHUNK_BYTES, cosine, domain_gram, gram_of
from .nash import AGREEMENT, NO_AGREEMENT, NashSolution, nash_bargaining

__all__ = [
    "AGREEMENT",
    "CHUNK_BYTES",
    "NO_AGREEMENT",
    "NashSolution",
    "cosine",
    "domain_gram",
    "gram_of",
    "nash_bargaining",
]
