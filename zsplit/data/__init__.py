"""The data: datasets by name or of one's own, and the part of them that each client sees."""

from zsplit.data.client import ClientData, EvalPart, Part, Prefetch, indices_of
from zsplit.data.images import Data, from_datasets, gather
from zsplit.data.labels import Labels, labels_of, unlabelled
from zsplit.data.partition import shards
from zsplit.data.sources import fetch_originals, open_data, open_labels, sample_shape

__all__ = [
    "ClientData",
    "Data",
    "EvalPart",
    "Labels",
    "Part",
    "Prefetch",
    "fetch_originals",
    "from_datasets",
    "gather",
    "indices_of",
    "labels_of",
    "open_data",
    "open_labels",
    "sample_shape",
    "shards",
    "unlabelled",
]
