"""One back for several clients, and clients that do not wait, in plain PyTorch: what zsplit must equal, bit for bit.

Nothing here knows of zsplit. What `reference.py` says holds here too; this is what differs.

shared (SplitFed V2). A segment of a parallel round begins with a copy of the front for each client, and one back. With
`step` the clients' steps are taken one by one: for each step of the round those who have it, ordered by
`random.Random(derive(seed, "shared", round, step)).shuffle` of their indexes. With `turn` each client in turn, by
index, takes all its steps of the segment. Each step is one of the client's front and one of the back. At the end of
the segment the fronts are averaged; the back stays as it is.

fused. For each step of the segment the mini-batches of all clients who have it are one, in order of the clients: front
i on its own samples, the back on all. Slice m of it is slice m of each client who has one. The loss of a slice is its
mean times its share of all B samples of the step; front i gets the gradient times B / bᵢ. Random modules of the back
draw once for all, with client −1.

Optimizers. Each front has its own, the back has one, and no buffer is lost between two steps of a segment. With `carry`
the back's buffers go on, and the fronts' are averaged; with `reset` both begin anew in each segment, and under `turn`
the back's in each client's turn.

async (FedAsync, Xie et al. 2019). Turn by turn, as they arrived: a client's whole round from the version that it began
with, then version = (1 − α)·version + α·result in float64, cast once, with α = mixing · (staleness + 1)^−power, where
staleness is the number of versions made since. Integers become their maximum. Every turn has a fresh optimizer.
"""

import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import deepcopy

import torch
import torch.nn.functional as F
from reference import Reference, State, Turn, average, clone, derive, weights
from torch import Tensor, nn
from torch.optim import Optimizer

Halves = Callable[[nn.Module], tuple[nn.Module, nn.Module]]


class SharedReference(Reference):
    """Trains with one back. `halves` returns front and back of a model, as modules that share its parameters."""

    def __init__(self, halves: Halves, mode: str, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.halves, self.mode = halves, mode

    def parallel(self, version: State, round_: int) -> tuple[State, list[Turn]]:
        todo = {client: dict(self.steps(client, round_)) for client in self.sampled(round_)}
        longest, turns = max(map(len, todo.values())), []
        every = longest if self.settings.aggregate_every == -1 else self.settings.aggregate_every
        for first in range(0, longest, every):
            segment = {c: {k: b for k, b in steps.items() if first <= k < first + every} for c, steps in todo.items()}
            fleet = Fleet(self, version, [client for client, steps in segment.items() if steps])
            {"step": fleet.by_steps, "turn": fleet.by_turns, "fused": fleet.fused}[self.mode](segment, round_)
            uniform = self.settings.weighting == "uniform"
            fronts = [(fleet.front(c), 1 if uniform else fleet.samples[c]) for c in fleet.models]
            version = version | average(fronts) | fleet.back()
            turns += [Turn({}, fleet.samples[c], fleet.losses[c]) for c in fleet.models]
        return version, turns


class Fleet:
    """The fronts of a segment, one for each client, and its back; whole models, of which one half is used."""

    def __init__(self, reference: SharedReference, version: State, clients: list[int]) -> None:
        self.reference, self.settings = reference, reference.settings
        self.models = {client: self.copy(version) for client in clients}
        self.common = self.copy(version)
        kept = {} if self.settings.optimizer_state == "reset" else version
        self.steppers = {c: self.stepper(model, kept, True) for c, model in self.models.items()}
        self.stepper_of_back = self.stepper(self.common, kept, False)
        self.samples = dict.fromkeys(clients, 0)
        self.losses = dict.fromkeys(clients, 0.0)

    def copy(self, version: State) -> nn.Module:
        model = deepcopy(self.reference.model)
        model.load_state_dict(weights(version))
        return model.train()

    def stepper(self, model: nn.Module, version: State, front: bool) -> Optimizer:
        s = self.settings
        named = [(n, p) for n, p in model.named_parameters() if (n in self.reference.front) == front]
        common = {"weight_decay": s.weight_decay, "foreach": False, "fused": False}
        lr = s.client_lr if front else s.server_lr
        optimizer = torch.optim.SGD([p for _, p in named], lr, momentum=s.momentum, **common)
        for name, parameter in named:
            if (key := f"optimizer/momentum_buffer/{name}") in version:
                optimizer.state[parameter] = {"momentum_buffer": version[key].clone()}
        return optimizer

    def by_steps(self, segment: dict[int, dict[int, Tensor]], round_: int) -> None:
        for step in sorted({step for steps in segment.values() for step in steps}):
            clients = sorted(client for client, steps in segment.items() if step in steps)
            random.Random(derive(self.settings.seed, "shared", round_, step)).shuffle(clients)
            for client in clients:
                self.step(client, round_, step, segment[client][step])

    def by_turns(self, segment: dict[int, dict[int, Tensor]], round_: int) -> None:
        for client in sorted(self.models):
            if self.settings.optimizer_state == "reset":
                self.stepper_of_back = self.stepper(self.common, {}, False)
            for step, batch in segment[client].items():
                self.step(client, round_, step, batch)

    def step(self, client: int, round_: int, step: int, batch: Tensor) -> None:
        (x, y), model = self.reference.data[client], self.models[client]
        x, y = x[batch], y[batch]
        front, back = self.reference.halves(model)[0], self.reference.halves(self.common)[1]
        slices = min(self.settings.micro_batches, len(y))
        with self.reference.deferred(slices, model), self.reference.deferred(slices, self.common):
            for micro, (xs, ys) in enumerate(zip(x.tensor_split(slices), y.tensor_split(slices), strict=True)):
                place = client, round_, step, micro
                with self.reference.seeded(*place, model=model), self.reference.seeded(*place, model=self.common):
                    loss = F.cross_entropy(back(front(xs)), ys) * (len(ys) / len(y))
                loss.backward()
                self.losses[client] += loss.item() * len(y)
        self.samples[client] += len(y)
        for optimizer in (self.steppers[client], self.stepper_of_back):
            optimizer.step()
            optimizer.zero_grad()

    def fused(self, segment: dict[int, dict[int, Tensor]], round_: int) -> None:
        for step in sorted({step for steps in segment.values() for step in steps}):
            self.fused_step({c: steps[step] for c, steps in sorted(segment.items()) if step in steps}, round_, step)

    def fused_step(self, batches: dict[int, Tensor], round_: int, step: int) -> None:
        whole = {c: tuple(part[batch] for part in self.reference.data[c]) for c, batch in batches.items()}
        count = {c: min(self.settings.micro_batches, len(y)) for c, (_, y) in whole.items()}
        total = sum(len(y) for _, y in whole.values())
        back = self.reference.halves(self.common)[1]
        with ExitStack() as stack:
            for client in whole:
                stack.enter_context(self.reference.deferred(count[client], self.models[client]))
            stack.enter_context(self.reference.deferred(max(count.values()), self.common))
            for micro in range(max(count.values())):
                smashed, labels = {}, []
                for client in (c for c in whole if micro < count[c]):
                    x, y = (part.tensor_split(count[client])[micro] for part in whole[client])
                    with self.reference.seeded(client, round_, step, micro, model=self.models[client]):
                        smashed[client] = self.reference.halves(self.models[client])[0](x)
                    labels.append(y)
                joined = torch.cat([each.detach() for each in smashed.values()]).requires_grad_()
                with self.reference.seeded(-1, round_, step, micro, model=self.common):
                    outputs = back(joined)
                y = torch.cat(labels)
                (F.cross_entropy(outputs, y) * (len(y) / total)).backward()
                pieces = joined.grad.split([len(each) for each in labels])
                for (client, output), gradient in zip(smashed.items(), pieces, strict=True):
                    output.backward(gradient * (total / len(whole[client][1])))
        for client in whole:
            self.samples[client] += len(whole[client][1])
            self.steppers[client].step()
            self.steppers[client].zero_grad()
        self.stepper_of_back.step()
        self.stepper_of_back.zero_grad()

    def front(self, client: int) -> State:
        return self.half(self.models[client], self.steppers[client], True)

    def back(self) -> State:
        return self.half(self.common, self.stepper_of_back, False)

    def half(self, model: nn.Module, optimizer: Optimizer, front: bool) -> State:
        modules = {name.rpartition(".")[0] for name in self.reference.front}
        state = {n: t for n, t in model.state_dict().items() if (n.rpartition(".")[0] in modules) == front}
        if self.settings.optimizer_state != "reset":
            for name, parameter in model.named_parameters():
                for buffer, tensor in optimizer.state.get(parameter, {}).items():
                    if isinstance(tensor, Tensor):
                        state[f"optimizer/{buffer}/{name}"] = tensor
        return clone(state)


def train_async(
    reference: Reference, arrivals: Iterable[tuple[int, int, int]], mixing: float, power: float
) -> list[State]:
    """Return the versions. An arrival is a client, which of its rounds it was, and the version that it began with."""
    versions = [clone(reference.model.state_dict())]
    for client, round_, base in arrivals:
        result = reference.turn(versions[base], client, round_, reference.steps(client, round_)).state
        share = mixing * (len(versions) - 1 - base + 1) ** -power
        versions.append({name: mixed(versions[-1][name], tensor, share) for name, tensor in result.items()})
    return versions


def mixed(version: Tensor, result: Tensor, share: float) -> Tensor:
    if not result.is_floating_point():
        return torch.maximum(version, result)
    return (version.double() * (1 - share) + result.double() * share).to(result.dtype)
