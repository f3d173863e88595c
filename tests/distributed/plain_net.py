"""A torch model of nobody's library, a configuration with a "loqt" section, and the loop a DeepSpeed script has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import loqt_ds
from loqt_ds.engines.deepspeed import LoQTEngine

VOCAB, WIDTH, HIDDEN = 61, 33, 45
ROWS = 8  # of a global batch


class Net(nn.Module):
    """Odd widths, a bias, none, a norm, a head."""

    def __init__(self, *, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.up, self.norm = nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.remember: Any = lambda function, x: function(x)  # how the middle part is run

    def middle(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.remember(self.middle, self.embedding(ids[:, :-1]))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), ids[:, 1:].flatten())


def settings(**changes: Any) -> dict[str, Any]:
    """A configuration; a change that is an object is added to the section, None removes it."""
    given: dict[str, Any] = {
        "train_batch_size": ROWS,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "loqt": {"rank": 8, "interval": 3, "schedule": "static", "optim": {"name": "adamw"}},
    }
    for name, value in changes.items():
        given[name] = given[name] | value if isinstance(value, dict) and name in given else value
    return {name: value for name, value in given.items() if value is not None}


def batch(step: int, *, rows: int = ROWS) -> Tensor:
    """Token ids in which the next follows from the last, so that there is something to learn."""
    first = torch.randint(0, VOCAB, (rows, 1), generator=torch.Generator().manual_seed(step))
    columns = [first]
    for _ in range(12):
        columns.append((3 * columns[-1] + 1) % VOCAB)
    return torch.cat(columns, 1)


def start(model: nn.Module | None = None, **arguments: Any) -> LoQTEngine:
    arguments.setdefault("config", settings())
    return loqt_ds.initialize(model=Net() if model is None else model, **arguments)[0]


def learn(engine: Any, num_steps: int) -> list[float]:
    """Mean losses of the next steps, from the step the engine is at, over all micro-batches and ranks."""
    losses = []
    for _ in range(num_steps):
        parts = []
        for part in batch(engine.global_steps).chunk(engine.gradient_accumulation_steps()):
            loss = engine(part.chunk(engine.world_size)[engine.global_rank])
            engine.backward(loss)
            engine.step()
            parts.append(loss.detach())
        mean = torch.stack(parts).mean() / engine.world_size
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    return losses


def held(engine: LoQTEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
