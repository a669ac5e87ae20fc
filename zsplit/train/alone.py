"""The cut at the output: federated averaging (McMahan et al. 2017). The client trains the whole model by itself.

Only weights and figures travel. The server's side of a turn is over at once, with nothing to contribute.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from zsplit.train.account import Account
from zsplit.train.half import Half
from zsplit.train.loss import check_labels, learn, score
from zsplit.train.turn import Batch, Desk, Evaluation, Training, size_of
from zsplit.wire.messages import Evaluate


class Alone(Training):
    """A turn without a server."""

    def micro_batches(self, step: int, slices: Sequence[Batch]) -> tuple[float, Tensor | None]:
        batch, mean = size_of(slices), 0.0
        for micro, (x, targets) in enumerate(slices):
            with self.account.computing("forward", step, micro), self.randomness(step, micro):
                outputs = self.half.part(x.to(self.half.device))
            with self.account.computing("backward", step, micro):
                loss = learn(outputs, targets.to(self.half.device), batch)
            mean += loss * (len(targets) / batch)
        return mean, None


class AloneEvaluation(Evaluation):
    """An evaluation that the client scores by itself."""

    def __init__(self, desk: Desk, job: Evaluate, half: Half, account: Account) -> None:
        super().__init__(desk, job, half, account)
        self._scores: dict[int, Mapping[str, float]] = {}

    def send(self, number: int, outputs: Tensor, targets: Tensor) -> None:
        labels = targets.to(self.half.device)
        check_labels(labels, outputs)
        self._scores[number] = score(outputs, labels)

    def scores(self, number: int) -> Mapping[str, float]:
        return self._scores.pop(number)
