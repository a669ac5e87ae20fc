"""The server's side of a prediction: smashed data come in, outputs go back, nothing is learned.

Under a plan with a tail the server has the middle, and what goes back is activations: they take the plan's codec.
"""

import torch
from torch import Tensor

from zsplit.errors import RemoteProtocolError
from zsplit.train.account import Account
from zsplit.train.half import Half
from zsplit.train.link import Fetched, Incoming, Link
from zsplit.wire.messages import Held, Predict, What
from zsplit.wire.messages import Tensors as TensorsMessage


class Predicting:
    """Forward passes for one client, for as long as it is here."""

    def __init__(self, link: Link, job: Predict, half: Half) -> None:
        self.link, self.job, self.half = link, job, half
        self.account = Account(link.spans, half.device, job.lease)

    def begin(self) -> None:
        self.link.fetch(self.job.lease, self.job.base, self.half.needs(self.job.base.digest, training=False))

    def fetched(self, event: Fetched) -> None:
        self.half.load(self.job.base.digest, event.tensors)
        self.half.part.eval()
        self.link.report(Held(lease=self.job.lease, state="ready"))

    @torch.no_grad()
    def incoming(self, event: Incoming) -> None:
        message = event.message
        if not isinstance(message, TensorsMessage) or event.tensors.keys() != {"smashed"}:
            raise RemoteProtocolError(f"Client {self.job.client} asked for outputs without smashed data")
        with self.account.computing("predict", message.step):
            outputs = self.half.part(event.tensors["smashed"].to(self.half.device))
        codec = self.job.plan.up if self.job.plan.tail else "raw"  # with a tail they are smashed data, as in training
        sent: list[tuple[What, Tensor, str]] = [("other", outputs, codec)]
        self.link.send_tensors(self.job.lease, "predict", message.step, message.micro, 1, sent, {})
