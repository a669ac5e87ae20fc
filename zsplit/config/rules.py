"""Combinations that cannot be: each rule yields sentences with the keys, what was found and the way out."""

from collections.abc import Iterator
from math import inf

from zsplit.config.keys import as_toml
from zsplit.config.sections import (
    BrokerSection,
    CodecSection,
    DataSection,
    LinkSection,
    ModelSection,
    PlanSection,
    RunSection,
    ScheduleSection,
    TrainSection,
)
from zsplit.config.shape import ranges
from zsplit.errors import ConfigError
from zsplit.spec import parse

LAST_PORT = 65535


def in_training(train: TrainSection) -> Iterator[str]:
    """Optimizer and batches."""
    if train.optimizer != "sgd" and train.momentum:
        yield (
            f"train.momentum = {train.momentum} means nothing under "
            f"train.optimizer = {as_toml(train.optimizer)}: "
            'leave it out, or set train.optimizer = "sgd".'
        )
    if train.nesterov and not train.momentum:
        yield (
            'train.nesterov = true needs train.optimizer = "sgd" and train.momentum above 0: set both, or leave it out.'
        )
    if isinstance(train.micro_batches, int) and train.micro_batches > train.batch_size:
        yield (
            f"train.micro_batches = {train.micro_batches} would leave slices without a sample: "
            f"with train.batch_size = {train.batch_size} the largest is {train.batch_size}."
        )


def in_data(data: DataSection) -> Iterator[str]:
    """Keys of made-up data."""
    for key in ("shape", "classes", "samples"):
        if data.name != "fake" and getattr(data, key) != getattr(DataSection(), key):
            yield (
                f"data.{key} = {as_toml(getattr(data, key))} means nothing for data.name = {as_toml(data.name)}: "
                'leave it out, or set data.name = "fake".'
            )


def in_schedule(schedule: ScheduleSection, run: RunSection) -> Iterator[str]:
    """Policy and what belongs to one policy only."""
    policy = as_toml(schedule.policy)
    if schedule.clients_per_round > schedule.clients:
        yield (
            f"schedule.clients_per_round = {schedule.clients_per_round} is more than there are: "
            f"with schedule.clients = {schedule.clients} the largest is {schedule.clients}."
        )
    if schedule.aggregate_every == 0:
        yield (
            "schedule.aggregate_every = 0 is no number of steps: set 1 or more, or -1 for the end of the local epochs."
        )
    if schedule.policy != "parallel" and schedule.aggregate_every != -1:
        yield (
            f"schedule.aggregate_every = {schedule.aggregate_every} means nothing under "
            f"schedule.policy = {policy}: "
            'leave it out, or set schedule.policy = "parallel".'
        )
    if schedule.policy != "round_robin" and run.commit_every:
        yield (
            f"run.commit_every = {run.commit_every} means nothing under schedule.policy = {policy}: "
            'leave it out, or set schedule.policy = "round_robin".'
        )


def in_codecs(codec: CodecSection) -> Iterator[str]:
    """How tensors travel, and what the way back needs of the way there."""
    try:
        up, down = parse(codec.up, "codec.up ="), parse(codec.down, "codec.down =")
    except ConfigError as error:
        yield str(error)
        return
    if up.answers:
        yield (
            f"codec.up = {as_toml(codec.up)} cannot be, since smashed data answer nothing that has kept places: "
            "mask is for codec.down, set topk, randtopk or ms here."
        )
    elif down.answers and not up.keeps:
        yield (
            f"codec.down = {as_toml(codec.down)} needs places that codec.up has kept, and codec.up = "
            f"{as_toml(codec.up)} keeps all: set codec.up to topk, randtopk or ms, or codec.down to something else."
        )


def in_link(link: LinkSection) -> Iterator[str]:
    """Beats and what is counted in them."""
    if link.beat_seconds >= link.lease_seconds / 2:
        yield (
            f"link.beat_seconds = {link.beat_seconds} is too long for link.lease_seconds = "
            f"{link.lease_seconds}, where a late beat ends the lease: set it below {link.lease_seconds / 2}."
        )
    if 0 < link.progress_seconds <= link.beat_seconds:
        yield (
            f"link.progress_seconds = {link.progress_seconds} is too short, since beats carry the progress: "
            f"set it above link.beat_seconds = {link.beat_seconds}, or to 0."
        )


def in_client_links(link: LinkSection, clients: int) -> Iterator[str]:
    """How clients' links are shaped, and which clients are meant."""
    if link.trace and (link.uplink_mbps or link.downlink_mbps):
        yield f"link.trace = {as_toml(link.trace)} says the rates over time: {_ONE_OF_BOTH}."
    for table in link.client:
        where = f"The [[link.client]] table of clients = {as_toml(table.clients)}"
        parts = ranges(table.clients)
        if table.trace and (table.uplink_mbps or table.downlink_mbps):
            yield f"{where} sets trace, which says the rates over time: {_ONE_OF_BOTH}."
        if any(first > last for first, last in parts):
            yield f"{where} has a range that ends before it begins: write the lower number first."
        beyond = max(max(first, last if last < inf else 0) for first, last in parts)
        if beyond >= clients:
            yield (
                f"{where} names client {beyond:.0f}: with schedule.clients = {clients} the last one is {clients - 1}."
            )


_ONE_OF_BOTH = "leave it out, or uplink_mbps and downlink_mbps"


def in_planning(model: ModelSection, train: TrainSection, plan: PlanSection) -> Iterator[str]:
    """What the planner chooses, and what it needs to do so."""
    chosen = {"model.cut": model.cut, "train.micro_batches": train.micro_batches}
    auto = [f'{key} = "auto"' for key, value in chosen.items() if value == "auto"]
    asks = auto or (["plan.predict = true"] if plan.predict else [])
    if asks and not (plan.profile_steps or plan.file):
        yield (
            f"{' and '.join(asks)} cannot be without a measurement: set plan.profile_steps above 0, "
            "or plan.file to the plan.json of an earlier run."
        )
    if plan.client_memory_mb and not asks:
        yield (
            f"plan.client_memory_mb = {plan.client_memory_mb} limits the planner's choice, and there is none: "
            'set model.cut or train.micro_batches to "auto", or leave it out.'
        )


def in_ports(broker: BrokerSection) -> Iterator[str]:
    """The three ports; where one is any that is free, there is nothing to say before it is bound."""
    ports = {
        "broker.port": broker.port,
        "broker.data_port": broker.data_port or (broker.port and broker.port + 1),
        "broker.events_port": broker.events_port or (broker.port and broker.port + 2),
    }
    fixed = [port for port in ports.values() if port]
    shown = ", ".join(f"{key} = {port}" for key, port in ports.items())
    if max(ports.values()) > LAST_PORT:
        yield f"No port is above {LAST_PORT} ({shown}): lower broker.port to {LAST_PORT - 2} or set all."
    if len(set(fixed)) < len(fixed):
        yield f"The broker needs three different ports ({shown}): change one of them."
