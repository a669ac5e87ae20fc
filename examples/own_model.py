"""Train a model and data of one's own, split between clients and a server, from a script.

    .venv/bin/python examples/own_model.py

Model and datasets are plain torch objects; they must be picklable, as for a DataLoader with workers, since
each client is a process. `model.cut` takes a name or index that `zsplit.cut_points` lists.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zsplit


class Spirals(nn.Module):
    """Tells three spirals apart."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.out = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x))


def spirals(count: int, seed: int) -> TensorDataset:
    """Return points (count, 2) on three spirals, and which spiral each is on."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 4 * radius + labels * 2.1 + 0.1 * torch.randn(count, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels)


def main() -> None:
    """Cut the model after its first activation and train it on three clients in turn."""
    model = Spirals()
    for cut in zsplit.cut_points(model, torch.zeros(2, 2)):
        print(cut.index, cut.name, cut.shape)
    config = zsplit.load_config(
        None,
        {
            "run.name": "spirals",
            "run.rounds": 20,
            "model.cut": "hidden.1",
            "schedule.policy": "round_robin",
            "schedule.clients": 3,
            "broker.port": 0,
        },
    )
    data = zsplit.from_datasets(spirals(1500, 0), spirals(300, 1), classes=3)
    result = zsplit.run_here(config, model=model, data=data)
    print(result.sentence, result.summary.get("test_accuracy"), result.folder)


if __name__ == "__main__":
    main()
