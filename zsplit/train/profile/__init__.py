"""What this peer and its link can do, measured: the planner's numbers."""

from zsplit.train.profile.measure import measure
from zsplit.train.profile.probe import measure_link

__all__ = ["measure", "measure_link"]
