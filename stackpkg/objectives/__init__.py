"""Training objectives: each loss a pure function, and the composer that weights and scales them."""

from stackpkg.objectives.composer import Composer, StepCounts

__all__ = ["Composer", "StepCounts"]
