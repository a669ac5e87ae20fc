"""The data: datasets by name or of one's own, and the part of them that each client sees."""

from zsplit.data.client import ClientData, Part, Prefetch, shards
from zsplit.data.images import Data, from_datasets, gather
from zsplit.data.labels import labels_of, without_labels
from zsplit.data.sources import open_data, sample_shape

__all__ = [
    "ClientData",
    "Data",
    "Part",
    "Prefetch",
    "from_datasets",
    "gather",
    "labels_of",
    "open_data",
    "sample_shape",
    "shards",
    "without_labels",
]
