"""U-shaped: the client has both ends of the model, and so labels and loss; the server has the middle.

After Vepakomma et al. 2018 (arXiv 1812.00564, "U-shaped configurations for split learning without label sharing"). A
micro-batch has four legs: 0 smashed data up, 1 the middle's output down, 2 its gradients up, 3 gradients of the smashed
data down.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zsplit.train.account import Account
from zsplit.train.half import Half
from zsplit.train.loss import check_labels, learn, score
from zsplit.train.schedule import U_SHAPED, order
from zsplit.train.turn import Batch, Desk, Evaluation, Outgoing, Training, size_of
from zsplit.wire.messages import Evaluate

TAIL = 1
"""The tail's stretch in the client's part; 0 is the front's."""


class UShaped(Training):
    """A turn whose loss is the client's: no label and no loss leaves it."""

    def micro_batches(self, step: int, slices: Sequence[Batch]) -> tuple[float, Tensor | None]:
        smashed: dict[int, Tensor] = {}
        loss, norms = 0.0, None
        for action, micro in order(len(slices), self.job.plan.window, U_SHAPED):
            match action:
                case "forward":
                    smashed[micro] = self.forward(step, micro, slices)
                case "tail":
                    loss += self._tail(step, micro, slices)
                case "backward":
                    reply = self.desk.answer(self.job.lease, "train", step, micro, 3)
                    norms = self.backward(step, micro, smashed.pop(micro), reply)
        return loss, norms

    def beside(self, _: Tensor) -> list[Outgoing]:
        return []

    def _tail(self, step: int, micro: int, slices: Sequence[Batch]) -> float:
        """Take one micro-batch to the loss and back, and send the gradients; return its share of the mean loss."""
        reply = self.desk.answer(self.job.lease, "train", step, micro, 1)
        middle = reply.tensors["smashed"].to(self.half.device).requires_grad_()
        labels, batch = slices[micro][1].to(self.half.device), size_of(slices)
        with self.account.computing("tail", step, micro):
            with self.randomness(step, micro):
                outputs = self.half.part(middle, TAIL)
            loss = learn(outputs, labels, batch)
        gradients = middle.grad if middle.grad is not None else torch.zeros_like(middle)
        sent: list[Outgoing] = [("gradients", gradients, self.job.plan.down)]
        self.desk.link.send_tensors(self.job.lease, "train", step, micro, 2, sent, {})
        return loss * (len(labels) / batch)


class UShapedEvaluation(Evaluation):
    """An evaluation that the client scores, from what the middle gives back."""

    def __init__(self, desk: Desk, job: Evaluate, half: Half, account: Account) -> None:
        super().__init__(desk, job, half, account)
        self._labels: dict[int, Tensor] = {}

    def send(self, number: int, outputs: Tensor, targets: Tensor) -> None:
        self._labels[number] = targets
        tensors: list[Outgoing] = [("smashed", outputs, self.job.plan.up)]
        self.desk.link.send_tensors(self.job.lease, "eval", number, 0, 0, tensors, {})

    def scores(self, number: int) -> Mapping[str, float]:
        middle = self.desk.answer(self.job.lease, "eval", number, 0).tensors["smashed"]
        with self.account.computing("evaluate", number):
            outputs = self.half.part(middle.to(self.half.device), TAIL)
            labels = self._labels.pop(number).to(self.half.device)
            check_labels(labels, outputs)
            return score(outputs, labels)
