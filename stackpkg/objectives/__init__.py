"""Training objectives: each loss a pure function, and the composer that weights and scales them."""

from stackpkg.objectives.composer import Composer, Pairs, Step, StepCounts, Term, norms, tap

__all__ = ["Composer", "Pairs", "Step", "StepCounts", "Term", "norms", "tap"]
