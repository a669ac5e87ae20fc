"""The server's side of a prediction: smashed data come in, outputs go back, nothing is learned.

Under a plan with a tail the server has the middle, and what goes back is activations: they take the plan's codec.
"""

import torch
from torch import Tensor

from zsplit.errors import RemoteProtocolError
from zsplit.train.jobs import Forward
from zsplit.train.link import Incoming
from zsplit.wire.messages import Tensors as TensorsMessage
from zsplit.wire.messages import What


class Predicting(Forward):
    """Forward passes for one client, for as long as it is here."""

    @torch.no_grad()
    def incoming(self, event: Incoming) -> None:
        message = event.message
        if not isinstance(message, TensorsMessage) or event.tensors.keys() != {"smashed"}:
            raise RemoteProtocolError(f"Client {self.job.client} asked for outputs without smashed data")
        with self.account.computing("predict", message.step):
            outputs = self.half.forward(event.tensors["smashed"].to(self.half.device))
        codec = self.job.plan.up if self.job.plan.tail else "raw"  # with a tail they are smashed data, as in training
        sent: list[tuple[What, Tensor, str]] = [("other", outputs, codec)]
        self.link.send_tensors(self.job.lease, "predict", message.step, message.micro, 1, sent, {})
