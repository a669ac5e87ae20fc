"""Who has the loss: the client's side of a job by its plan."""

from zsplit.train.account import Account
from zsplit.train.alone import Alone, AloneEvaluation
from zsplit.train.half import Half
from zsplit.train.tail import UShaped, UShapedEvaluation
from zsplit.train.turn import Desk, Evaluation, Training
from zsplit.wire.messages import Evaluate, Turn


def training(desk: Desk, job: Turn, half: Half, account: Account) -> Training:
    """Return the client's side of a turn."""
    if desk.workshop.traced.is_output(job.plan.cut):
        return Alone(desk, job, half, account)
    return (UShaped if job.plan.tail else Training)(desk, job, half, account)


def evaluation(desk: Desk, job: Evaluate, half: Half, account: Account) -> Evaluation:
    """Return the client's side of an evaluation."""
    if desk.workshop.traced.is_output(job.plan.cut):
        return AloneEvaluation(desk, job, half, account)
    return (UShapedEvaluation if job.plan.tail else Evaluation)(desk, job, half, account)
