"""What goes wrong has a sentence: each error that a user can meet, met in real processes."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
import zmq
from conftest import QUICK, Command, Ending, Processes, settings, until, writer_of
from nets import images
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from zsplit import from_datasets, load_config, run_here
from zsplit.errors import ConfigError
from zsplit.wire.frames import decode_control, decode_data, encode
from zsplit.wire.messages import PROTOCOL, Detached, Lease, Refused, TensorMeta, Tensors, Welcome
from zsplit_broker.versions import Versions

Here = Callable[..., Ending]

LEASE = 3.0
"""`link.lease_seconds` where somebody is to be missed soon."""

IMPATIENT = ("broker.port=0", *QUICK, f"link.lease_seconds={LEASE}", "link.beat_seconds=0.5")

KEPT = r"The last version, (\w{12}), is kept \((\d+) of \d+ rounds are done\): `zsplit resume \S+` goes on"
"""What a run that ends early says last, as a pattern."""


# Nobody there, or somebody already


def test_a_peer_without_a_broker_says_what_it_tries_and_for_how_long(here: Here) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for command in ("server", "client", "monitor"):
            code, out, err = here(command, "--broker", address, "--connect-seconds", "0.4")
            assert (code, out) == (1, "")
            assert err.splitlines() == [
                f"No answer from a broker at {address} yet; trying for 0.4 s",
                f"zsplit: No broker answered at {address} within 0.4 s: "
                "start one there (zsplit broker), or give its address with --broker HOST:PORT.",
            ]


@pytest.mark.parametrize("command", ["broker", "run"])
def test_a_port_in_use_is_named_with_the_key_to_change(command: str, processes: Processes) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = processes.run(command, *settings(f"broker.port={port}"), "--out", "out")
    assert refused.process.returncode == 2
    (sentence,) = refused.said
    assert (
        f"Port {port} is in use, by another broker perhaps: choose a free one with --set broker.port=N, "
        "or any with --set broker.port=0."
    ) in sentence
    assert list(processes.folder.iterdir()) == []


@pytest.mark.parametrize("key", ["broker.data_port", "broker.events_port"])
def test_of_three_ports_the_one_in_use_is_named(key: str, here: Here, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = here("broker", *settings("broker.port=0", f"{key}={port}"), "--out", "out")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"zsplit: Port {port} is in use, by another broker perhaps: choose a free one with --set {key}=N"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_not_this_machine_s_is_named_with_its_key(here: Here, tmp_path: Path) -> None:
    code, out, err = here("broker", *settings("broker.host=192.0.2.1", "broker.port=7000"), "--out", "out")
    assert (code, out) == (2, "")
    sentence = r"zsplit: Cannot listen on 192\.0\.2\.1:7000 \(.+\): check broker\.host and broker\.port\.\n"
    assert re.fullmatch(sentence, err)
    assert list(tmp_path.iterdir()) == []


def test_a_monitor_whose_broker_is_gone_says_so_in_the_end(processes: Processes) -> None:
    broker = processes.start("broker", *settings("broker.port=0"), "--out", "out")
    address = broker.line("The broker listens at ").split()[4].rstrip(";")
    monitor = processes.start("monitor", "--broker", address, "--connect-seconds", "2")
    monitor.line("run digits waiting")
    broker.process.kill()
    assert monitor.wait() == 1
    assert monitor.err[-1] == f"zsplit: The broker at {address} has fallen silent: is it still running?"


def test_objects_of_a_script_that_no_other_process_can_have_are_refused(tmp_path: Path) -> None:
    class Hidden(nn.Linear):
        pass

    data = from_datasets(TensorDataset(*images(8)), TensorDataset(*images(2)), classes=10)
    with pytest.raises(
        ConfigError, match=r"cannot be handed to other processes .*Hidden.*at the top level of a module"
    ):
        run_here(load_config(None, {"broker.port": 0}), str(tmp_path / "out"), Hidden(64, 10), data)
    assert list(tmp_path.iterdir()) == []


class Waiting(NamedTuple):
    """A broker that waits for peers, and one that has joined it."""

    address: str
    broker: Command
    client: Command


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    """Client 0 of two is there, nobody else comes; in the end the broker is stopped."""
    with Processes(tmp_path_factory.mktemp("waiting")) as processes:
        broker = processes.start("broker", *settings("broker.port=0", *QUICK))
        address = broker.line("The broker listens at ").split()[4].rstrip(";")
        client = processes.start("client", "-i", "0", "--broker", address)
        client.line(f"client 0 joined the run at {address}")
        yield Waiting(address, broker, client)
        broker.signal(signal.SIGINT)
        assert client.wait() == 1
        assert client.err[-1] == "zsplit: stopped by SIGINT. Nothing was stored yet: start the run again."


def test_a_client_index_out_of_range_is_refused(waiting: Waiting, here: Here) -> None:
    code, out, err = here("client", "-i", "7", "--broker", waiting.address)
    assert (code, out) == (2, "")
    assert err == ("zsplit: client index 7 is out of range: this run has 2 clients, 0 to 1 (schedule.clients).\n")


def test_a_second_client_of_an_index_is_refused_and_the_first_goes_on(waiting: Waiting, here: Here) -> None:
    code, out, err = here("client", "-i", "0", "--broker", waiting.address)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"zsplit: client 0 is already running on {socket.gethostname()}."
    assert waiting.client.process.poll() is None
    assert not any("client 0" in line for line in waiting.broker.err)


def hello(**fields: object) -> bytes:
    return msgspec.msgpack.encode({"type": "hello", "role": "client", "index": 1, "instance": "of a test"} | fields)


def answer(address: str, message: bytes) -> Any:
    """Send a control message as any program might, and return what the broker answers."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as control:
        control.linger = 0
        control.connect(f"tcp://{address}")
        control.send(message)
        assert control.poll(10_000), "the broker did not answer"
        return decode_control(control.recv())


@pytest.mark.parametrize("changed", [{}, {"role": "planner", "index": "first", "colour": "blue"}])
def test_another_version_of_the_protocol_is_refused(changed: dict[str, object], waiting: Waiting) -> None:
    assert answer(waiting.address, hello(protocol=99, **changed)) == Refused(
        sentence=f"this broker speaks protocol {PROTOCOL}, you speak 99: "
        "install the same version of zsplit on both machines",
        code=2,
    )


def test_fields_that_a_later_version_may_add_are_ignored(waiting: Waiting) -> None:
    assert isinstance(answer(waiting.address, hello(protocol=PROTOCOL, role="monitor", colour="blue")), Welcome)


def test_tensors_of_one_that_was_given_up_are_answered_without_them(waiting: Waiting) -> None:
    welcome = answer(waiting.address, hello(protocol=PROTOCOL, role="monitor"))
    smashed = TensorMeta("smashed", "F32", (2, 3), "raw", 24)
    stale = Tensors(welcome.run, "of before", Lease(1, 1), "train", 0, (smashed,), 0, 0)
    with zmq.Context() as context, context.socket(zmq.DEALER) as data:
        data.linger = 0
        data.connect(f"tcp://{waiting.address.rpartition(':')[0]}:{welcome.data_port}")
        data.send_multipart([encode(stale), bytes(24)])
        assert data.poll(10_000), "the broker did not answer"
        header, *frames = data.recv_multipart()
    assert (decode_data(header), frames) == (Detached(welcome.run, ""), [])


def test_a_broker_that_dies_is_looked_for_by_its_peers_until_their_patience_ends(processes: Processes) -> None:
    broker = processes.start("broker", *settings(*IMPATIENT, f"link.patience_seconds={2 * LEASE}"))
    address = broker.line("The broker listens at ").split()[4].rstrip(";")
    peers = [processes.start(*words.split(), "--broker", address) for words in ("server", "client")]
    for peer in peers:
        peer.line("joined the run")
    broker.signal(signal.SIGKILL)
    assert broker.wait() == -signal.SIGKILL
    for peer in peers:
        assert peer.wait() == 1
        assert peer.err[-2:] == [
            f"the broker at {address} has been silent for {LEASE:g} s; looking for it",
            f"zsplit: the broker at {address} has been silent for {2 * LEASE:g} s: is it still running?",
        ]


# What a peer finds wrong before the run begins


def nearly_mnist(folder: Path) -> None:
    """Put files where MNIST's training data should be: the head of its images, and nothing."""
    (raw := folder / "MNIST" / "raw").mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(bytes.fromhex("00000803 0000ea60 0000001c 0000001c"))
    (raw / "train-labels-idx1-ubyte").touch()


WRONG = {
    "model.name=resnet19": "There is no model 'resnet19': the nearest names are resnet18",
    "model.name=os:getcwd": "model.name = 'os:getcwd' would import os, which this peer was not started with: if you",
    "model.cut=ms:deep": "'ms:deep' means nothing for digits/cnn: ms: is for ms/vgg19, ms/resnet18, ms/resnet34.",
    "model.cut=poll": "There is no 'poll' in Sequential: the nearest cuts are 'pool' (4), and `zsplit cuts` lists all.",
    "model.cut=8": "There is no cut 8: the cuts of Sequential go from 'conv1' (0) to 'relu3' (7)",
    "model.num_classes=7": "model.num_classes = 7 is too small, the data has 10 classes: set model.num_classes = 10.",
    "data.name=mnist": "mnist needs a folder with MNIST/raw/train-images-idx3-ubyte",
    "data.name=mnist data.path=none": "data.path = none is no folder: mnist needs one with MNIST/raw/train-images",
    "data.name=mnist data.path=empty": "empty has no train-images-idx3-ubyte: mnist needs a folder with MNIST/raw/",
    "data.name=mnist data.path=.": "is damaged (47040000 bytes should follow its head, 0 do): fetch it again.",
    "data.name=own": 'data.name = "own"',
    "server.device=cuda:77": "The device 'cuda:77' cannot be used on this machine: use --device auto or cpu.",
}


@pytest.mark.parametrize("assignments", WRONG)
def test_what_a_peer_cannot_use_ends_a_run_that_never_began(assignments: str, here: Here, tmp_path: Path) -> None:
    nearly_mnist(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, err = here("run", *settings("broker.port=0", *QUICK, *assignments.split()), "--out", "out")
    assert code == 2
    (sentence,) = err.splitlines()
    assert sentence.startswith(("zsplit: Client ", "zsplit: Server 0: "))
    assert WRONG[assignments] in sentence
    assert not (tmp_path / "out").exists()


UNKNOWN = {
    "data.name=digit": 'data.name = "digit" does not exist: the nearest is "digits".',
    "schedule.policy=roundrobin": 'schedule.policy must be "async" or "parallel" or "round_robin", not "roundrobin": '
    'the nearest is "round_robin".',
}


@pytest.mark.parametrize("assignment", UNKNOWN)
@pytest.mark.parametrize("command", ["broker", "run"])
def test_a_value_that_is_none_of_the_choices_is_refused(command: str, assignment: str, here: Here) -> None:
    code, out, err = here(command, *settings(assignment))
    assert (code, out) == (2, "")
    assert UNKNOWN[assignment] in err


@pytest.mark.parametrize("command", ["broker", "run"])
def test_a_folder_that_is_not_empty_is_never_overwritten(command: str, here: Here, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_text("precious")
    code, out, err = here(command, *settings("broker.port=0"), "--out", "out")
    assert (code, out) == (2, "")
    assert "out exists already and is not overwritten: choose another --out" in err
    assert list(mine.parent.iterdir()) == [mine]
    assert mine.read_text() == "precious"


# What goes wrong on the way


def kept(sentence: str, folder: Path) -> int:
    """Check that the version which a sentence names is on the disk and whole; return the number of finished rounds."""
    found = re.search(KEPT, sentence)
    assert found is not None, sentence
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stored"][-1].startswith(found[1])
    Versions(folder / "versions").verify(summary["stored"][-1])
    assert not (folder / "model.safetensors").exists()
    assert summary["rounds"] == int(found[2])
    return int(found[2])


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_do(here: Here, tmp_path: Path) -> None:
    code, out, err = here("run", *settings("broker.port=0", *QUICK, "train.lr=1e30"), "--out", "out")
    assert code == 1
    (sentence,) = err.splitlines()
    assert re.match(
        r"zsplit: client (0|1) is gone: The loss became (nan|inf) in round 1, step \d+: "
        r"lower train\.lr, or set train\.clip_norm\. ",
        sentence,
    ), sentence
    assert kept(sentence, tmp_path / "out") == 0
    assert out.splitlines()[-1] == "Everything is in out"


@pytest.mark.parametrize("part", ["test", "validation"])
def test_figures_that_are_no_numbers_end_the_run_and_name_the_round_they_come_after(
    part: str, here: Here, tmp_path: Path
) -> None:
    # One step: its own loss is a number, and only what the version after it makes of new data is not.
    one_step = ["schedule.clients=1", "run.rounds=1", "train.batch_size=16", "train.lr=1e30"]
    data = ["data.train_size=20", "data.val_fraction=0.2"] if part == "validation" else ["data.train_size=16"]
    command = settings("broker.port=0", *QUICK, "data.val_fraction=0.0", *one_step, *data)
    code, _, err = here("run", *command, "--out", "out")
    assert code == 1
    (sentence,) = err.splitlines()
    assert re.match(
        rf"zsplit: client 0 is gone: The {part} loss after round 1 is (nan|inf): lower train\.lr\. ", sentence
    ), sentence
    assert kept(sentence, tmp_path / "out") == (1 if part == "test" else 0)


ENDLESS = "run.rounds=100000"


@pytest.mark.parametrize("peer", ["client 1", "server 0"])
def test_a_peer_that_is_killed_and_not_started_again_ends_the_run_before_its_lease_does(
    peer: str, processes: Processes
) -> None:
    options = settings("broker.port=0", *QUICK, ENDLESS, "link.lease_seconds=1000")
    run = processes.start("run", "--no-monitor", "--restarts", "0", "--out", "out", *options)
    run.line(" round 2/")
    os.kill(writer_of(processes.folder / "out" / "logs" / f"{peer.replace(' ', '-')}.log"), signal.SIGKILL)
    assert run.wait() == 1
    assert run.err[-1].startswith(f"zsplit: {peer.capitalize()}: it was killed by SIGKILL; ")
    assert kept(run.err[-1], processes.folder / "out") >= 2


def test_a_broker_that_is_killed_and_not_started_again_ends_the_run(processes: Processes) -> None:
    options = settings("broker.port=0", *QUICK, ENDLESS)
    run = processes.start("run", "--no-monitor", "--restarts", "0", "--out", "out", *options)
    run.line(" round 2/")
    (broker,) = (each for each in processes.alive() if b"zsplit_broker" in Path(f"/proc/{each}/cmdline").read_bytes())
    os.kill(broker, signal.SIGKILL)
    assert run.wait() == 1
    assert run.err == [
        "zsplit: the broker was killed by SIGKILL; what it stored is kept, and `zsplit resume out` goes on with it."
    ]
    assert list((processes.folder / "out" / "versions").iterdir())


def test_a_client_that_hangs_is_missed_within_its_lease_and_joins_again_when_it_wakes(processes: Processes) -> None:
    broker = processes.start("broker", *settings(*IMPATIENT, ENDLESS), "--out", "out")
    address = broker.line("The broker listens at ").split()[4].rstrip(";")
    server, client, hung = (
        processes.start(*words.split(), "--broker", address) for words in ("server", "client -i 0", "client -i 1")
    )
    monitor = processes.start("monitor", "--broker", address)
    monitor.line(" round 1/")
    hung.process.send_signal(signal.SIGSTOP)
    stopped = monotonic()
    monitor.line(f"client.1  error: no sign of life for {LEASE:g} s (link.lease_seconds); it is waited for, 60 s")
    assert LEASE / 2 < monotonic() - stopped < 2 * LEASE
    rounds = sum(" round " in line for line in monitor.out)
    hung.process.send_signal(signal.SIGCONT)
    hung.line("the broker had given this peer up; joined again as client 1")
    until(lambda: sum(" round " in line for line in monitor.out) > rounds + 1)
    broker.signal(signal.SIGINT)
    assert [each.wait() for each in (broker, server, client, hung, monitor)] == [1, 1, 1, 1, 0]
    sentence = broker.err[-1]
    assert sentence.startswith("stopped by SIGINT. ")
    assert kept(sentence, processes.folder / "out") >= 2
    assert {each.err[-1] for each in (server, client, hung)} == {f"zsplit: {sentence}."}
    assert monitor.out[-1].endswith(sentence)
    assert not any("Traceback" in line for each in (broker, server, client, hung) for line in each.said)


def test_a_server_that_hangs_while_another_comes_in_its_place_joins_again_beside_it_when_it_wakes(
    processes: Processes,
) -> None:
    broker = processes.start("broker", *settings(*IMPATIENT, ENDLESS), "--out", "out")
    address = broker.line("The broker listens at ").split()[4].rstrip(";")
    hung = processes.start("server", "--broker", address)
    clients = [processes.start("client", "-i", str(index), "--broker", address) for index in (0, 1)]
    monitor = processes.start("monitor", "--broker", address)
    monitor.line(" round 1/")
    hung.process.send_signal(signal.SIGSTOP)
    monitor.line(f"server.0  error: no sign of life for {LEASE:g} s (link.lease_seconds)")
    newcomer = processes.start("server", "--broker", address)
    newcomer.line("server 0 joined the run at ")
    rounds = sum(" round " in line for line in monitor.out)
    until(lambda: sum(" round " in line for line in monitor.out) > rounds)
    hung.process.send_signal(signal.SIGCONT)
    hung.line("joined again as server 1")
    rounds = sum(" round " in line for line in monitor.out)
    newcomer.process.kill()
    until(lambda: sum(" round " in line for line in monitor.out) > rounds + 1)
    broker.signal(signal.SIGINT)
    assert [each.wait() for each in (broker, hung, *clients, monitor)] == [1, 1, 1, 1, 0]
    assert not any("Traceback" in line for each in (broker, hung, *clients) for line in each.said)


@pytest.mark.parametrize("model", ["shared", "fused"])
def test_a_round_goes_on_without_a_client_whose_link_is_too_slow_for_it(model: str, here: Here, tmp_path: Path) -> None:
    slow = 'link.client=[{clients = "1", uplink_mbps = 0.05}]'  # a batch takes it some ten seconds
    small = ("train.batch_size=16", "data.train_size=96", "data.test_size=6", "run.eval_every=0", "run.rounds=1")
    keys = (f"schedule.server_model={model}", "schedule.round_timeout=4", "schedule.clients=3", slow, *small)
    ending = here("run", *settings("broker.port=0", *keys), "--out", str(tmp_path / "out"), "--no-monitor")
    assert ending.code == 0
    [late] = [line for line in ending.out.splitlines() if "did not finish" in line]
    sentence = "client 1 did not finish within 4 s (schedule.round_timeout): the round goes on without it"
    assert late.endswith(f"client.1  warning: {sentence}")
    [round_] = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert round_["samples"] == 2 * (96 - 9) / 3


class Scratched(Dataset[tuple[Tensor, int]]):
    """Samples of which one cannot be read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 13:
            raise OSError("the disk is scratched")
        return torch.ones(2), 0


def test_what_a_script_s_own_code_raises_is_named_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    keys = {"broker.port": 0, "schedule.clients": 1, "model.cut": 0, "data.val_fraction": 0.0}
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    data = from_datasets(Scratched(), Scratched(), classes=2)
    result = run_here(load_config(None, keys), str(tmp_path / "out"), model, data)
    assert not result.ok
    assert result.sentence.startswith("Client 0: it failed with OSError: the disk is scratched (the traceback is in ")
    assert kept(result.sentence, tmp_path / "out") == 0
    log = (tmp_path / "out" / "logs" / "client-0.log").read_text()
    assert log.startswith("Process zsplit client 0:\nTraceback (most recent call last):")
    assert log.endswith("OSError: the disk is scratched\n")
