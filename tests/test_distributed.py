"""One server of several processes: what it computes is what one process computes, within `TOLERANCE`."""

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import free_port
from helpers import config_of
from nets import images
from torch import Tensor

from zsplit.config import Config
from zsplit.errors import ConfigError, PlanError
from zsplit.model import randomness
from zsplit.train.distributed import LeadingWorkshop, follow
from zsplit.train.half import Half, Workshop
from zsplit.train.machine import started_together
from zsplit.train.together import Team

CPU = torch.device("cpu")

SHAPE = (1, 8, 8)

TOLERANCE = 1e-5
"""Norm of the difference over the norm, of one step's gradients; docs/distributed.md says so."""


def meeting(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment in which torchrun starts a process."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def live(rank: int, size: int, port: int) -> None:
    """The life of a process that follows."""
    os.environ.update(meeting(rank, size, port))
    torch.set_num_threads(1)
    follow(Team.join(), "cpu", allowed=["nets"])


@pytest.fixture(scope="module", params=[2, 3])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """The processes of a server: this one leads, and the others end with it."""
    size, port = request.param, free_port()
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=live, args=(rank, size, port), daemon=True) for rank in range(1, size)]
    for process in others:
        process.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in meeting(0, size, port).items():
            patch.setenv(name, value)
        joined = Team.join()
    yield joined
    joined.leave()
    for process in others:
        process.join(30)
        assert process.exitcode == 0


def settings_of(net: str, **keys: object) -> Config:
    return config_of(data__name="own", model__name=f"nets:{net}", server__threads=1, **keys)


def pair_of(team: Team, config: Config, cut: str, tail: str = "") -> tuple[Half, Half]:
    """Return a back of one process, and one of all, with the same version."""
    alone = Workshop(config, SHAPE, CPU, None, allowed=["nets"])
    together = LeadingWorkshop(team, config, SHAPE, CPU, allowed=["nets"])
    backs = alone.back(cut, tail), together.back(cut, tail)
    version = alone.initial()
    for half in backs:
        half.load(version.digest, version.tensors())
        half.part.train()
    return backs


def batch_for(config: Config, cut: str, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return smashed data at the cut, and labels."""
    workshop = Workshop(config, SHAPE, CPU, None, allowed=["nets"])
    x, labels = images(size, seed)
    front = workshop.parts(cut)[0]
    with torch.no_grad():
        return front.eval()(x), labels


def gradients(half: Half) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in half.part.named_parameters() if p.grad is not None}


def step(half: Half, x: Tensor, labels: Tensor, micros: int) -> list[Tensor]:
    """Take a mini-batch forward and back; return the gradients of its slices, and what they gave."""
    half.use_epoch(0)
    half.begin_step(micros)
    found = []
    for micro, (xs, ys) in enumerate(zip(x.tensor_split(micros), labels.tensor_split(micros), strict=True)):
        smashed = xs.clone().requires_grad_()
        with randomness(0, 0, 0, 0, micro):
            outputs = half.forward(smashed)
        torch.autograd.backward(F.cross_entropy(outputs, ys) * (len(ys) / len(labels)))
        assert smashed.grad is not None
        found += [outputs.detach(), smashed.grad]
    return found


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    assert ours.shape == theirs.shape
    norm = float(torch.linalg.vector_norm(theirs.double()))
    return float(torch.linalg.vector_norm(ours.double() - theirs.double())) / (norm or 1.0)


def errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {name: error(ours[name], theirs[name]) for name in ours}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    wrong = {name: value for name, value in errors(ours, theirs).items() if not value <= tolerance}
    assert not wrong


# Gradients

NETS = [("plain", "fc1"), ("normed", "conv1"), ("idle", "fc1")]


@pytest.mark.parametrize(("net", "cut"), NETS)
@pytest.mark.parametrize(("size", "micros"), [(8, 1), (7, 3), (12, 5), (2, 1)])
def test_gradients_are_those_of_one_process(team: Team, net: str, cut: str, size: int, micros: int) -> None:
    config = settings_of(net, train__optimizer="adam", train__momentum=0.0)
    one, several = pair_of(team, config, cut)
    for number in range(3):
        x, labels = batch_for(config, cut, size, number)
        for ours, theirs in zip(step(several, x, labels, micros), step(one, x, labels, micros), strict=True):
            assert error(ours, theirs) <= TOLERANCE
        assert_close(gradients(several), gradients(one))
        torch.testing.assert_close(several.gradient_norms(), one.gradient_norms(), rtol=1e-5, atol=1e-7, equal_nan=True)
        for half in (one, several):
            half.scale_gradients(0.5)
            half.step()
    assert_close(several.state().tensors(), one.state().tensors(), 1e-4)


def test_a_mini_batch_of_one_sample_leaves_processes_without_any(team: Team) -> None:
    config = settings_of("plain")
    one, several = pair_of(team, config, "fc1")
    x, labels = batch_for(config, "fc1", 1)
    for ours, theirs in zip(step(several, x, labels, 1), step(one, x, labels, 1), strict=True):
        assert error(ours, theirs) <= TOLERANCE
    assert_close(gradients(several), gradients(one))


def test_batch_norm_with_one_value_for_each_channel_is_refused_as_in_one_process(team: Team) -> None:
    pass
