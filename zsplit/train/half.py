"""One half of the cut model under training: the part, its optimizer, and its share of the run's state."""

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from zsplit.config import Config
from zsplit.errors import ConfigError, PlanError, RemoteProtocolError
from zsplit.model import CutPoint, DeferredBatchNorm, Part, Traced, trace, zoo
from zsplit.model.weights import read_weights
from zsplit.train.packing import Packing
from zsplit.train.rates import factor
from zsplit.train.state import State, Tensors, load_optimizer, local_prefix, optimizer_buffers, weights_of
from zsplit.wire.manifest import LOCAL, OPTIMIZER, WEIGHTS


class Workshop:
    """Makes halves: the whole model, built and traced once, and copies of its parts.

    `model` takes the place of the one that the config names, `named` that of `model.cut`; `allowed` are the modules of
    which the config may name a function (`zsplit.own`). `cut` is the place where the model is cut unless a plan says
    otherwise, `tail` the one where it comes back to a client that keeps its labels, `earliest` the first one that
    `plan.min_cut` allows, empty where it allows all. Raises ConfigError for a model that does not exist and for
    an `aggregate.exclude` that it has nothing of, PlanError for a cut that does not exist or that `plan.min_cut`
    forbids, and for a tail before it.
    """

    def __init__(
        self,
        config: Config,
        shape: tuple[int, ...],
        device: torch.device,
        model: nn.Module | None,
        named: str | int | None = None,
        allowed: Collection[str] = (),
    ) -> None:
        self.config = config
        self._named = config.model.cut if named is None else named
        self.device = device
        self.model = (
            model
            if model is not None
            else zoo.build(config.model.name, config.model.num_classes, config.run.seed, shape, allowed)
        )
        self.traced: Traced = trace(self.model, torch.zeros(2, *shape))
        self._check_excluded()
        self._parts: dict[tuple[str, str], tuple[Part, ...]] = {}
        self._earliest = self._find_earliest()
        self.earliest = self._earliest.name if self._earliest else ""
        own = self._own_cut(zoo.default_cut(config.model.name) if model is None else None)
        self.cut, self.tail = own.name, self._own_tail(own)

    def parts(self, cut: str, tail: str = "") -> tuple[Part, ...]:
        """Return what a client and what a server has of the model itself: front and back, or with a tail both ends and
        the middle. Cut once for each place. Raises PlanError as `check_cut`.
        """
        if (cut, tail) not in self._parts:
            self.check_cut(cut)
            self._check_labels(cut, tail)
            self._parts[cut, tail] = self.traced.ends_apart(cut, tail) if tail else self.traced.split(cut)
        return self._parts[cut, tail]

    def check_cut(self, cut: str) -> None:
        """Raise PlanError where a plan names a cut that this model does not have, or that `plan.min_cut` forbids."""
        try:
            point = self.traced.cut(cut)
        except PlanError as error:
            reason = str(error).removesuffix(".")
            raise PlanError(f"{reason} (the plan names it: plan anew, and give all peers the same model).") from error
        self._check_place(point, "The plan cuts", "plan anew")

    def _check_labels(self, cut: str, tail: str) -> None:
        """Raise PlanError for a plan that has no place for the loss where the labels are."""
        labels = self.config.train.labels
        if labels != "share" and self.traced.is_output(cut):
            raise PlanError(
                f"The plan cuts at the output, where a client needs its labels for the loss and has no tail, under "
                f'train.labels = "{labels}": cut inside the model, or leave train.labels out.'
            )
        if bool(tail) != (labels == "keep"):
            found = f"has a tail at '{tail}'" if tail else "has no tail"
            raise PlanError(f'The plan {found}, under train.labels = "{labels}": plan anew, or leave plan.file out.')
        if tail:
            self.check_cut(tail)

    def _check_excluded(self) -> None:
        """Raise ConfigError for a name or pattern of `aggregate.exclude` that would exclude nothing."""
        names = list(self.model.state_dict())
        for pattern in self.config.aggregate.exclude:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f'aggregate.exclude has "{pattern}", which is none of the model\'s names ({names[0]}, …, '
                    f"{names[-1]}): mend it, or leave it out."
                )

    def _find_earliest(self) -> CutPoint | None:
        """Return the first cut that `plan.min_cut` allows, or None where it allows all."""
        key = self.config.plan.min_cut
        try:
            return None if key == "" else self.traced.cut(key)
        except PlanError as error:
            raise PlanError(f"plan.min_cut names no cut: {error}") from error

    def _own_cut(self, usual: str | None) -> CutPoint:
        """Return the cut that the config names; else the model's usual one, or the middle.

        Where the planner is to choose, `plan.min_cut` moves it; where not, it has to be changed by hand.
        """
        named, cuts = self._named, self.traced.cuts
        middle = cuts[len(cuts) // 2].name if cuts else ""
        point = self.traced.cut((usual or middle) if named in ("", "auto") else named)
        if named == "auto":
            return max(point, self._earliest or point, key=lambda each: each.index)
        self._check_place(point, "The model is cut", "set model.cut to that place, to a later one, or to 'auto'")
        return point

    def _own_tail(self, cut: CutPoint) -> str:
        """Return the place of the tail that the config names, else the last cut; nothing where labels leave the client.

        Raises PlanError where there is no such place behind the cut.
        """
        if self.config.train.labels != "keep":
            return ""
        named, cuts = self.config.model.tail, self.traced.cuts
        if named == "" and cut.index + 1 >= len(cuts):
            raise PlanError(
                f'train.labels = "keep" leaves no cut for the tail behind {cut}: cut the model earlier, '
                'or set model.tail = "output" to keep the loss alone.'
            )
        tail = cuts[-1] if named == "" else self.traced.cut(named)
        if tail.index <= cut.index:
            raise PlanError(f"The tail at {tail} does not come after the cut at {cut}: move model.cut or model.tail.")
        return tail.name

    def _check_place(self, point: CutPoint, who: str, remedy: str) -> None:
        if self._earliest is not None and point.index < self._earliest.index:
            raise PlanError(f"{who} at {point}, before plan.min_cut = {self._earliest}: {remedy}.")

    def front(self, cut: str, tail: str = "") -> "Half":
        """Return a new front, with the tail where there is one, on the device."""
        return self._half(self.parts(cut, tail)[0], self.config.train.client_rate, self.config.codec.weights)

    def back(self, cut: str, tail: str = "") -> "Half":
        """Return a new back, or a middle where there is a tail, on the device."""
        weights = "half" if self.config.codec.weights == "half" else "raw"  # differences are for a client's way
        half = self._half(self.parts(cut, tail)[1], self.config.train.server_rate, weights)
        half.is_first = self.traced.is_input(cut)
        return half

    def _half(self, part: Part, rate: float, weights: str) -> "Half":
        return Half(deepcopy(part).to(self.device), self.config, rate, self.device, weights)

    def clip_scale(self, norms: Mapping[str, Tensor]) -> float:
        """Return what all gradients are multiplied by so that their global norm is at most `train.clip_norm`.

        `norms` are those of both halves by parameter; they are summed in the model's order, so that the
        cut changes no bit (`torch.nn.utils.clip_grad_norm_`).
        """
        present = [norms[n] for n, _ in self.model.named_parameters() if n in norms and not norms[n].isnan()]
        total = torch.linalg.vector_norm(torch.stack(present))
        return float((self.config.train.clip_norm / (total + 1e-6)).clamp(max=1.0))

    def initial(self) -> State:
        """Return version 0: the model as it was built, or what `model.weights` holds.

        Raises ConfigError where that file cannot be read or is another model's.
        """
        own, path = weights_of(self.model), self.config.model.weights
        tensors = read_weights(Path(path).expanduser(), own) if path else own
        if self.config.codec.weights == "half":
            tensors |= {name: tensors[name].half() for name, _ in self.model.named_parameters()}
        return State.of(tensors)


class Half:
    """A front or a back. `load` before each turn, train it, then take its `state`.

    `version` is the digest of the version whose weights it has; empty once a step has begun to move them. `weights`
    says how parameters leave it (see `packing`). A half at the server that `is_first` takes the model's own input,
    whose gradients nobody wants.
    """

    def __init__(self, part: Part, config: Config, rate: float, device: torch.device, weights: str = "raw") -> None:
        self.part = part
        self._packing = Packing(weights)
        self.device = device
        self.parameters: list[nn.Parameter] = [p for p in part.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config, rate) if self.parameters else None
        self._names = frozenset(part.state_dict())
        self._excluded = frozenset(
            name for name in self._names if any(fnmatchcase(name, each) for each in config.aggregate.exclude)
        )
        self._config, self._rate = config, rate
        self._carries = config.schedule.optimizer_state
        self._owner: int | None = None
        self.version = ""
        self.is_first = False
        self._norms = DeferredBatchNorm(part)
        self._deferred = config.train.batch_norm == "deferred"

    def keep_for(self, client: int | None) -> None:
        """Say whose this half is now: what `optimizer_state = "local"` and `aggregate.exclude` keep is that client's.

        None is the one back that all clients share: its buffers are everybody's and travel.
        """
        if self._excluded and client != self._owner:
            self.version = ""
        self._owner = client

    def _prefix(self, name: str) -> str:
        """Return what stands before a parameter's buffers in a state."""
        own = self._owner is not None and (self._carries == "local" or name in self._excluded)
        return local_prefix(str(self._owner)) if own else OPTIMIZER

    def _kept(self, name: str) -> str:
        """Return under which name a client keeps an excluded tensor for itself."""
        return f"{local_prefix(str(self._owner))}{WEIGHTS}/{name}"

    def needs(self, version: str, training: bool) -> Callable[[str], bool]:
        """Return which of a version's tensors, by name, this half has to `load` before it trains or evaluates.

        Its weights are not among them where it has them already: a version is evaluated and then trained on.
        """
        has_weights = version == self.version
        kept = {self._kept(name) for name in self._excluded}

        def needed(name: str) -> bool:
            if name in self._names or name in kept:
                return not has_weights
            buffer_of = name.split("/", 3 if name.startswith(LOCAL) else 2)[-1]
            return training and buffer_of in self._names and name.startswith(self._prefix(buffer_of))

        return needed

    def forward(self, x: Tensor) -> Tensor:
        """Run a back, or a middle, on what crosses the cut before it (B, …)."""
        outputs: Tensor = self.part(x)
        return outputs

    def load(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        """Take over a version by its digest: what this half `needs` of it. Raises RemoteProtocolError for less."""
        if version != self.version:
            missing = sorted(self._names - tensors.keys())
            if missing:
                raise RemoteProtocolError(f"The version lacks {missing[0]}: do all peers have the same model?")
            weights = {name: tensors[name] for name in self._names}
            own = {name: tensors[self._kept(name)] for name in self._excluded if self._kept(name) in tensors}
            self.part.load_state_dict(weights | own)
            self._packing.begin(self.part)
            self.version = version
        if self.optimizer is not None:
            load_optimizer(self.part, self.optimizer, tensors, self._prefix)
            self.optimizer.zero_grad()

    def count_with(self, elements: Callable[[Tensor], int]) -> None:
        """Count the values that BatchNorm sees with this (see `DeferredBatchNorm.count_with`)."""
        self._norms.count_with(elements)

    def state(self) -> State:
        """Return a snapshot of weights and of those optimizer buffers that outlive the turn."""
        tensors: Tensors = weights_of(self.part)
        tensors |= {self._kept(name): tensors[name] for name in sorted(self._excluded)}
        tensors |= self._packing.pack(self.part)
        if self.optimizer is not None and self._carries != "reset":
            tensors |= optimizer_buffers(self.part, self.optimizer, self._prefix)
        return State.of(tensors)

    def use_epoch(self, epoch: int) -> None:
        """Use the learning rate of this epoch, counted over the whole run."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate * factor(self._config, epoch)

    def begin_step(self, slices: int) -> None:
        """Say in how many slices the next mini-batch comes, before the first of them goes forward."""
        self.version = ""
        self._norms.begin(slices if self._deferred else 1)

    def step(self) -> None:
        """End a mini-batch: move running statistics that were deferred, step the optimizer, forget the gradients."""
        self._norms.commit()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradient_norms(self) -> Tensor:
        """Return the norm of each parameter's gradient, in the order of `named_parameters`; NaN where it has none."""
        nothing = torch.tensor(torch.nan)
        grads = [parameter.grad for _, parameter in self.part.named_parameters()]
        norms = [nothing if grad is None else torch.linalg.vector_norm(grad).cpu() for grad in grads]
        return torch.stack(norms) if norms else torch.empty(0)

    def scale_gradients(self, scale: float) -> None:
        """Multiply the gradients, as `torch.nn.utils.clip_grad_norm_` does."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(torch.tensor(scale, device=parameter.grad.device))


def make_optimizer(parameters: list[nn.Parameter], config: Config, rate: float) -> torch.optim.Optimizer:
    """Return the optimizer of one half. One tensor at a time: `foreach` and `fused` round differently."""
    train, decay = config.train, config.train.weight_decay
    match train.optimizer:
        case "sgd":
            momentum, nesterov = train.momentum, train.nesterov
            return torch.optim.SGD(parameters, rate, momentum, 0.0, decay, nesterov, foreach=False, fused=False)
        case "adam":
            return torch.optim.Adam(parameters, rate, weight_decay=decay, foreach=False, fused=False)
        case "adamw":
            return torch.optim.AdamW(parameters, rate, weight_decay=decay, foreach=False, fused=False)
