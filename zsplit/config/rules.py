"""Combinations that cannot be: each rule yields sentences with the keys, what was found and the way out."""

from collections.abc import Iterator
from math import inf

from zsplit.config.keys import as_toml
from zsplit.config.sections import (
    AggregateSection,
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


def in_rates(train: TrainSection) -> Iterator[str]:
    """Learning rates over the epochs."""
    schedule, unset = as_toml(train.lr_schedule), TrainSection()
    owners = {"lr_step": ("step",), "lr_milestones": ("multistep",), "lr_epochs": ("cosine",)}
    for key, owner in (owners | {"lr_gamma": ("step", "multistep")}).items():
        value = getattr(train, key)
        if train.lr_schedule not in owner and value != getattr(unset, key):
            yield (
                f"train.{key} = {as_toml(value)} means nothing under train.lr_schedule = {schedule}: "
                f'leave it out, or set train.lr_schedule = "{owner[0]}".'
            )
    if train.lr_schedule == "multistep" and not train.lr_milestones:
        yield 'train.lr_schedule = "multistep" needs train.lr_milestones, such as [60, 120, 160].'
    if list(train.lr_milestones) != sorted(set(train.lr_milestones)):
        yield (
            f"train.lr_milestones = {as_toml(train.lr_milestones)} is not in order: "
            f"write {as_toml(sorted(set(train.lr_milestones)))}."
        )


def in_schedule(schedule: ScheduleSection, run: RunSection) -> Iterator[str]:
    """Policy and what belongs to one policy only."""
    policy = as_toml(schedule.policy)
    if schedule.clients_per_round > schedule.clients:
        yield (
            f"schedule.clients_per_round = {schedule.clients_per_round} is more than there are: "
            f"with schedule.clients = {schedule.clients} the largest is {schedule.clients}."
        )
    most = schedule.clients_per_round or schedule.clients
    if schedule.min_clients > most:
        yield (
            f"schedule.min_clients = {schedule.min_clients} is more than a round has: it has {most} clients, "
            f"set schedule.min_clients to {most} or less."
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


def in_server_model(schedule: ScheduleSection, train: TrainSection, model: ModelSection) -> Iterator[str]:
    """One back for several clients."""
    kind = as_toml(schedule.server_model)
    if schedule.server_model == "replica":
        if schedule.shared_order != "step":
            yield (
                f"schedule.shared_order = {as_toml(schedule.shared_order)} means nothing under "
                f'schedule.server_model = {kind}: leave it out, or set schedule.server_model = "shared".'
            )
        return
    if schedule.policy != "parallel":
        yield (
            f"schedule.server_model = {kind} means nothing under schedule.policy = {as_toml(schedule.policy)}: "
            'leave it out, or set schedule.policy = "parallel".'
        )
    if model.client:
        yield (
            f"schedule.server_model = {kind} has one back, which cannot begin at different cuts: "
            'leave the [[model.client]] tables out, or set schedule.server_model = "replica".'
        )
    if model.cut == "auto":
        yield (
            f'schedule.server_model = {kind} has one back, and model.cut = "auto" may cut for each client elsewhere: '
            'set model.cut to a place, or schedule.server_model = "replica".'
        )
    if train.labels == "keep" or model.cut == "output":
        found = 'train.labels = "keep"' if train.labels == "keep" else 'model.cut = "output"'
        yield (
            f"schedule.server_model = {kind} cannot be with {found}, where the loss is the client's: "
            'leave it out, or set schedule.server_model = "replica".'
        )
    if schedule.server_model == "fused" and train.clip_norm:
        yield (
            f"train.clip_norm = {train.clip_norm} has no meaning for one back and several fronts that step at once: "
            'leave it out, or set schedule.server_model to "shared" or "replica".'
        )


def in_async(schedule: ScheduleSection) -> Iterator[str]:
    """Clients that do not wait for each other."""
    unset = ScheduleSection()
    if schedule.policy != "async":
        for key in ("mixing", "mixing_power", "max_staleness"):
            if getattr(schedule, key) != getattr(unset, key):
                yield (
                    f"schedule.{key} = {getattr(schedule, key)} means nothing under schedule.policy = "
                    f'{as_toml(schedule.policy)}: leave it out, or set schedule.policy = "async".'
                )
        return
    if schedule.optimizer_state != "reset":
        yield (
            f"schedule.optimizer_state = {as_toml(schedule.optimizer_state)} cannot be under schedule.policy = "
            '"async", where buffers would be those of another version: set "reset", or leave it out.'
        )
    if schedule.clients_per_round:
        yield (
            f"schedule.clients_per_round = {schedule.clients_per_round} means nothing under schedule.policy = "
            '"async", where rounds do not begin together: leave it out.'
        )


def in_client_cuts(
    model: ModelSection, schedule: ScheduleSection, plan: PlanSection, train: TrainSection
) -> Iterator[str]:
    """Cuts of single clients."""
    for table in model.client:
        where = f"The [[model.client]] table of clients = {as_toml(table.clients)}"
        yield from _wrong_clients(where, table.clients, schedule.clients)
        if table.cut == "auto":
            yield f'{where} sets cut = "auto": name a place, or set model.cut = "auto" and leave the tables out.'
    if model.client and schedule.policy == "round_robin":
        yield (
            '[[model.client]] tables cannot be under schedule.policy = "round_robin", where the front is handed on: '
            'set model.cut for all, or schedule.policy = "parallel".'
        )
    if model.client and ("auto" in (model.cut, train.micro_batches) or plan.predict):
        yield (
            "[[model.client]] tables fix what the planner is to choose or to predict: leave them out, or set "
            "model.cut and train.micro_batches to fixed values and plan.predict to false."
        )


def in_aggregation(aggregate: AggregateSection, schedule: ScheduleSection) -> Iterator[str]:
    """Names that are not averaged."""
    if aggregate.exclude and (schedule.policy != "parallel" or schedule.server_model != "replica"):
        yield (
            f"aggregate.exclude = {as_toml(aggregate.exclude)} needs a model of its own for each client: "
            'leave it out, or set schedule.policy = "parallel" and schedule.server_model = "replica".'
        )


def in_patience(run: RunSection, data: DataSection) -> Iterator[str]:
    """Early stopping."""
    if run.patience and not (run.eval_every and data.val_fraction):
        key = "run.eval_every" if not run.eval_every else "data.val_fraction"
        yield f"run.patience = {run.patience} needs evaluations on validation data: set {key} above 0."


def in_codecs(codec: CodecSection, model: ModelSection) -> Iterator[str]:
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
    for key, value in ("codec.up", codec.up), ("codec.down", codec.down):
        if model.cut == "output" and value != "raw":
            yield (
                f'{key} = {as_toml(value)} means nothing under model.cut = "output", where no tensors cross but '
                "weights: leave it out, set codec.weights, or cut inside the model."
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
        if table.trace and (table.uplink_mbps or table.downlink_mbps):
            yield f"{where} sets trace, which says the rates over time: {_ONE_OF_BOTH}."
        yield from _wrong_clients(where, table.clients, clients)


def _wrong_clients(where: str, listed: str, clients: int) -> Iterator[str]:
    """What a list of clients cannot be in a run of so many."""
    parts = ranges(listed)
    if any(first > last for first, last in parts):
        yield f"{where} has a range that ends before it begins: write the lower number first."
    beyond = max(max(first, last if last < inf else 0) for first, last in parts)
    if beyond >= clients:
        yield f"{where} names client {beyond:.0f}: with schedule.clients = {clients} the last one is {clients - 1}."


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


def in_labels(model: ModelSection, train: TrainSection, plan: PlanSection) -> Iterator[str]:
    """Where the labels are, and what the two ends of the model and a tail leave to be chosen."""
    labels, cut = f"train.labels = {as_toml(train.labels)}", f"model.cut = {as_toml(model.cut)}"
    if train.labels != "keep" and model.tail != "":
        yield (
            f"model.tail = {as_toml(model.tail)} means nothing under {labels}: "
            'leave it out, or set train.labels = "keep".'
        )
    if train.labels != "share" and model.cut == "output":
        yield (
            f"{labels} cannot be with {cut}, where each client has the whole model and its labels: "
            "leave train.labels out, or cut inside the model."
        )
    if train.labels == "keep" and model.cut == "auto":
        yield f"{labels} needs a fixed cut, since the planner knows models of two parts only: set model.cut to a place."
    fixed = labels if train.labels == "keep" else cut if model.cut in ("input", "output") else ""
    asks = 'train.micro_batches = "auto"' if train.micro_batches == "auto" else "plan.predict = true"
    if fixed and (train.micro_batches == "auto" or plan.predict):
        yield (
            f"{asks} means nothing with {fixed}, since the planner knows models of two parts only: "
            "set a number of micro-batches and leave plan.predict out."
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
