"""The training algorithms, in plain PyTorch and one process: what zsplit must equal, bit for bit.

Nothing here knows of zsplit: the model is never cut. Bits hold for one torch build, one CPU capability
and one number of threads. Rounds, steps, clients, local epochs and micro-batches count from 0.

State. One flat dictionary, the version: the model's `state_dict`, and beside it the optimizer's buffers, as
`optimizer/<buffer>/<parameter>` (carried) or `local/<client>/<buffer>/<parameter>` (a client's own).
Absent buffers stay absent: torch's optimizers make them at a parameter's first step.

Randomness. `derive(seed, purpose, *parts)` seeds a fresh generator for each purpose: the first weights,
the deal of the data, its order (client, round, local epoch), the sampled clients (round), and dropout:
torch's global generator, seeded anew before each call of each random module (client, round, step,
micro-batch, name; the second call of one module within a forward pass is `name_1`).

Step. A mini-batch of B samples is cut by `tensor_split` into min(micro_batches, B) slices of b samples;
the gradients of `cross_entropy(slice) * (b / B)` accumulate in slice order; their global norm, over all
parameters in model order, is clipped unless `clip_norm` is 0; the optimizer steps once. Front and back
differ by their learning rates.

BatchNorm. Every slice is normalised by its own statistics. With `micro`, and where a mini-batch is one slice, running
statistics move with each slice, as in torch. With `deferred` they move once for the mini-batch, and once for each
call of a module in a forward pass. Slice i has nᵢ elements of a channel, with mean mᵢ and unbiased variance vᵢ as
torch itself computes them; with n = Σ nᵢ the mini-batch has the mean m = Σ nᵢ·mᵢ / n and the unbiased variance
v = Σ ((nᵢ - 1)·vᵢ + nᵢ·(mᵢ - m)²) / (n - 1), in float32, over all slices at once. Running values r become
(1 - momentum)·r + momentum·m and likewise with v; without a momentum it is 1 / `num_batches_tracked`.

Turn. A client runs steps of its round from one version: `local_epochs` times through its data, each in
an order of its own, in consecutive batches, the short last one kept. `optimizer_state` says with which
buffers it starts:

- `carry`: those in the version; they travel with the weights.
- `reset`: none; every turn starts with a fresh optimizer, and a version holds no buffer.
- `local`: the client's own for each part that is its own: the front and, under `parallel`, its replica
  of the back. Under `round_robin` there is one back, whose buffers are carried.

round_robin. In each round every sampled client in turn, by index, runs its whole round from the version
that the one before it left.

parallel (one replica of the back for each client: SplitFed V1, Thapa et al. 2022). A round is cut into
segments of `aggregate_every` steps (-1: one segment). In each, every sampled client that has steps left
runs them, as a turn, from the common version; the results are averaged. Who has none left has no part.

Rates. In epoch e, counted over the whole run (round · local_epochs + local epoch), the learning rates are multiplied by
γ^(e // lr_step) (`step`), by γ for each milestone not after e (`multistep`), or by (1 + cos(π·e / E)) / 2 with E the
epochs of the run (`cosine`).

Excluded names (patterns) are each client's own: after a turn they stand in the version under
`local/<client>/weights/<name>` too, and that is what the client's next turn begins with; their buffers are `local` as
well. The plain name is averaged.

Average. For each name, over those who hold it, in client order: Σ nᵢ·wᵢ in float64, divided by Σ nᵢ, cast
once to the tensor's type; nᵢ is the number of samples that client i used in the segment (`samples`), or
1 (`uniform`). Integers (`num_batches_tracked`) and the optimizer's `step` counts: the maximum. What one
client alone holds is taken as it is; what none of them holds stays as it was in the version.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from functools import reduce
from hashlib import blake2b
from math import cos, floor, pi
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

State = dict[str, Tensor]
Steps = list[tuple[int, Tensor]]  # each with its index in the round and the samples of its mini-batch

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BUFFERS = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Settings:
    """What decides a run, besides model, data and cut. `clients_per_round` 0 is all of them."""

    seed: int = 0
    rounds: int = 1
    policy: Literal["round_robin", "parallel"] = "round_robin"
    clients_per_round: int = 0
    local_epochs: int = 1
    batch_size: int = 32
    micro_batches: int = 1
    aggregate_every: int = -1
    weighting: Literal["samples", "uniform"] = "samples"
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    optimizer_state: Literal["carry", "reset", "local"] = "carry"
    client_lr: float = 0.1
    server_lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    batch_norm: Literal["deferred", "micro"] = "deferred"
    clip_norm: float = 0.0
    lr_schedule: Literal["constant", "step", "multistep", "cosine"] = "constant"
    lr_gamma: float = 0.1
    lr_step: int = 1
    lr_milestones: tuple[int, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """What came of a turn: the state, the samples used, and the loss summed over them."""

    state: State
    samples: int
    loss: float


@dataclass(frozen=True)
class Score:
    """Sums over samples: the loss, and how many labels were the best one, among the best five."""

    samples: int
    loss: float
    top1: int
    top5: int


class Reference:
    """Trains `build()` on `data`, one pair (inputs, labels) for each client.

    `front` names the parameters at the client's side of the cut, `random_modules` the modules that draw
    random numbers in training.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        data: Sequence[tuple[Tensor, Tensor]],
        settings: Settings,
        front: Collection[str] = (),
        random_modules: Collection[str] = (),
    ) -> None:
        torch.manual_seed(derive(settings.seed, "init"))
        self.model = build()
        self.data, self.settings = data, settings
        self.front, self.random_modules = front, random_modules

    def train(self) -> tuple[list[State], list[float]]:
        """Return the versions after 0, 1, … rounds, and each round's mean training loss over its samples."""
        versions, losses = [clone(self.model.state_dict())], []
        run_round = self.parallel if self.settings.policy == "parallel" else self.round_robin
        for round_ in range(self.settings.rounds):
            version, turns = run_round(versions[-1], round_)
            versions.append(version)
            losses.append(sum(turn.loss for turn in turns) / sum(turn.samples for turn in turns))
        return versions, losses

    def round_robin(self, version: State, round_: int) -> tuple[State, list[Turn]]:
        turns = []
        for client in self.sampled(round_):
            turns.append(self.turn(version, client, round_, self.steps(client, round_)))
            version = version | turns[-1].state
        return version, turns

    def parallel(self, version: State, round_: int) -> tuple[State, list[Turn]]:
        todo = {client: self.steps(client, round_) for client in self.sampled(round_)}
        longest, turns = max(map(len, todo.values())), []
        every = longest if self.settings.aggregate_every == -1 else self.settings.aggregate_every
        for first in range(0, longest, every):
            segment = {client: steps[first : first + every] for client, steps in todo.items()}
            done = [self.turn(version, client, round_, steps) for client, steps in segment.items() if steps]
            uniform = self.settings.weighting == "uniform"
            version = version | average([(turn.state, 1 if uniform else turn.samples) for turn in done])
            turns += done
        return version, turns

    def sampled(self, round_: int) -> list[int]:
        """Return the clients of a round, by index. Drawn without torch, which the broker does not load."""
        clients = range(len(self.data))
        count = self.settings.clients_per_round or len(clients)
        return sorted(random.Random(derive(self.settings.seed, "sample", round_)).sample(clients, count))

    def steps(self, client: int, round_: int) -> Steps:
        count, s = len(self.data[client][1]), self.settings
        seeds = [derive(s.seed, "order", client, round_, epoch) for epoch in range(s.local_epochs)]
        return list(enumerate(batch for seed in seeds for batch in permutation(count, seed).split(s.batch_size)))

    def turn(self, version: State, client: int, round_: int, steps: Steps) -> Turn:
        own = {name: version[key] for name in self.excluded() if (key := f"local/{client}/weights/{name}") in version}
        self.model.load_state_dict(weights(version) | own)
        self.model.train()
        optimizer = self.optimizer(version, client)
        inputs, labels = self.data[client]
        samples, loss = 0, 0.0
        for step, batch in steps:
            self.use_rates(optimizer, self.epoch(client, round_, step))
            mean = self.step(optimizer, inputs[batch], labels[batch], (client, round_, step))
            samples, loss = samples + len(batch), loss + mean * len(batch)
        state = self.model.state_dict() | self.buffers(optimizer, client)
        state |= {f"local/{client}/weights/{name}": state[name] for name in self.excluded()}
        return Turn(clone(state), samples, loss)

    def excluded(self) -> list[str]:
        patterns = self.settings.exclude
        return [name for name in self.model.state_dict() if any(fnmatch(name, pattern) for pattern in patterns)]

    def epoch(self, client: int, round_: int, step: int) -> int:
        per_epoch = -(-len(self.data[client][1]) // self.settings.batch_size)
        return round_ * self.settings.local_epochs + step // per_epoch

    def use_rates(self, optimizer: Optimizer, epoch: int) -> None:
        for group in optimizer.param_groups:
            group.setdefault("first_lr", group["lr"])
            group["lr"] = group["first_lr"] * self.factor(epoch)

    def factor(self, epoch: int) -> float:
        s = self.settings
        match s.lr_schedule:
            case "step":
                return s.lr_gamma ** (epoch // s.lr_step)
            case "multistep":
                return s.lr_gamma ** len([milestone for milestone in s.lr_milestones if milestone <= epoch])
            case "cosine":
                return 0.5 * (1 + cos(pi * epoch / (s.rounds * s.local_epochs)))
            case _:
                return 1.0

    def step(self, optimizer: Optimizer, x: Tensor, y: Tensor, place: tuple[int, int, int]) -> float:
        """Step on one mini-batch and return its mean loss. `place` is (client, round, step)."""
        optimizer.zero_grad()
        slices, mean = min(self.settings.micro_batches, len(y)), 0.0
        with self.deferred(slices):
            for micro, (xs, ys) in enumerate(zip(x.tensor_split(slices), y.tensor_split(slices), strict=True)):
                with self.seeded(*place, micro):
                    loss = F.cross_entropy(self.model(xs), ys) * (len(ys) / len(y))
                loss.backward()
                mean += loss.item()
        if self.settings.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm, foreach=False)
        optimizer.step()
        return mean

    @contextmanager
    def deferred(self, slices: int, model: nn.Module | None = None) -> Iterator[None]:
        """Undo what the slices do to running statistics, and move them once by all slices."""
        if slices == 1 or self.settings.batch_norm == "micro":
            yield
            return
        norms = {m: clone(m.state_dict()) for m in (model or self.model).modules() if isinstance(m, BATCH_NORMS)}
        inputs: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}
        with ExitStack() as hooks:
            for norm in norms:
                hook = norm.register_forward_pre_hook(lambda norm, args: inputs[norm].append(args[0].detach()))
                hooks.enter_context(hook)
            yield
        for norm, before in norms.items():
            norm.load_state_dict(before)
            calls = len(inputs[norm]) // slices
            for call in range(calls):
                move(norm, inputs[norm][call::calls])

    @contextmanager
    def seeded(self, *place: int, model: nn.Module | None = None) -> Iterator[None]:
        """Seed torch before each call of a random module. `place` is client, round, step, micro-batch."""
        calls: Counter[str] = Counter()

        def seed_before(name: str) -> Callable[..., None]:
            def seed(*_: object) -> None:
                node = f"{name}_{calls[name]}" if calls[name] else name
                torch.manual_seed(derive(self.settings.seed, "dropout", *place, node))
                calls[name] += 1

            return seed

        with ExitStack() as hooks:
            for name in self.random_modules:
                module = (model or self.model).get_submodule(name)
                hooks.enter_context(module.register_forward_pre_hook(seed_before(name)))
            yield

    def optimizer(self, version: State, client: int) -> Optimizer:
        """Return a turn's optimizer, with those of its buffers that the version holds."""
        s, parameters = self.settings, dict(self.model.named_parameters())
        groups = [
            {"params": [parameter], "lr": s.client_lr if name in self.front else s.server_lr}
            for name, parameter in parameters.items()
        ]
        common: dict[str, Any] = {"weight_decay": s.weight_decay, "foreach": False, "fused": False}
        if s.optimizer == "sgd":
            optimizer: Optimizer = SGD(groups, momentum=s.momentum, nesterov=s.nesterov, **common)
        else:
            optimizer = {"adam": Adam, "adamw": AdamW}[s.optimizer](groups, **common)
        for name, parameter in parameters.items():
            keys = {buffer: self.key(client, buffer, name) for buffer in BUFFERS}
            held = {buffer: version[key].clone() for buffer, key in keys.items() if key in version}
            if held:
                optimizer.state[parameter] = held
        return optimizer

    def buffers(self, optimizer: Optimizer, client: int) -> State:
        """Return the buffers that a turn leaves behind, under their names in the version."""
        if self.settings.optimizer_state == "reset":
            return {}
        return {
            self.key(client, buffer, name): tensor
            for name, parameter in self.model.named_parameters()
            for buffer, tensor in optimizer.state.get(parameter, {}).items()
        }

    def key(self, client: int, buffer: str, name: str) -> str:
        own = self.settings.policy == "parallel" or name in self.front
        local = own and (self.settings.optimizer_state == "local" or name in self.excluded())
        return f"local/{client}/{buffer}/{name}" if local else f"optimizer/{buffer}/{name}"

    @torch.no_grad()
    def evaluate(self, version: State, x: Tensor, y: Tensor) -> Score:
        self.model.load_state_dict(weights(version))
        self.model.eval()
        loss, hits = 0.0, torch.zeros(2, dtype=torch.int64)
        size = self.settings.batch_size
        for xs, ys in zip(x.split(size), y.split(size), strict=True):
            logits = self.model(xs)
            loss += F.cross_entropy(logits, ys, reduction="none").double().sum().item()
            best = logits.topk(min(5, logits.shape[1])).indices == ys[:, None]
            hits += torch.stack([best[:, 0].sum(), best.sum()])
        return Score(len(y), loss, *hits.tolist())


@torch.no_grad()
def move(norm: nn.Module, slices: list[Tensor]) -> None:
    """Move running statistics once, by the inputs (N, C, …) of all slices."""
    n = torch.tensor([[x.numel() // x.shape[1]] for x in slices], dtype=torch.float32)
    means = torch.zeros(len(slices), slices[0].shape[1])
    variances = torch.zeros_like(means)
    for x, m, v in zip(slices, means, variances, strict=True):
        F.batch_norm(x, m, v, training=True, momentum=1.0)
    mean = (n * means).sum(0) / n.sum()
    variance = ((n - 1) * variances + n * (means - mean) ** 2).sum(0) / (n.sum() - 1)
    norm.num_batches_tracked += 1
    momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean[:] = (1 - momentum) * norm.running_mean + momentum * mean
    norm.running_var[:] = (1 - momentum) * norm.running_var + momentum * variance


def average(shares: Sequence[tuple[State, int]]) -> State:
    """Average states by name, each with its weight."""
    names = dict.fromkeys(name for state, _ in shares for name in state)
    return {name: join(name, [(state[name], n) for state, n in shares if name in state]) for name in names}


def join(name: str, shares: Sequence[tuple[Tensor, int]]) -> Tensor:
    tensors = [tensor for tensor, _ in shares]
    if len(tensors) == 1:
        return tensors[0]
    if not tensors[0].is_floating_point() or name.startswith("optimizer/step/"):
        return reduce(torch.maximum, tensors)
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, n in shares:
        total += tensor.double() * n
    return (total / sum(n for _, n in shares)).to(tensors[0].dtype)


def deal(seed: int, samples: int, clients: int, val_fraction: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """Return the indices of each client's (training, validation) samples under the partition `iid`."""
    dealt = []
    for client, shard in enumerate(permutation(samples, derive(seed, "partition")).tensor_split(clients)):
        order = permutation(len(shard), derive(seed, "validation", client))
        held_out = floor(val_fraction * len(shard))
        dealt.append((shard[order[held_out:]], shard[order[:held_out]]))
    return dealt


def derive(seed: int, purpose: str, *parts: int | str) -> int:
    text = "/".join(map(str, (seed, purpose, *parts)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def weights(version: State) -> State:
    """Return what `load_state_dict` takes: the version without the optimizer's buffers."""
    return {name: tensor for name, tensor in version.items() if not name.startswith(("optimizer/", "local/"))}


def clone(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
