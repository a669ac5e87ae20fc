"""Where the labels are: through real processes, every mode ends with the reference's weights, bit for bit."""

import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import Processes, free_port, settings
from helpers import config_of
from nets import Normed, SmallResidual, images
from reference import Settings
from tap import Passed, recorded
from test_exact import BASE, SGD, TESTS, assert_same, names_up_to, train_plain, train_split
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

from zsplit import from_datasets, load_config
from zsplit.data import ClientData, Data, Labels, gather, labels_of, unlabelled
from zsplit.data.images import Pixels, Scale
from zsplit.errors import ConfigError, DataError, RemoteProtocolError
from zsplit.launch import Result
from zsplit.train.labels import LabelBook
from zsplit.train.link import Incoming
from zsplit.wire.messages import Evaluate, Lease, Plan, Ref, Tensors, Turn

Kinds = dict[str, dict[str, int]]


def small(model: type[Any] = SmallResidual) -> Any:
    torch.manual_seed(11)
    return model()


def assert_evaluated(result: Result, model: Any, version: dict[str, Tensor]) -> None:
    """Compare the figures of the test data with those of the uncut model."""
    model = deepcopy(model)
    model.load_state_dict({name: t for name, t in version.items() if not name.startswith(("optimizer/", "local/"))})
    x, y = images(TESTS, seed=1)
    with torch.no_grad():
        outputs = model.eval()(x)
    assert result.summary["test_accuracy"] == (outputs.argmax(1) == y).sum().item() / TESTS
    assert result.summary["test_loss"] == pytest.approx(cross_entropy(outputs, y).item(), rel=1e-5)


# The cut at the output and at the input

OUTPUT: dict[str, tuple[int, Settings]] = {
    "three clients": (3, replace(SGD, policy="parallel")),
    "clipped micro-batches, two aggregations a round": (
        2,
        replace(SGD, policy="parallel", aggregate_every=2, micro_batches=3, clip_norm=0.5),
    ),
    "in turn, buffers kept": (2, replace(SGD, policy="round_robin", optimizer_state="local")),
}


@pytest.mark.parametrize("case", OUTPUT)
def test_a_cut_at_the_output_is_federated_averaging(case: str, tmp_path: Path) -> None:
    clients, settings = OUTPUT[case]
    model = small()
    result = train_split(tmp_path / "run", model, "output", clients, settings)
    everything = {name for name, _ in model.named_parameters()}
    expected = train_plain(model, everything, clients, settings)
    assert_same(result, expected)
    assert_evaluated(result, model, expected)
    kinds: Kinds = result.summary["bytes"]["kinds"]
    assert kinds.keys() <= {"weights", "optimizer", "other"}, "more than states and their manifests travels"
    assert result.summary["train_loss"] > 0


INPUT: dict[str, tuple[int, Settings]] = {
    "one client": (1, replace(SGD, policy="parallel")),
    "one client, clipped micro-batches": (1, replace(SGD, policy="round_robin", micro_batches=3, clip_norm=0.5)),
    "three clients": (3, replace(SGD, policy="parallel")),
}


@pytest.mark.parametrize("case", INPUT)
def test_a_cut_at_the_input_is_centralised_training(case: str, tmp_path: Path) -> None:
    clients, settings = INPUT[case]
    model = small()
    result = train_split(tmp_path / "run", model, "input", clients, settings)
    expected = train_plain(model, set(), clients, settings)
    assert_same(result, expected)
    assert_evaluated(result, model, expected)
    kinds: Kinds = result.summary["bytes"]["kinds"]
    assert "gradients" not in kinds
    assert kinds["smashed"]["up"] == 4 * 64 * result.summary["samples"]


# Labels at the server

SERVER: dict[str, tuple[int, Settings]] = {
    f"{policy}, {clients} clients, {micros} micro-batches": (
        clients,
        replace(SGD, policy=policy, micro_batches=micros),
    )
    for policy in ("parallel", "round_robin")
    for clients, micros in ((1, 3), (3, 1))
}


@pytest.mark.parametrize("case", SERVER)
def test_labels_that_live_at_the_server_change_no_bit(case: str, tmp_path: Path) -> None:
    clients, settings = SERVER[case]
    model = small()
    result = train_split(tmp_path / "run", model, "block.add", clients, settings, **{"train.labels": "server"})
    expected = train_plain(model, names_up_to(model, "stem", "block"), clients, settings)
    assert_same(result, expected)
    assert_evaluated(result, model, expected)
    kinds: Kinds = result.summary["bytes"]["kinds"]
    assert "labels" not in kinds
    assert kinds["ids"]["up"] == 8 * result.summary["samples"]


# Labels kept

Kept = tuple[type[Any], int, str, str, int, Settings]  # network, clients, cut, tail, window

KEEP: dict[str, Kept] = {
    f"{policy}, {clients} clients, {micros} micro-batches": (
        SmallResidual,
        clients,
        "stem",
        "pool",
        2 if micros > 1 else 0,
        replace(SGD, policy=policy, micro_batches=micros, client_lr=0.01),
    )
    for policy in ("parallel", "round_robin")
    for clients in (1, 3)
    for micros in (1, 3)
}
CLIPPED = replace(SGD, policy="parallel", micro_batches=3, clip_norm=0.5)
KEEP |= {
    "the last cut, two aggregations": (SmallResidual, 3, "stem", "", 0, replace(CLIPPED, aggregate_every=2)),
    "buffers kept": (SmallResidual, 3, "block.add", "flatten", 2, replace(CLIPPED, optimizer_state="local")),
    "buffers made anew": (SmallResidual, 2, "block.add", "pool", 1, replace(CLIPPED, optimizer_state="reset")),
    "the loss alone": (SmallResidual, 2, "block.add", "output", 0, CLIPPED),
    "inputs and the loss": (SmallResidual, 2, "input", "output", 0, CLIPPED),
    "BatchNorm deferred in all three": (Normed, 2, "relu", "bn2", 3, replace(CLIPPED, batch_size=10)),
}


@pytest.mark.parametrize("case", KEEP)
def test_labels_that_stay_at_the_client_change_no_bit(case: str, tmp_path: Path) -> None:
    network, clients, cut, tail, window, settings = KEEP[case]
    model = small(network)
    keys = {"train.labels": "keep", "model.tail": tail, "plan.window": window}
    result = train_split(tmp_path / "run", model, cut, clients, settings, **keys)
    expected = train_plain(model, ends_of(model, cut, tail), clients, settings)
    assert_same(result, expected)
    assert_evaluated(result, model, expected)
    kinds: Kinds = result.summary["bytes"]["kinds"]
    assert not kinds.keys() & {"labels", "ids"}
    if cut != "input":
        assert kinds["smashed"]["up"] == kinds["gradients"]["down"]
    assert kinds["smashed"]["down"] == kinds["gradients"]["up"]


def ends_of(model: Any, cut: str, tail: str) -> set[str]:
    """Return the names of the parameters before the cut and behind the tail."""
    fronts = {
        "input": (),
        "stem": ("stem",),
        "block.add": ("stem", "block"),
        "relu": ("conv1", "bn1", "conv2"),
    }
    tails = {"output": (), "bn2": ("fc",)}
    return names_up_to(model, *fronts[cut], *tails.get(tail, ("fc",)))


# What the frames hold


def traffic(processes: Processes, **keys: object) -> list[Passed]:
    """Return the tensors that passed a broker in one round of two clients on 40 fake images, evaluations among them."""
    config = load_config(
        None,
        BASE
        | {"data.name": "fake", "data.shape": (1, 8, 8), "data.samples": 40, "data.val_fraction": 0.2}
        | {"run.rounds": 1, "schedule.clients": 2, "train.batch_size": 8, "train.micro_batches": 2}
        | {key.replace("__", "."): value for key, value in keys.items()},
    )
    passed = [each for each in recorded(config, processes) if isinstance(each.message, Tensors)]
    kinds = {each.message.kind for each in passed if isinstance(each.message, Tensors)}
    assert kinds == ({"train", "eval"} if config.model.cut != "output" else set())
    return passed


@pytest.mark.timeout(120)
def test_no_message_carries_kept_labels_or_losses_of_samples(processes: Processes) -> None:
    passed = traffic(processes, train__labels="keep", model__cut="relu1", model__tail="flatten", train__clip_norm=1.0)
    allowed = {
        0: {"smashed": 4},
        1: {"smashed": 2},
        2: {"gradients": 2},
        3: {"gradients": 4, "norms": 1},
    }
    legs = set()
    for message, frames in passed:
        assert isinstance(message, Tensors)
        legs.add((message.kind, message.leg))
        assert message.scalars.keys() <= {"left", "batch", "micros"}
        for meta, frame in zip(message.tensors, frames, strict=True):
            assert len(meta.shape) == allowed[message.leg][meta.what]
            assert (meta.dtype, len(frame)) == ("F32", meta.nbytes)
    assert legs == {("train", leg) for leg in range(4)} | {("eval", 0), ("eval", 1)}
    norms = [meta.shape for each in passed for meta in each.message.tensors if meta.what == "norms"]
    assert set(norms) == {(2,)}, "one norm for each parameter of the middle, none for each sample"


@pytest.mark.timeout(120)
def test_sample_ids_take_the_place_of_labels_that_live_at_the_server(processes: Processes) -> None:
    passed = traffic(processes, train__labels="server")
    ids = {"train": set[int](), "eval": set[int]()}
    for message, frames in passed:
        assert isinstance(message, Tensors)
        if message.leg == 0:
            smashed, sent = message.tensors
            assert (smashed.what, sent.what, sent.dtype, sent.shape) == ("smashed", "ids", "I64", smashed.shape[:1])
            ids[message.kind] |= set(torch.frombuffer(bytearray(frames[1]), dtype=torch.int64).tolist())
    assert ids["train"] | ids["eval"] == set(range(40))


@pytest.mark.timeout(120)
def test_no_tensors_pass_where_each_client_has_the_whole_model(processes: Processes) -> None:
    assert traffic(processes, model__cut="output") == []


# Errors

AUTO = 'train.micro_batches = "auto" means nothing with'
WHOLE = (
    'cannot be with model.cut = "output", where each client has the whole model and its labels: '
    "leave train.labels out, or cut inside the model."
)
PARTS = "since the planner knows models of two parts only"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"model__tail": "pool"},
            'model.tail = "pool" means nothing under train.labels = "share": '
            'leave it out, or set train.labels = "keep".',
        ),
        ({"train__labels": "keep", "model__cut": "output"}, f'train.labels = "keep" {WHOLE}'),
        ({"train__labels": "server", "model__cut": "output"}, f'train.labels = "server" {WHOLE}'),
        (
            {"train__labels": "keep", "model__cut": "auto"},
            f'train.labels = "keep" needs a fixed cut, {PARTS}: set model.cut to a place.',
        ),
        (
            {"train__labels": "keep", "train__micro_batches": "auto"},
            f'{AUTO} train.labels = "keep", {PARTS}: set a number of micro-batches and leave plan.predict out.',
        ),
        (
            {"model__cut": "output", "train__micro_batches": "auto"},
            f'{AUTO} model.cut = "output", {PARTS}: set a number of micro-batches and leave plan.predict out.',
        ),
        (
            {"model__cut": "input", "plan__predict": True},
            f'plan.predict = true means nothing with model.cut = "input", {PARTS}: '
            "set a number of micro-batches and leave plan.predict out.",
        ),
    ],
)
def test_what_cannot_be_with_labels_and_ends_is_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**keys)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "keys",
    [
        {"train__labels": "server", "model__cut": "auto", "train__micro_batches": "auto"},
        {"train__labels": "keep", "model__cut": "input", "model__tail": "output"},
        {"train__labels": "server", "model__cut": "input"},
    ],
)
def test_what_labels_and_ends_allow_is_taken(keys: dict[str, Any]) -> None:
    assert config_of(**keys).train.labels == keys["train__labels"]


BOOK = LabelBook(Labels(images(70)[1], images(22, seed=1)[1]))
TURN = Turn(lease=Lease(1, 1), client=3, server=0, base=Ref("", "broker"), plan=Plan("pool"), round=0, first=0, count=1)
EVALUATE = Evaluate(
    lease=Lease(1, 1), client=3, server=0, base=Ref("", "broker"), plan=Plan("pool"), round=0, part="test"
)


def incoming(**tensors: Tensor) -> Incoming:
    return Incoming(Tensors("run", "session", Lease(1, 1), "train", 0, (), 0, 0), tensors, 0.0)


def test_labels_are_looked_up_in_the_set_that_the_job_is_about() -> None:
    ids = torch.tensor([3, 21, 0])
    for job, labels in ((TURN, images(70)[1]), (EVALUATE, images(22, seed=1)[1])):
        joined = BOOK.join(job, incoming(smashed=torch.ones(3), ids=ids)).tensors
        assert joined.keys() == {"smashed", "labels"}
        assert torch.equal(joined["labels"], labels[ids])
    validation = BOOK.join(msgspec.structs.replace(EVALUATE, part="validation"), incoming(ids=ids))
    assert torch.equal(validation.tensors["labels"], images(70)[1][ids])


@pytest.mark.parametrize(
    ("job", "ids", "sentence"),
    [
        (TURN, [0, 70], "Client 3 sent the sample id 70, and the server's training set has 70 samples"),
        (EVALUATE, [22], "Client 3 sent the sample id 22, and the server's test set has 22 samples"),
        (TURN, [5, -1], "Client 3 sent the sample id -1, and the server's training set has 70 samples"),
    ],
)
def test_a_sample_id_that_the_server_does_not_have_is_refused(job: Any, ids: list[int], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        BOOK.join(job, incoming(ids=torch.tensor(ids)))
    assert str(caught.value) == f"{sentence}: give both the same dataset (data.name, data.path)"


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"labels": torch.zeros(2, dtype=torch.int64)},
        {"ids": torch.zeros(2)},
        {"ids": torch.zeros(2, 1, dtype=torch.int64)},
        {"ids": torch.zeros(0, dtype=torch.int64)},
        {"ids": torch.zeros(2, dtype=torch.int64), "labels": torch.zeros(2, dtype=torch.int64)},
    ],
)
def test_what_is_no_list_of_sample_ids_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(RemoteProtocolError, match="in the place of smashed data and sample ids: start all peers with"):
        BOOK.join(TURN, incoming(**tensors))


def test_labels_below_zero_are_refused_at_the_server() -> None:
    data = from_datasets(TensorDataset(torch.ones(2, 4), torch.tensor([0, -2])), TensorDataset(*images(22)), classes=10)
    with pytest.raises(DataError, match="The server's data has the label -2: number its classes from 0"):
        LabelBook(Labels.of(data)).join(TURN, incoming(ids=torch.tensor([0, 1])))


def test_a_server_without_the_data_says_what_it_needs_them_for(processes: Processes) -> None:
    port = free_port()
    keys = f"broker.port={port}", "data.name=mnist", "train.labels=server", "schedule.clients=1"
    broker = processes.start("broker", *settings(*keys))
    broker.line("listens")
    server = processes.start("server", "--broker", f"127.0.0.1:{port}")
    assert server.wait() == 2
    broker.signal(signal.SIGTERM)
    assert server.err[-1] == (
        'zsplit: train.labels = "server" asks for the labels at the server: mnist needs a folder with '
        "MNIST/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
        "t10k-labels-idx1-ubyte, as they are or .gz: set data.path to it."
    )


# Data without labels


def test_a_client_of_labels_at_the_server_has_none() -> None:
    class Listed(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((2,), float(index)), index

    pairs = TensorDataset(torch.ones(4, 2), torch.arange(4))
    pixels = Pixels(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5), Scale(1.0, (0.0,), (1.0,)))
    for dataset in (Listed(), pairs, pixels):
        bare = unlabelled(Data(dataset, dataset, (2,), 5)).train
        ids = torch.tensor([2, 0])
        (x, y), (expected, labels) = gather(bare, ids), gather(dataset, ids)
        assert torch.equal(x, expected)
        assert torch.equal(labels_of(dataset)[ids], labels)
        assert (y.tolist(), len(bare)) == ([-1, -1], len(dataset))


def test_ids_are_the_positions_of_the_batches_samples() -> None:
    numbers = torch.arange(70.0)[:, None]
    dataset = TensorDataset(numbers, torch.zeros(70, dtype=torch.int64))
    config = config_of(schedule__clients=3, train__batch_size=8, train__local_epochs=2)
    mine = ClientData(config, 1, from_datasets(dataset, dataset))
    for step in range(mine.steps_per_round):
        assert mine.train_ids(2, step).tolist() == mine.train_batch(2, step)[0].squeeze(1).tolist()
    with pytest.raises(IndexError):
        mine.train_ids(0, mine.steps_per_round)
    for part in ("validation", "test"):
        ids = [each.tolist() for each in mine.eval_ids(part)]
        assert ids == [x.squeeze(1).tolist() for x, _ in mine.eval_batches(part)]
