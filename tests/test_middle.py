"""The server where the loss is the client's: what it takes, in which order, and what it refuses."""

import msgspec
import pytest
import torch
from helpers import config_of
from lone_link import LEASE, TURN, Joined
from nets import SmallResidual
from torch import Tensor

from zsplit.errors import RemoteProtocolError
from zsplit.train.half import Workshop
from zsplit.train.link import Incoming
from zsplit.train.middle import Absent, MiddleEvaluating, MiddleTraining, only
from zsplit.train.state import State
from zsplit.wire import messages
from zsplit.wire.messages import Evaluate, Plan, Step, Tensors

PLAN = Plan(cut="stem", tail="pool", micro_batches=2, window=2)
CONFIG = config_of(data__name="own", train__labels="keep", model__cut="stem", model__tail="pool")
SMASHED = torch.ones(3, 4, 8, 8)
MADE = torch.ones(3, 4, 2, 2)


@pytest.fixture
def middle(joined: Joined) -> MiddleTraining:
    """A turn of two steps of two micro-batches each, whose part is loaded."""
    link, _ = joined("server")
    half = Workshop(CONFIG, (1, 8, 8), torch.device("cpu"), SmallResidual()).back("stem", "pool")
    return MiddleTraining(link, msgspec.structs.replace(TURN, plan=PLAN, count=2), CONFIG, half)


def come(leg: int, step: int, micro: int, **tensors: Tensor) -> Incoming:
    """Return what a client sends: smashed data or gradients, or what is given."""
    tensors = tensors or ({"gradients": MADE} if leg == 2 else {"smashed": SMASHED})
    message = Tensors("r", "s", LEASE, "train", leg, (), step, micro, {"batch": 6.0, "micros": 2.0})
    return Incoming(message, tensors, 0.0)


def test_forwards_may_run_ahead_of_backwards_and_a_step_ends_with_the_last_of_these(middle: MiddleTraining) -> None:
    before = {name: tensor.clone() for name, tensor in middle.half.part.state_dict().items()}
    for leg, micro in ((0, 0), (0, 1), (2, 0)):
        middle.incoming(come(leg, 0, micro))
    assert (middle.at, middle.forwards) == ((0, 1), 2)
    assert torch.equal(middle.half.part.state_dict()["block.conv1.weight"], before["block.conv1.weight"])
    middle.incoming(come(2, 0, 1))
    assert (middle.at, middle.forwards, middle.samples) == ((1, 0), 0, 6)
    assert not torch.equal(middle.half.part.state_dict()["block.conv1.weight"], before["block.conv1.weight"])


@pytest.mark.parametrize(
    "messages_",
    [
        [(2, 0, 0)],
        [(0, 0, 1)],
        [(0, 1, 0)],
        [(1, 0, 0)],
        [(3, 0, 0)],
        [(0, 0, 0), (0, 0, 0)],
        [(0, 0, 0), (2, 0, 1)],
        [(0, 0, 0), (2, 0, 0), (2, 0, 0)],
        [(0, 0, 0), (0, 0, 1), (0, 0, 2)],
        [(0, 0, 0), (0, 0, 1), (0, 1, 0)],
    ],
)
def test_what_comes_out_of_order_is_refused(middle: MiddleTraining, messages_: list[tuple[int, int, int]]) -> None:
    *good, wrong = messages_
    for each in good:
        middle.incoming(come(*each))
    with pytest.raises(RemoteProtocolError, match=f"Client 0 sent Tensors of step {wrong[1]} out of order"):
        middle.incoming(come(*wrong))


def test_a_step_that_nobody_waits_for_is_refused(middle: MiddleTraining) -> None:
    with pytest.raises(RemoteProtocolError, match="Client 0 sent Step of step 0 out of order"):
        middle.incoming(Incoming(Step("r", "s", LEASE, 0, 1.0), {}, 0.0))


def test_gradients_of_another_shape_are_refused(middle: MiddleTraining) -> None:
    middle.incoming(come(0, 0, 0))
    with pytest.raises(RemoteProtocolError) as caught:
        middle.incoming(come(2, 0, 0, gradients=torch.ones(2, 4, 2, 2)))
    assert str(caught.value) == "Gradients of shape [3, 4, 2, 2] were expected, [2, 4, 2, 2] came"


def test_a_message_with_labels_in_it_is_refused(middle: MiddleTraining) -> None:
    with pytest.raises(RemoteProtocolError, match="Nothing but smashed was expected, smashed, labels came"):
        middle.incoming(come(0, 0, 0, smashed=SMASHED, labels=torch.zeros(3)))
    assert only({"smashed": SMASHED}, "smashed") is SMASHED


def test_a_step_has_no_place_in_an_evaluation(joined: Joined, middle: MiddleTraining) -> None:
    job = Evaluate(lease=LEASE, client=2, server=0, base=TURN.base, plan=PLAN, round=0, part="test")
    evaluating = MiddleEvaluating(middle.link, job, CONFIG, middle.half)
    with pytest.raises(RemoteProtocolError, match="Client 2 sent Step in an evaluation"):
        evaluating.incoming(Incoming(Step("r", "s", LEASE, 0, 1.0), {}, 0.0))


def test_a_turn_of_the_whole_model_is_done_at_once_and_takes_nothing(joined: Joined) -> None:
    link, broker = joined("server")
    absent = Absent(link, msgspec.structs.replace(TURN, plan=Plan(cut="output")))
    absent.begin()
    held = next(beat.held for beat in iter(lambda: broker.heard(messages.Beat), None) if beat.held)
    assert [(each.state, each.digest) for each in held] == [("done", State.of({}).digest)]
    with pytest.raises(RemoteProtocolError, match="Client 0 sent Tensors, though it has the whole model"):
        absent.incoming(come(0, 0, 0))
