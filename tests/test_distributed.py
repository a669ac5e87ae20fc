"""One server of several processes: what it computes is what one process computes, within `TOLERANCE`."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import LEAVING, QUICK, Processes, free_port, settings
from helpers import config_of
from nets import images
from safetensors.torch import load_file
from torch import Tensor, nn

from zsplit.config import Config
from zsplit.errors import ConfigError, PlanError
from zsplit.model import DeferredBatchNorm, randomness
from zsplit.model.joint import Slice
from zsplit.train.distributed import LeadingWorkshop, follow
from zsplit.train.half import Half, Workshop
from zsplit.train.machine import started_together
from zsplit.train.together import Team

CPU = torch.device("cpu")

SHAPE = (1, 8, 8)

TOLERANCE = 1e-5
"""Norm of the difference over the norm, of one step's gradients (docs/architecture.md)."""


def meeting(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment in which torchrun starts a process."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def live(rank: int, size: int, port: int) -> None:
    """The life of a process that follows."""
    os.environ.update(meeting(rank, size, port))
    torch.set_num_threads(1)
    follow(Team.join(), "cpu", allowed=["nets"])
    assert not threads_of_gloo()


def threads_of_gloo() -> list[str]:
    """Return the threads of this process that send and receive for torch.distributed."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


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
    assert threads_of_gloo()
    yield joined
    joined.leave()
    assert not threads_of_gloo()
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


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Compare parameters, running statistics and each kind of the optimizer's buffers, each kind as a whole.

    A single bias may have no gradient but for rounding: what comes before BatchNorm does.
    """
    assert ours.keys() == theirs.keys()
    kinds: dict[str, list[str]] = {}
    for name in theirs:
        last = name.rpartition(".")[2]
        kind = name.rpartition("/")[0] or (last if last.startswith(("running", "num")) else "parameters")
        kinds.setdefault(kind, []).append(name)
    found = {kind: error(*(flat(each, names) for each in (ours, theirs))) for kind, names in kinds.items()}
    assert all(value <= tolerance for value in found.values()), found


def flat(tensors: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names])


# Gradients

NETS = [("plain", "fc1"), ("normed", "conv1"), ("idle", "fc1")]


@pytest.mark.parametrize(("net", "cut"), NETS)
@pytest.mark.parametrize(("size", "micros"), [(8, 1), (7, 3), (12, 5), (2, 1)])
def test_gradients_are_those_of_one_process(team: Team, net: str, cut: str, size: int, micros: int) -> None:
    config = settings_of(net, train__momentum=0.9)
    one, several = pair_of(team, config, cut)
    for number in range(3):
        x, labels = batch_for(config, cut, size, number)
        for ours, theirs in zip(step(several, x, labels, micros), step(one, x, labels, micros), strict=True):
            assert error(ours, theirs) <= TOLERANCE
        assert_close(gradients(several), gradients(one))
        torch.testing.assert_close(several.gradient_norms(), one.gradient_norms(), rtol=1e-4, atol=1e-6, equal_nan=True)
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


def test_a_middle_goes_back_after_several_micro_batches_went_forward(team: Team) -> None:
    config = settings_of("normed", train__labels="keep", train__micro_batches=3, model__cut="conv1", model__tail="bn3")
    one, several = pair_of(team, config, "conv1", "bn3")
    for number in range(2):
        x, _ = batch_for(settings_of("normed"), "conv1", 8, number)
        given = []
        for half in (one, several):
            half.begin_step(3)
            slices = [xs.clone().requires_grad_() for xs in x.tensor_split(3)]
            outputs = [half.forward(xs) for xs in slices]
            for output in outputs:
                torch.autograd.backward(output, torch.cos(torch.arange(output.numel()).view_as(output)))
            given.append({"outputs": torch.cat(outputs).detach(), "x": torch.cat([xs.grad for xs in slices])})
        assert_close(given[1], given[0])
        assert_close(gradients(several), gradients(one))
        for half in (one, several):
            half.step()


def test_the_model_s_own_input_gets_no_gradient(team: Team) -> None:
    config = settings_of("normed", model__cut="input", schedule__clients=1)
    one, several = pair_of(team, config, "input")
    x, labels = images(6)
    for half in (one, several):
        half.begin_step(1)
        F.cross_entropy(half.forward(x), labels).backward()
    assert x.grad is None
    assert_close(gradients(several), gradients(one))


def test_a_back_without_parameters_only_passes_gradients_on(team: Team) -> None:
    config = settings_of("idle")
    one, several = pair_of(team, config, "relu")
    x, labels = batch_for(config, "relu", 5)
    for ours, theirs in zip(step(several, x, labels, 2), step(one, x, labels, 2), strict=True):
        assert error(ours, theirs) <= TOLERANCE
    assert gradients(several) == {}


def test_an_evaluation_is_spread_too_and_changes_nothing(team: Team) -> None:
    config = settings_of("normed")
    one, several = pair_of(team, config, "conv1")
    x, _ = batch_for(config, "conv1", 7)
    before = several.state().digest
    for half in (one, several):
        half.part.eval()
    with torch.no_grad():
        outputs, expected = several.forward(x), one.forward(x)
    assert error(outputs, expected) <= TOLERANCE
    assert not outputs.requires_grad
    assert several.state().digest == before


def test_a_version_with_optimizer_buffers_is_taken_over_by_all(team: Team) -> None:
    config = settings_of("normed", train__momentum=0.9)
    one, several = pair_of(team, config, "conv1")
    for turn in range(2):
        for number in range(2):
            x, labels = batch_for(config, "conv1", 9, 2 * turn + number)
            for half in (one, several):
                step(half, x, labels, 2)
                half.step()
        version = one.state()
        assert_close(several.state().tensors(), version.tensors(), 1e-4)
        for half in (one, several):
            half.load(version.digest, version.tensors())
            assert half.state().digest == version.digest


def test_what_is_random_repeats_itself_and_differs_between_processes(team: Team) -> None:
    config = settings_of("dropping")
    _, several = pair_of(team, config, "front.3")
    x = batch_for(config, "front.3", 1)[0].expand(2 * team.size, -1, -1, -1)

    def outputs(micro: int) -> Tensor:
        several.begin_step(1)
        with randomness(0, 0, 0, 0, micro):
            return several.forward(x).detach()

    first = outputs(0)
    assert torch.equal(first, outputs(0))
    assert not torch.equal(first, outputs(1))
    assert not torch.equal(first[0], first[2])


# Who is who


@pytest.mark.parametrize(
    ("environment", "together"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1"}, False),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, True),
    ],
)
def test_only_several_processes_of_torchrun_are_one_server(environment: dict[str, str], together: bool) -> None:
    assert started_together(environment) is together


def test_on_the_cpu_every_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Team(1, 2, 1).device("cpu") == Team(1, 2, 1).device("auto") == CPU


@pytest.mark.parametrize("asked", ["cuda:1", "mps"])
def test_a_device_that_is_not_one_for_each_process_is_refused(asked: str) -> None:
    assert refusal(Team(0, 2), asked) == (
        f"A server of 2 processes cannot use the device '{asked}': give --device cuda, and each process takes a GPU of "
        "its own, or --device cpu."
    )


def test_gpus_without_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert refusal(Team(0, 2), "cuda") == (
        "This torch has no NCCL, which a server of 2 processes needs on GPUs: use --device cpu, or start one process."
    )


def test_fewer_gpus_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert refusal(Team(1, 2, 1), "cuda") == (
        "torchrun started more processes on this machine than it has GPUs (1): lower --nproc-per-node, or use "
        "--device cpu."
    )


def refusal(team: Team, device: str) -> str:
    with pytest.raises(ConfigError) as caught:
        team.device(device)
    return str(caught.value)


# What a slice of one sample is to BatchNorm


def test_a_sample_on_each_process_is_enough_for_batch_norm() -> None:
    norm = nn.BatchNorm1d(3)
    deferred = DeferredBatchNorm(norm)
    with pytest.raises(PlanError):
        norm(torch.ones(1, 3))
    deferred.count_with(Slice(own=1, rows=1, total=2).elements)
    with pytest.raises(ValueError, match="more than 1 value"):  # torch's own word: it was let through
        norm(torch.ones(1, 3))


# Real processes


TORCHRUN = Path(sys.executable).with_name("torchrun")

TOGETHER = ("--standalone", "--nproc-per-node", "2", "-m", "zsplit")

LONG = 20.0
"""Seconds within which such a server has ended: torchrun itself kills after 30 what has not."""

RUN_TOLERANCE = 1e-4
"""The same of the weights and buffers after a whole run of the digits."""


def trained(folder: Path, several: bool, *keys: str) -> dict[str, Tensor]:
    """Train the digits with two clients and a server of one process, or of two; return the last version."""
    folder.mkdir()
    port = free_port()
    at = "--broker", f"127.0.0.1:{port}"
    cpu = "server.device=cpu", "client.device=cpu"
    with Processes(folder) as processes:
        broker = processes.start("broker", *settings(f"broker.port={port}", *QUICK, *cpu, *keys), "--out", "out")
        broker.line("listens")
        server = (
            processes.start(*TOGETHER, "server", *at, program=[TORCHRUN]) if several else processes.start("server", *at)
        )
        clients = [processes.start("client", *at) for _ in range(2)]
        for command in (broker, server, *clients):
            assert command.wait() == 0, command.said
        assert processes.gone(LEAVING)
        assert not several or server.line("process 2 of 2 of this server is done")
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return load_file(folder / "out" / "versions" / f"{summary['versions'][-1]}.safetensors")


@pytest.mark.timeout(240)
def test_a_run_with_a_server_of_two_processes_ends_with_the_weights_of_one(tmp_path: Path) -> None:
    keys = "train.micro_batches=3", "train.clip_norm=0.5"
    one, two = trained(tmp_path / "one", False, *keys), trained(tmp_path / "two", True, *keys)
    assert any(name.startswith("optimizer/") for name in one)
    assert any(not torch.equal(one[name], two[name]) for name in one)  # else they are one process after all
    assert_close(two, one, RUN_TOLERANCE)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ["a process is killed", "ctrl-c"])
def test_a_server_that_is_ended_is_lost_whole_and_nothing_is_left_behind(processes: Processes, end: str) -> None:
    port = free_port()
    broker = processes.start("broker", *settings(f"broker.port={port}", *QUICK), "--out", "out")
    broker.line("listens")
    arguments = "server", "--broker", f"127.0.0.1:{port}", "--device", "cpu"
    server = processes.start(*TOGETHER, *arguments, program=[TORCHRUN])
    server.line("joined the run")
    if end == "ctrl-c":
        server.signal(signal.SIGINT)
    else:
        follower = next(p for p in processes.alive() if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
        os.kill(follower, signal.SIGKILL)
    assert server.wait(LONG) == 1
    broker.signal(signal.SIGINT)
    broker.wait()
    assert processes.gone(LEAVING)
