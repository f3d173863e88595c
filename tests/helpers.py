"""Tiny models, configurations and loops that several test files share. Nothing here computes a reference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig

from loqt_ds.checkpoint import load_checkpoint, save_checkpoint
from loqt_ds.config import Config, LoQTConfig, OptimConfig, TrainConfig
from loqt_ds.engines.base import StepReport
from loqt_ds.engines.single import SingleEngine
from loqt_ds.method.conversion import build_model, initializer, loqt_layers
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.ranks import Ranks

VOCAB = 61


def llama_config(**changes: Any) -> LlamaConfig:
    """One layer, odd widths: 172 and 61 do not divide by 64, and no two sides of a matrix but q and o are equal."""
    values: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=86,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**(values | changes))


def make_config(
    *, loqt: dict[str, Any] | None = None, optim: dict[str, Any] | None = None, train: dict[str, Any] | None = None
) -> Config:
    """A configuration for a run of a few steps in float32 with 32-bit Adam, unless told otherwise."""
    return Config(
        loqt=LoQTConfig(**({"rank": 8, "interval": 2, "growth": 1.0, "schedule": "static"} | (loqt or {}))),
        optim=OptimConfig(**({"name": "adamw", "lr": 0.01, "warmup_steps": 2} | (optim or {}))),
        train=TrainConfig(**({"max_steps": 20, "dtype": "fp32"} | (train or {}))),
    )


def make_engine(config: Config, *, model_config: Any = None, seed: int = 0) -> SingleEngine:
    """A tiny converted Llama under the single-device engine."""
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    model, source = build_model(model_config or llama_config(), config.loqt, initializer(seed), dtype=dtype)
    return SingleEngine(model, config, original=source.weight)


def token_batch(step: int, *, rows: int = 4, length: int = 16, vocab: int = VOCAB) -> Tensor:
    """(rows, length + 1) token ids, a function of the step alone."""
    return torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(1000 + step))


def lm_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in float32 or better."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train_step(engine: SingleEngine, ids: Tensor) -> tuple[float, StepReport]:
    """One optimizer step; the rows of `ids` are split over the micro-batches. Returns the mean loss and the report."""
    losses, report = [], None
    num = engine._config.train.gradient_accumulation_steps
    for part in ids.chunk(num):
        loss = lm_loss(engine, part)
        engine.backward(loss)
        report = engine.step()
        losses.append(loss.item())
    assert report is not None
    return sum(losses) / num, report


def run(engine: SingleEngine, num_steps: int) -> list[float]:
    """Losses of the next `num_steps` steps."""
    return [train_step(engine, token_batch(engine.step_index))[0] for _ in range(num_steps)]


def save(engine: Any, root: Path) -> Path:
    """A checkpoint of any engine on disk, as the trainer writes one."""
    return save_checkpoint(
        root,
        engine.step_index,
        tensors=engine.saved_tensors(),
        metadata={"engine_state": engine.saved_state()},
        keep=0,
    )


def restore(engine: Any, path: Path) -> Any:
    engine.restore(load_checkpoint(path))
    return engine


def snapshot(engine: SingleEngine) -> dict[str, Tensor]:
    groups = engine.saved_tensors()
    return {f"{group}/{name}": t.clone() for group in ("model", "optimizer") for name, t in groups[group].items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of what differs."""
    return sorted(set(one) ^ set(other)) + [
        name for name in one if name in other and not torch.equal(one[name], other[name])
    ]


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """What a dense model of the same architecture would hold: effective weights, everything else as it is."""
    state = {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith(".B")}
    for name, layer in loqt_layers(model).items():
        state[f"{name}.weight"] = effective_weight(layer).float()
    return state


def effective_weight(layer: LoQTLinear) -> Tensor:
    """W_q + s · (product of P and B) in float64, written out for both sides."""
    w, p, b = layer.weight_q().double(), layer.basis_hat().double(), layer.B.detach().double()
    return w + layer.scale * (b @ p.T if layer.side == "right" else p @ b)


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def factors(engine: Any) -> dict[str, Tensor]:
    """B of each layer in the precision of its master, canonical (l, r)."""
    controller = engine.controller
    return {name: layer.canonical(controller.store.read(name)) for name, layer in controller.layers.items()}


# ---------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes of all storages that operations make, and that are alive; `given` are those made before."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.peak, self.largest, self._sizes = 0, 0, WeakIdKeyDictionary()
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}

    @property
    def now(self) -> int:
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._sizes[storage] = 0 if storage.data_ptr() in self._given else storage.nbytes()
                self.largest = max(self.largest, self._sizes[storage])
        self.peak = max(self.peak, self.now)
        return result


# ---------------------------------------------------------------- ranks that are threads


class ThreadRanks(Ranks):
    """One of several ranks in this process, each a thread: exchanges go through a list that all of them share.

    Only one runs at a time, from exchange to exchange: bitsandbytes' 8-bit optimizers share buffers between threads.
    """

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier, turn: threading.Lock) -> None:
        self.rank, self.world_size, self.device = rank, len(slots), torch.device("cpu")
        self._slots, self._barrier, self._turn = slots, barrier, turn

    def _meet(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._meet()
        values = list(self._slots)
        self._meet()
        return values

    def broadcast(self, tensor: Tensor, source: int) -> None:
        assert tensor.is_contiguous()
        tensor.copy_(self._exchange(tensor.clone())[source])

    def reduce(self, tensor: Tensor, target: int) -> None:
        total = torch.stack(self._exchange(tensor.clone())).sum(0)
        tensor.copy_(total if self.rank == target else torch.full_like(total, -77))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._exchange(tensor.clone())).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor.clone()))

    def gather_objects(self, value: Any) -> list[Any]:
        return self._exchange(value)


def as_ranks(world_size: int, action: Callable[[Ranks], Any]) -> list[Any]:
    """Runs `action(ranks)` as each of `world_size` ranks; what they return, by rank. Raises the first rank's error."""
    slots: list[Any] = [None] * world_size
    barrier, turn = threading.Barrier(world_size, timeout=60), threading.Lock()
    results: list[Any] = [None] * world_size
    errors: list[BaseException | None] = [None] * world_size

    def member(rank: int) -> None:
        with turn:
            try:
                results[rank] = action(ThreadRanks(rank, slots, barrier, turn))
            except BaseException as error:
                errors[rank] = error
                barrier.abort()

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for error in errors if error is not None and not isinstance(error, threading.BrokenBarrierError)]
    for error in own or [error for error in errors if error is not None]:
        raise error
    return results
