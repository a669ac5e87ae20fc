"""The data: datasets by name or of one's own, and the part of them that each client sees."""

from zsplit.data.client import ClientData, Part, Prefetch, shards
from zsplit.data.images import Data, from_datasets, gather
from zsplit.data.sources import open_data, sample_shape

__all__ = ["ClientData", "Data", "Part", "Prefetch", "from_datasets", "gather", "open_data", "sample_shape", "shards"]
