"""Bargaining between experts: Gram matrices of domain vectors and the exact Nash solution. Matrices only, no models."""

from .ccp import ccp_bargaining
from .gram import CHUNK_BYTES, cosine, domain_gram, gram_of
from .nash import AGREEMENT, NO_AGREEMENT, NashSolution, nash_bargaining
from .stability import spectral_radius

__all__ = [
    "AGREEMENT",
    "CHUNK_BYTES",
    "NO_AGREEMENT",
    "NashSolution",
    "ccp_bargaining",
    "cosine",
    "domain_gram",
    "gram_of",
    "nash_bargaining",
    "spectral_radius",
]
