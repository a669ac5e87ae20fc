"""Cutting a model: where, what each cut costs, the parts, and models by name (`zsplit.model.zoo`)."""

from zsplit.model.norm import DeferredBatchNorm
from zsplit.model.part import Part
from zsplit.model.randomness import randomness
from zsplit.model.trace import Cut, CutPoint, Traced, cut_points, split, trace

__all__ = ["Cut", "CutPoint", "DeferredBatchNorm", "Part", "Traced", "cut_points", "randomness", "split", "trace"]
