"""Labels that live at the server: micro-batches come with sample ids, and go on with labels.

As in PySyft's SplitNN on vertically divided data: who has the inputs has no labels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from zsplit.data import Labels, Part
from zsplit.errors import DataError, RemoteProtocolError
from zsplit.train.link import Incoming
from zsplit.wire.messages import Evaluate, Turn

SETS: Mapping[Part, str] = {"train": "training", "validation": "training", "test": "test"}
"""The set that the samples of a part are in, whose positions are their ids."""


class LabelBook:
    """The labels of a dataset, looked up by sample id."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels

    def join(self, job: Turn | Evaluate, event: Incoming) -> Incoming:
        """Return a micro-batch of the job with labels in the place of sample ids.

        Raises RemoteProtocolError where it has no ids, DataError where they are not in the dataset.
        """
        tensors = dict(event.tensors)
        ids = tensors.pop("ids", None)
        if ids is None or ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids) or "labels" in tensors:
            raise RemoteProtocolError(
                f"Client {job.client} sent {', '.join(event.tensors) or 'nothing'} in the place of smashed data and "
                "sample ids: start all peers with the same version of zsplit"
            )
        part: Part = job.part if isinstance(job, Evaluate) else "train"
        return event._replace(tensors={**tensors, "labels": self._look_up(part, ids, job.client)})

    def _look_up(self, part: Part, ids: Tensor, client: int) -> Tensor:
        known = self._labels.test if part == "test" else self._labels.train
        lowest, highest = (int(each) for each in ids.aminmax())
        if lowest < 0 or highest >= len(known):
            wrong = lowest if lowest < 0 else highest
            raise DataError(
                f"Client {client} sent the sample id {wrong}, and the server's {SETS[part]} set has {len(known)} "
                "samples: give both the same dataset (data.name, data.path)"
            )
        labels = known[ids]
        if int(labels.min()) < 0:
            raise DataError(f"The server's data has the label {int(labels.min())}: number its classes from 0")
        return labels
