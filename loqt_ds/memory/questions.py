"""Does it fit; how many tokens at once; what would have to be given up.

What can be given up is tried from what costs least to what costs most: nothing but time to get used to (lean
activations, layer-wise updates, which compute the same), traffic between ranks (more of the state sharded, over more of
them), precision of the trained state (bf16, 8-bit moments, no masters), a second quantization, fewer rows at once,
fewer rows a step (layer-wise updates without accumulation), a third more time (activation checkpointing), a lower rank,
and last shorter rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from loqt_ds.config import Config, ConfigError, apply_overrides, validate
from loqt_ds.memory.counting import GIB, MemoryPlan, plan
from loqt_ds.memory.division import Division, division_of
from loqt_ds.memory.facts import Facts, describe
from loqt_ds.method.description import training_dtype

SMALLEST_RANK = 16
SHORTEST_ROWS = 64

KEEPS_ALL_BELOW = 0.8
"""Share of the memory up to which train.lean_activations=auto keeps everything: a plan may be wrong by a tenth, and
another tenth is for what else is on the device and for gaps between allocations. Of all memory, not of what is free
now, so that the same command computes the same wherever it is started again."""

Levels = list[tuple[str, ...]]  # of one thing to give up, the least first: section.field=value


@dataclass(frozen=True)
class Proposal:
    """Settings that fit."""

    overrides: tuple[str, ...]
    plan: MemoryPlan

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)} ({self.plan.total_gib:.2f} GiB)"


class Asker:
    """Plans for settings around those of one configuration; a model is described once.

    Args:
        config: validated.
        vocab_size: as of `plan`.
        world_size, ds_config: as of `division_of`.

    Raises ConfigError as that does.
    """

    def __init__(
        self,
        config: Config,
        *,
        vocab_size: int | None = None,
        world_size: int = 1,
        ds_config: dict[str, Any] | None = None,
    ) -> None:
        self.config, self._vocab_size = config, vocab_size
        self._divide: Callable[[Config], Division] = partial(division_of, world_size=world_size, ds_config=ds_config)
        self._divide(config)
        self._facts: dict[str, Facts] = {}

    def plan(self, *overrides: str) -> MemoryPlan:
        """Of the configuration with `overrides`. Raises ValueError where they cannot be honoured."""
        config = self._changed(*overrides)
        key = repr((config.model, config.loqt, config.optim.train_full_rank, training_dtype(config)))
        if key not in self._facts:
            self._facts[key] = describe(config, vocab_size=self._vocab_size)
        return plan(config, division=self._divide(config), facts=self._facts[key])

    def _changed(self, *overrides: str) -> Config:
        config = copy.deepcopy(self.config)
        if overrides:
            apply_overrides(config, overrides)
            validate(config)
            self._divide(config)
        return config

    def largest_micro_batch(self, capacity: int) -> int:
        """Rows of the largest micro-batch that fits `capacity` bytes; 0 where none does."""

        def fits(rows: int) -> bool:
            return self.plan(f"train.micro_batch_size={rows}").total_bytes <= capacity

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def nearest(self, capacity: int, *, limit: int = 3) -> list[Proposal]:
        """Settings that fit `capacity` bytes, at most `limit`: things that cost little together, as few as possible,
        and each thing that suffices alone, what costs least first. Empty where nothing helps."""
        combination = self._combination(capacity)
        proposals = [] if combination is None else [combination]
        for make in _LEVERS:
            found = self._first_that_fits(make(self.config), (), capacity)
            if found is not None and found.overrides not in [each.overrides for each in proposals]:
                proposals.append(found)
        return proposals[:limit]

    def _first_that_fits(self, levels: Levels, others: tuple[str, ...], capacity: int) -> Proposal | None:
        for level in levels:
            tried = self._try(*others, *level)
            if tried is not None and tried.plan.total_bytes <= capacity:
                return tried
        return None

    def _try(self, *overrides: str) -> Proposal | None:
        try:
            return Proposal(overrides, self.plan(*overrides))
        except ConfigError:
            return None  # the options exclude one another

    def _combination(self, capacity: int) -> Proposal | None:
        """Gives up one thing after another until the rest fits, and takes back what was not needed."""
        chosen: list[tuple[str, ...]] = []
        best = self.plan().total_bytes
        found: Proposal | None = None
        for make in _LEVERS:
            levels = make(self._changed(*_flat(chosen)))
            found = self._first_that_fits(levels, _flat(chosen), capacity)
            if found is not None:
                chosen.append(found.overrides[len(_flat(chosen)) :])
                break
            tried = [t for level in levels if (t := self._try(*_flat(chosen), *level)) is not None]
            smallest = min(tried, key=lambda proposal: proposal.plan.total_bytes, default=None)
            if smallest is not None and smallest.plan.total_bytes < best:
                best = smallest.plan.total_bytes
                chosen.append(smallest.overrides[len(_flat(chosen)) :])
        if found is None:
            return None
        for part in list(chosen[:-1])[::-1]:  # what costs most is taken back first
            others = [other for other in chosen if other is not part]
            without = self._try(*_flat(others))
            if without is not None and without.plan.total_bytes <= capacity:
                chosen, found = others, without
        return found


def _flat(parts: list[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(override for part in parts for override in part)


# ---------------------------------------------------------------- what can be given up


def _switch(option: str, value: str, applies: Callable[[Config], bool]) -> Callable[[Config], Levels]:
    return lambda config: [(f"{option}={value}",)] if applies(config) else []


def _double_quant(config: Config) -> Levels:
    loqt = config.loqt
    wanted = {(True, True): "both", (True, False): "w", (False, True): "p"}.get(
        (loqt.quantize_w != "none", loqt.quantize_p != "none")
    )
    return [(f"loqt.double_quant={wanted}",)] if wanted not in (None, loqt.double_quant) else []


def _halved(value: int, smallest: int) -> Iterator[int]:
    while value // 2 >= smallest:
        value //= 2
        yield value


def _fewer_rows(config: Config) -> Levels:
    """Of as many rows a step where they can be accumulated, else of fewer."""
    train = config.train
    levels: Levels = []
    for rows in _halved(train.micro_batch_size, 1):
        fewer = f"train.micro_batch_size={rows}"
        rest = train.micro_batch_size * train.gradient_accumulation_steps
        if rest % rows == 0 and not config.optim.layerwise:
            levels.append((fewer, f"train.gradient_accumulation_steps={rest // rows}"))
        levels.append((fewer,))
    return levels


def _one_micro_batch(config: Config) -> Levels:
    """Layer-wise updates save gradients only where there is nothing to accumulate."""
    if config.train.gradient_accumulation_steps == 1:
        return []
    return [("train.gradient_accumulation_steps=1", "optim.layerwise=true")]


def _lower_rank(config: Config) -> Levels:
    return [(f"loqt.rank={rank}",) for rank in _halved(config.loqt.rank, SMALLEST_RANK)]


def _shorter_rows(config: Config) -> Levels:
    return [(f"data.sequence_length={length}",) for length in _halved(config.data.sequence_length, SHORTEST_ROWS)]


def _sharded(config: Config) -> Levels:
    """W and P too, which then cannot be kept dequantized."""
    if config.engine != "fsdp2" or config.fsdp.shard_frozen:
        return []
    uncached = ("loqt.dequantized_cache_gib=0",) if config.loqt.dequantized_cache_gib else ()
    return [("fsdp.shard_frozen=true", *uncached)]


_LEVERS: tuple[Callable[[Config], Levels], ...] = (
    _switch("train.lean_activations", "true", lambda config: config.train.lean_activations is False),
    _switch("optim.layerwise", "true", lambda config: not config.optim.layerwise),
    _switch("fsdp.reshard_after_forward", "true", lambda config: not config.fsdp.reshard_after_forward),
    _sharded,
    _switch("fsdp.num_replicas", "1", lambda config: config.fsdp.num_replicas > 1),
    _switch("train.dtype", "bf16", lambda config: training_dtype(config).itemsize == 4),
    _switch("optim.name", "adamw8bit", lambda config: config.optim.name != "adamw8bit"),
    _switch("optim.master", "bf16", lambda config: config.optim.master != "bf16"),
    _double_quant,
    _fewer_rows,
    _one_micro_batch,
    _switch("train.activation_checkpointing", "true", lambda config: not config.train.activation_checkpointing),
    _lower_rank,
    _shorter_rows,
)


def needs_lean(asker: Asker, capacity: int) -> bool:
    """What train.lean_activations=auto means on a device of `capacity` bytes."""
    if asker.config.model.kernels == "liger":  # whose kernels keep as little anyway
        return True
    return asker.plan("train.lean_activations=false").total_bytes > KEEPS_ALL_BELOW * capacity


def answer(asker: Asker, capacity: int, what: str) -> list[str]:
    """Lines for people: whether the plan fits `what`, of `capacity` bytes, the largest micro-batch, and what else
    would."""
    total = asker.plan().total_bytes
    room = (capacity - total) / GIB
    if room >= 0:
        lines = [f"  {what}: fits, {room:.2f} GiB are left"]
    else:
        lines = [f"  {what}: does not fit, {-room:.2f} GiB are missing"]
    rows = asker.largest_micro_batch(capacity)
    length = asker.config.data.sequence_length
    if rows:
        lines[0] += f"; largest micro-batch: {rows} rows, {rows * length:,} tokens"
    else:
        lines[0] += f"; not even one row of {length} tokens"
    if room < 0:
        lines += nearest_lines(asker, capacity)
    return lines


def nearest_lines(asker: Asker, capacity: int) -> list[str]:
    """Lines for people: the nearest settings that fit."""
    proposals = asker.nearest(capacity)
    if not proposals:
        return ["    nothing that can be given up makes it fit: a smaller model.shape, or more memory"]
    return [f"    fits with {proposal}" for proposal in proposals]


def check_fits(asker: Asker, capacity: int, what: str, *, say: Callable[[str], None]) -> None:
    """Warns where the plan is above `capacity` bytes of `what`, with the nearest settings that fit. Raises ConfigError
    where what stays for the whole run, which is counted exactly, is more than that alone."""
    planned = asker.plan()
    if planned.total_bytes <= capacity:
        return
    has = what if "=" in what else f"{what} has {capacity / GIB:.2f} GiB"
    remedies = "\n".join(line.strip() for line in nearest_lines(asker, capacity))
    if planned.persistent_bytes > capacity:
        raise ConfigError(
            f"{has}: less than the {planned.persistent_bytes / GIB:.2f} GiB that weights, factors and optimizer states "
            f"alone take ({planned.total_gib:.2f} GiB at the peak)\n{remedies}"
        )
    say(f"warning: {has}, the plan is {planned.total_gib:.2f} GiB: it will probably run out of memory\n{remedies}")
