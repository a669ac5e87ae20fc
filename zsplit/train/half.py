"""One half of the cut model under training: the part, its optimizer, and its share of the run's state."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from zsplit.config import Config
from zsplit.errors import RemoteProtocolError
from zsplit.model import Part, Traced, trace, zoo
from zsplit.train.state import State, Tensors, load_optimizer, optimizer_buffers, weights_of
from zsplit.wire.manifest import LOCAL, OPTIMIZER


class Workshop:
    """Makes halves: the whole model, built and traced once, and copies of its parts.

    `model` takes the place of the one that the config names. Raises ConfigError for a model or cut that
    does not exist.
    """

    def __init__(self, config: Config, shape: tuple[int, ...], device: torch.device, model: nn.Module | None) -> None:
        self.config = config
        self.device = device
        self.model = (
            model
            if model is not None
            else zoo.build(config.model.name, config.model.num_classes, config.run.seed, shape)
        )
        self.traced: Traced = trace(self.model, torch.zeros(2, *shape))
        self._parts: dict[str, tuple[Part, ...]] = {}
        own = zoo.default_cut(config.model.name) if model is None else None
        middle = self.traced.cuts[len(self.traced.cuts) // 2].name if self.traced.cuts else ""
        self.cut = self.traced.cut(config.model.cut if config.model.cut != "" else own or middle).name

    def parts(self, cut: str) -> tuple[Part, ...]:
        """Return front and back of the model itself; cut once for each place."""
        if cut not in self._parts:
            self._parts[cut] = self.traced.split(cut)
        return self._parts[cut]

    def front(self, cut: str) -> "Half":
        """Return a new front, on the device."""
        return self._half(self.parts(cut)[0], self.config.train.client_rate)

    def back(self, cut: str) -> "Half":
        """Return a new back, on the device."""
        return self._half(self.parts(cut)[1], self.config.train.server_rate)

    def _half(self, part: Part, rate: float) -> "Half":
        return Half(deepcopy(part).to(self.device), self.config, rate, self.device)

    def clip_scale(self, norms: Mapping[str, Tensor]) -> float:
        """Return what all gradients are multiplied by so that their global norm is at most `train.clip_norm`.

        `norms` are those of both halves by parameter; they are summed in the model's order, so that the
        cut changes no bit (`torch.nn.utils.clip_grad_norm_`).
        """
        present = [norms[n] for n, _ in self.model.named_parameters() if n in norms and not norms[n].isnan()]
        total = torch.linalg.vector_norm(torch.stack(present))
        return float((self.config.train.clip_norm / (total + 1e-6)).clamp(max=1.0))

    def initial(self) -> State:
        """Return version 0: the model as it was built."""
        return State.of(weights_of(self.model))


class Half:
    """A front or a back. `load` before each turn, train it, then take its `state`."""

    def __init__(self, part: Part, config: Config, rate: float, device: torch.device) -> None:
        self.part = part
        self.device = device
        self.parameters: list[nn.Parameter] = [p for p in part.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config, rate) if self.parameters else None
        self._names = frozenset(part.state_dict())
        self._carries = config.schedule.optimizer_state
        self._prefix = OPTIMIZER

    def keep_for(self, client: int | None) -> None:
        """Say which client's buffers these are where each peer keeps its own (`optimizer_state = "local"`).

        None is the one back that all clients share in round-robin: its buffers are everybody's and travel.
        """
        own = client is not None and self._carries == "local"
        self._prefix = f"{LOCAL}{client}/" if own else OPTIMIZER

    def weighs(self, name: str) -> bool:
        """Whether a tensor of a version is a weight or buffer of this half: all that an evaluation needs."""
        return name in self._names

    def wants(self, name: str) -> bool:
        """Whether a tensor of a version belongs to this half, its optimizer included."""
        if name.startswith(self._prefix):
            return name.removeprefix(self._prefix).partition("/")[2] in self._names
        return self.weighs(name)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights and optimizer buffers from a version. Raises RemoteProtocolError where weights lack."""
        missing = sorted(self._names - tensors.keys())
        if missing:
            raise RemoteProtocolError(f"The version lacks {missing[0]}: do all peers have the same model?")
        self.part.load_state_dict({name: tensors[name] for name in self._names})
        if self.optimizer is not None:
            load_optimizer(self.part, self.optimizer, tensors, self._prefix)
            self.optimizer.zero_grad()

    def state(self) -> State:
        """Return a snapshot of weights and of those optimizer buffers that outlive the turn."""
        tensors: Tensors = weights_of(self.part)
        if self.optimizer is not None and self._carries != "reset":
            tensors |= optimizer_buffers(self.part, self.optimizer, self._prefix)
        return State.of(tensors)

    def step(self) -> None:
        """Step the optimizer and forget the gradients."""
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
