"""What runs left behind: one run's folder, many runs side by side, and the grid of a sweep. No torch."""

from zsplit.results.folder import RunFolder, open_run

__all__ = ["RunFolder", "open_run"]
