"""StableMoE's two stages of training (Dai et al. 2022) for a model patched with ``routing: stable``."""

from .stages import StageOne, begin, freeze, student_of

__all__ = ["StageOne", "begin", "freeze", "student_of"]
