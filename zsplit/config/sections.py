"""Every key of the config, declared once: name, type, limits, default and one line of what it does.

Validation, `zsplit config`, the table in `docs/config.md` and the error sentences are all made from this.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Normalize = Literal["dataset", "half", "none"]
Optimizer = Literal["sgd", "adam", "adamw"]
Policy = Literal["parallel", "round_robin", "async"]
Weighting = Literal["samples", "uniform"]
OptimizerState = Literal["carry", "reset", "local"]
ServerModel = Literal["replica", "shared", "fused"]
SharedOrder = Literal["step", "turn"]
Rates = Literal["constant", "step", "multistep", "cosine"]
BatchNorm = Literal["deferred", "micro"]
Labels = Literal["share", "server", "keep"]
Auto = Literal["auto"]

Count = Annotated[int, Meta(ge=1)]
CountOr0 = Annotated[int, Meta(ge=0)]
PortOr0 = Annotated[int, Meta(ge=0, le=65535)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Size = Annotated[float, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
# The title is what the error sentence and the docs say in place of the pattern.
FolderName = Annotated[str, Meta(pattern=r"^\w[\w.-]*$", title="name of letters, digits, `_`, `-` and `.`")]
ClientList = Annotated[
    str, Meta(pattern=r"^(\*|\d+(-\d+)?(,\d+(-\d+)?)*)$", title="list of clients such as `0`, `1-3`, `0,4-6` or `*`")
]
Device = Annotated[
    str, Meta(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", title='"auto" or "cpu" or "mps" or "cuda" or "cuda:N"')
]


WeightsCodec = Annotated[
    str, Meta(pattern=r"^(raw|half|delta:bits=[1-8])$", title='"raw" or "half" or "delta:bits=N" with N from 1 to 8')
]


def _is(description: str) -> Meta:
    return Meta(description=description)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the config file."""


class RunSection(Section, frozen=True):
    """What the run is called, how long it lasts, what it keeps."""

    name: Annotated[FolderName, _is("what the run is called; part of its folder's name")] = "digits"
    seed: Annotated[CountOr0, _is("everything random in the run follows from it")] = 0
    rounds: Annotated[Count, _is("how often every (sampled) client trains its local epochs")] = 20
    out: Annotated[str, _is("the run's folder; empty: `runs/NAME-N` with the first N that is free")] = ""
    eval_every: Annotated[CountOr0, _is("rounds between evaluations; 0: only at the end")] = 1
    commit_every: Annotated[CountOr0, _is("turns between versions within a round (round-robin); 0: none")] = 0
    patience: Annotated[
        CountOr0, _is("evaluated rounds without a better validation accuracy after which the run ends; 0: never")
    ] = 0
    deterministic: Annotated[bool, _is("every peer uses torch's deterministic algorithms only")] = False
    timeline: Annotated[bool, _is("write `timeline.json`: where each second of every peer went")] = False


class ClientModel(Section, frozen=True):
    """Where the model of some clients is cut, in place of what [model] says."""

    clients: Annotated[ClientList, _is("which clients: `0`, `1-3`, `0,4-6` or `*`")]
    cut: str | CountOr0


class ModelSection(Section, frozen=True):
    """The network and where it is cut."""

    name: Annotated[
        str, _is("one of docs/models.md, of torchvision's classification models, or `package.module:function`")
    ] = "digits/cnn"
    num_classes: Annotated[Count, _is("number of outputs")] = 10
    weights: Annotated[
        str,
        _is("file on the server (`.safetensors`, `.pt`, `.pth`) whose weights are the first version; empty: new ones"),
    ] = ""
    cut: Annotated[
        str | CountOr0,
        _is(
            "a name, index or alias from `zsplit cuts`, or `input` or `output`; `auto`: the planner's choice; "
            "empty: the model's own"
        ),
    ] = ""
    tail: Annotated[
        str | CountOr0, _is("where the model comes back to the client (labels kept); empty: the last cut")
    ] = ""
    input: Annotated[tuple[Count, ...], _is("shape of a sample, channels first; empty: as the data")] = ()
    client: Annotated[
        tuple[ClientModel, ...], _is("cuts of single clients, each a `[[model.client]]` table (parallel, async)")
    ] = ()


class DataSection(Section, frozen=True):
    """The samples and who has which."""

    name: Annotated[
        str, _is("the dataset, or `package.module:function`; `own`: objects that a Python script hands over")
    ] = "digits"
    path: Annotated[
        str, _is("folder with the dataset's files on each client, and on a server that has the labels; `~` is home")
    ] = ""
    download: Annotated[bool, _is("fetch original files that are missing from `data.path`")] = False
    partition: Annotated[
        str,
        _is(
            "who has which training samples: `iid`, `replicate`, `dirichlet:alpha=0.5`, `shards:k=2`, "
            "`quantity:alpha=0.5`, `labels:[[0,1],[2,3]]` or `file:PATH`"
        ),
    ] = "iid"
    augment: Annotated[
        str, _is("random changes of training images: `none`, `flip`, `crop:pad=4+flip`, `resized_crop+flip`")
    ] = "none"
    normalize: Annotated[
        Normalize, _is("pixels less mean, over deviation: the dataset's own, `half` for both, or only brought to 0…1")
    ] = "dataset"
    train_size: Annotated[CountOr0, _is("training samples that are used, drawn at random; 0: all")] = 0
    test_size: Annotated[CountOr0, _is("test samples that are used, drawn at random; 0: all")] = 0
    shape: Annotated[tuple[Count, ...], _is("shape of a sample, channels first (`fake`)")] = (3, 32, 32)
    classes: Annotated[Count, _is("number of classes (`fake`)")] = 10
    samples: Annotated[Count, _is("training samples, a tenth as many to test (`fake`)")] = 1000
    val_fraction: Annotated[Fraction, _is("share of each client's samples that is kept for validation")] = 0.1


class TrainSection(Section, frozen=True):
    """One client's training."""

    batch_size: Annotated[Count, _is("samples in a mini-batch; the last one of an epoch may be shorter")] = 32
    optimizer: Annotated[Optimizer, _is("the update rule on both sides of the cut")] = "sgd"
    lr: Annotated[Size, _is("learning rate")] = 0.05
    client_lr: Annotated[Size | None, _is("learning rate of the front; unset: `train.lr`")] = None
    server_lr: Annotated[Size | None, _is("learning rate of the back; unset: `train.lr`")] = None
    lr_schedule: Annotated[Rates, _is("how the learning rates change from epoch to epoch")] = "constant"
    lr_step: Annotated[Count, _is("epochs after which the rates are multiplied by `train.lr_gamma` (`step`)")] = 30
    lr_milestones: Annotated[
        tuple[Count, ...], _is("epochs at which the rates are multiplied by `train.lr_gamma` (`multistep`)")
    ] = ()
    lr_gamma: Annotated[Share, _is("what the rates are multiplied by (`step`, `multistep`)")] = 0.1
    lr_epochs: Annotated[CountOr0, _is("epochs in which the rates fall to 0 (`cosine`); 0: those of the whole run")] = 0
    momentum: Annotated[Fraction, _is("momentum of `sgd`; under another optimizer it is 0 when unset")] = 0.9
    weight_decay: Annotated[Size, _is("L2 penalty (`sgd`, `adam`) or decoupled decay (`adamw`)")] = 0.0
    nesterov: Annotated[bool, _is("Nesterov's momentum (`sgd`)")] = False
    local_epochs: Annotated[Count, _is("passes of a client over its samples in each round")] = 1
    micro_batches: Annotated[
        Count | Auto, _is("slices that a mini-batch is cut into; `auto`: the planner's choice")
    ] = 1
    batch_norm: Annotated[
        BatchNorm, _is("running statistics move once for a mini-batch, or with each of its micro-batches")
    ] = "deferred"
    labels: Annotated[
        Labels, _is("they travel with the smashed data, live at the server only, or stay at the client (U-shaped)")
    ] = "share"
    clip_norm: Annotated[Size, _is("largest norm of the gradient over both sides of the cut; 0: any")] = 0.0

    @property
    def client_rate(self) -> float:
        """The learning rate of the front."""
        return self.lr if self.client_lr is None else self.client_lr

    @property
    def server_rate(self) -> float:
        """The learning rate of the back."""
        return self.lr if self.server_lr is None else self.server_lr


class ScheduleSection(Section, frozen=True):
    """Who trains when, and how the results are joined."""

    policy: Annotated[
        Policy, _is("clients train at once and are averaged, in turn, or each at its own pace (`async`)")
    ] = "parallel"
    clients: Annotated[Count, _is("number of clients; their indexes start at 0")] = 4
    clients_per_round: Annotated[CountOr0, _is("clients drawn for each round; 0: all")] = 0
    aggregate_every: Annotated[
        int, Meta(ge=-1), _is("steps between aggregations (parallel); -1: at the end of the local epochs")
    ] = -1
    weighting: Annotated[Weighting, _is("what weighs in the average (parallel)")] = "samples"
    optimizer_state: Annotated[
        OptimizerState, _is("optimizer buffers are handed on and averaged, made anew, or kept by each peer")
    ] = "carry"
    server_model: Annotated[
        ServerModel,
        _is(
            "`replica`: one back for each client; `shared`: one, stepped by each; `fused`: one, stepped by all at once"
        ),
    ] = "replica"
    shared_order: Annotated[
        SharedOrder, _is("`shared`: clients take turns step by step, shuffled, or one client's steps after another's")
    ] = "step"
    rejoin_timeout: Annotated[
        Size, _is("seconds for which a client that was lost is waited for before its round goes on without it")
    ] = 60.0
    round_timeout: Annotated[
        Size, _is("seconds after which a round (in turn: a turn) goes on without those who hold it up; 0: never")
    ] = 0.0
    min_clients: Annotated[Count, _is("clients with which a round can end without the others")] = 1
    elastic: Annotated[
        bool,
        _is("begin with `schedule.min_clients` clients; others join at any round, beyond `schedule.clients` too"),
    ] = False
    mixing: Annotated[Share, _is("share of a client's result in the next version, if it is not stale (async)")] = 0.6
    mixing_power: Annotated[
        Size, _is("that share is multiplied by (staleness + 1) to the power of minus this (async)")
    ] = 0.5
    max_staleness: Annotated[
        CountOr0, _is("versions that may have come since a client's base; what is older is discarded (async)")
    ] = 16


class AggregateSection(Section, frozen=True):
    """What is averaged."""

    exclude: Annotated[
        tuple[str, ...], _is("names, or patterns such as `*bn*`, that each client keeps for itself (FedBN)")
    ] = ()


class CodecSection(Section, frozen=True):
    """How tensors become bytes."""

    up: Annotated[str, _is("codec of the smashed data, such as `half` or `ms:ratio=0.99,bits=2+lz4`")] = "raw"
    down: Annotated[str, _is("codec of their gradients; `mask`: at the places that `codec.up` has kept")] = "raw"
    eval: Annotated[bool, _is("evaluations go through `codec.up`; false: their smashed data travel raw")] = True
    weights: Annotated[
        WeightsCodec, _is("parameters between turns: `raw`, `half`, or a client's as differences, `delta:bits=8`")
    ] = "raw"


class ClientLink(Section, frozen=True):
    """The link of some clients: what is set here takes the place of what [link] says."""

    clients: Annotated[ClientList, _is("which clients: `0`, `1-3`, `0,4-6` or `*`")]
    uplink_mbps: Size | None = None
    downlink_mbps: Size | None = None
    rtt_ms: Size | None = None
    trace: str | None = None


class LinkSection(Section, frozen=True):
    """The connections between peers and broker."""

    lease_seconds: Annotated[Seconds, _is("a peer that is silent for so long is lost")] = 10.0
    beat_seconds: Annotated[Seconds, _is("time between a peer's signs of life")] = 1.0
    progress_seconds: Annotated[Size, _is("a peer with a turn and no progress for so long is lost; 0: off")] = 0.0
    patience_seconds: Annotated[
        Size, _is("a peer whose broker has fallen silent looks for it for so long; 0: for ever")
    ] = 600.0
    uplink_mbps: Annotated[Size, _is("clients send no faster than this (Mbit/s); 0: as the link is")] = 0.0
    downlink_mbps: Annotated[Size, _is("clients receive no faster than this (Mbit/s); 0: as the link is")] = 0.0
    rtt_ms: Annotated[Size, _is("added to every round trip of a client (ms), half of it each way")] = 0.0
    trace: Annotated[str, _is("CSV of `seconds,uplink_mbps,downlink_mbps` that clients' links replay; empty: none")] = (
        ""
    )
    client: Annotated[tuple[ClientLink, ...], _is("links of single clients, each a `[[link.client]]` table")] = ()


class PlanSection(Section, frozen=True):
    """How computing and sending overlap, and how cut and micro-batches are chosen where they are `auto`."""

    window: Annotated[CountOr0, _is("micro-batches in flight at once; 0: all of the step")] = 0
    file: Annotated[str, _is("`plan.json` of an earlier run, used again in place of measuring; empty: none")] = ""
    profile_steps: Annotated[CountOr0, _is("repetitions when a peer measures itself; 0: nothing is measured")] = 5
    profile_seconds: Annotated[Seconds, _is("time in which a peer measures itself")] = 5.0
    quiet: Annotated[bool, _is("clients measure one after the other, all others quiet")] = True
    predict: Annotated[bool, _is("measure and predict also where cut and micro-batches are fixed")] = False
    min_cut: Annotated[str | CountOr0, _is("never cut before this place; empty: anywhere")] = ""
    client_memory_mb: Annotated[Size, _is("memory that training the front may take (MiB); 0: any")] = 0.0
    gain: Annotated[Fraction, _is("change the plan between rounds where another is faster by this share")] = 0.1


class BrokerSection(Section, frozen=True):
    """Where the broker listens."""

    host: Annotated[str, Meta(min_length=1), _is("address to bind; `*`: every interface")] = "127.0.0.1"
    port: Annotated[PortOr0, _is("control port, the one that peers are told; 0: any that is free")] = 5757
    data_port: Annotated[PortOr0, _is("port of the tensors; 0: `broker.port` + 1")] = 0
    events_port: Annotated[PortOr0, _is("port of the events; 0: `broker.port` + 2")] = 0
    max_message_mb: Annotated[Count, _is("largest frame that is accepted, in MiB")] = 1024


class ServerSection(Section, frozen=True):
    """The servers' machines."""

    threads: Annotated[CountOr0, _is("threads that compute on a server; 0: torch's default")] = 0
    device: Annotated[Device, _is("device of the back; `auto`: a GPU if there is one")] = "auto"


class ClientSection(Section, frozen=True):
    """The clients' machines."""

    threads: Annotated[CountOr0, _is("threads that compute on a client; 0: torch's default")] = 0
    device: Annotated[Device, _is("device of the front; `auto`: a GPU if there is one")] = "auto"


SECTIONS: dict[str, type[Section]] = {
    "run": RunSection,
    "model": ModelSection,
    "data": DataSection,
    "train": TrainSection,
    "schedule": ScheduleSection,
    "aggregate": AggregateSection,
    "codec": CodecSection,
    "link": LinkSection,
    "plan": PlanSection,
    "broker": BrokerSection,
    "server": ServerSection,
    "client": ClientSection,
}
