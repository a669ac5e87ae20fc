"""Asking a run's model with the front here and the back at a server: images stay, smashed data travel."""

import time
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from zsplit.config import from_json
from zsplit.errors import ConfigError, LinkError, RunFailedError
from zsplit.train.half import Half, Workshop
from zsplit.train.link import Fetched, Incoming, Link
from zsplit.train.machine import describe
from zsplit.train.tail import TAIL
from zsplit.wire.messages import Held, Orders, Predict, What
from zsplit.wire.messages import Tensors as TensorsMessage

WINDOW = 8
"""Inputs that are unanswered at once."""


class Asking(NamedTuple):
    """Who is asked, and what for: the broker's address, the shape of a sample and the version that is expected.

    `seconds` is how long to wait for the broker, and then for a server. `allowed` are the modules of which the config
    may name functions.
    """

    address: str
    shape: tuple[int, ...]
    version: str
    device: torch.device
    seconds: float
    say: Callable[[str], None]
    allowed: tuple[str, ...] = ()


@torch.no_grad()
def ask_split(asking: Asking, inputs: Tensor) -> list[Tensor]:
    """Return the outputs for each of the inputs, in order; each travels by itself.

    Raises LinkError where there is no broker or no server in time, ConfigError where the broker serves nothing or
    another version, RunFailedError where it ends or the server leaves meanwhile.
    """
    link = Link(asking.address, "client", say=asking.say)
    with closing(link):
        config = from_json(link.join(asking.seconds).config)
        if not link.welcome.serving:
            raise ConfigError(
                f"The broker at {asking.address} trains: `zsplit broker --serve RUN` starts one that can be asked."
            )
        workshop = Workshop(config, asking.shape, asking.device, None, allowed=asking.allowed)
        link.prepared(describe(asking.device, workshop.cut, tail=workshop.tail, earliest=workshop.earliest))
        job = _job(link, asking)
        if job.base.digest != asking.version:
            raise ConfigError(
                f"The broker at {asking.address} serves version {job.base.digest[:12]}, the run's is "
                f"{asking.version[:12]}: name the folder of the run that it serves."
            )
        half = workshop.front(job.plan.cut, job.plan.tail)
        _load(link, job, half)
        return _ask(link, job, half, inputs)


def _job(link: Link, asking: Asking) -> Predict:
    """Wait until there is a server and it is ready."""
    until = time.monotonic() + asking.seconds
    while (left := until - time.monotonic()) > 0:
        event = link.next(left)
        if isinstance(event, Orders):
            check_on(event)
            if found := [job for job in event.jobs if isinstance(job, Predict)]:
                return found[0]
    raise LinkError(
        f"No server joined the broker at {asking.address} within {asking.seconds:g} s: start one with `zsplit server`."
    )


def _load(link: Link, job: Predict, half: Half) -> None:
    link.report(Held(lease=job.lease, state="opening"), at_once=False)
    link.fetch(job.lease, job.base, half.needs(job.base.digest, training=False))
    while not isinstance(event := link.next(), Fetched):
        check_job(event, job)
    half.load(job.base.digest, event.tensors)
    half.part.eval()


def _ask(link: Link, job: Predict, half: Half, inputs: Tensor) -> list[Tensor]:
    outputs: dict[int, Tensor] = {}
    for number, one in enumerate(inputs):
        while number - len(outputs) >= WINDOW:
            _take(link, job, outputs)
        sent: list[tuple[What, Tensor, str]] = [("smashed", half.part(one[None].to(half.device)), job.plan.up)]
        link.send_tensors(job.lease, "predict", number, 0, 0, sent, {})
    while len(outputs) < len(inputs):
        _take(link, job, outputs)
    answers = [outputs[number] for number in range(len(inputs))]
    if not job.plan.tail:
        return answers
    return [half.part(answer[None].to(half.device), TAIL)[0] for answer in answers]


def _take(link: Link, job: Predict, outputs: dict[int, Tensor]) -> None:
    """Take the next event in; outputs are kept by the number of their input."""
    event = link.next()
    if isinstance(event, Incoming) and isinstance(event.message, TensorsMessage):
        outputs[event.message.step] = event.tensors["other"][0]
    else:
        check_job(event, job)


def check_job(event: object, job: Predict) -> None:
    """Raise RunFailedError where the orders no longer list the job: its server left, or serving has ended."""
    if isinstance(event, Orders):
        check_on(event)
        if all(each.lease != job.lease for each in event.jobs):
            raise RunFailedError("The server left before it had answered everything: ask again.")


def check_on(orders: Orders) -> None:
    if orders.finish is not None:
        raise RunFailedError(f"{orders.finish.sentence}.")
