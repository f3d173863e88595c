"""Trained state in shards: masters and moments by parameter name, wherever an engine keeps them, and as they are saved.

A shard is one tensor that an optimizer updates, with its state. It holds fragments of parameters: one whole parameter
on a single device, a slice of a parameter group's flat vector under ZeRO, rows of one parameter under FSDP. Engines say
which shards they have; reading, writing, saving and restoring by parameter name is done here, once.

    Shard          one tensor, its optimizer, its fragments
    ShardedState   this rank's shards: what the controller reads and writes, what a checkpoint holds

Saved, a shard is `KEY/master` (where it is a copy of parameters) and `KEY/<whatever the optimizer keeps>`, as it is, so
that the same number of ranks continues bit for bit; the layout goes into the metadata as JSON. Any other engine, or
number of ranks, reads masters and moments in float32 through that layout and quantizes moments again.

Moments in 8 bits come in blocks of 256 elements of the shard, so that a block may straddle two parameters: a fragment
is written by dequantizing the blocks that cover it, replacing it, and quantizing those blocks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loqt_ds.checkpoint import Checkpoint, CheckpointError
from loqt_ds.optim import (
    BLOCKSIZE_8BIT,
    MOMENT_KEYS,
    decode_moment,
    moment_keys,
    new_state,
    quantize_moment,
    restore_state,
    saved_state,
)
from loqt_ds.ranks import ALONE, Ranks

LAYOUT = "shards"  # the key of the layout in an engine's saved state


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of a flattened parameter, at [offset, offset + length) of a shard."""

    name: str
    start: int
    length: int
    offset: int

    @property
    def place(self) -> slice:
        """Where it lies in the shard."""
        return slice(self.offset, self.offset + self.length)

    @property
    def source(self) -> slice:
        """Which elements of the parameter it holds."""
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class Shard:
    """One tensor that an optimizer updates.

    Args:
        key: its name in checkpoints, the same in every run.
        fragments: what it holds.
        values: the tensor whose elements are the trained values (any shape, contiguous).
        slot: the tensor under which the optimizer keeps the state; usually `values` itself.
        optimizer: torch's or bitsandbytes' Adam.
        is_copy: whether it is a master copy of parameters, and not the parameters themselves.
    """

    key: str
    fragments: tuple[Fragment, ...]
    values: Tensor
    slot: Tensor
    optimizer: Any
    is_copy: bool

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state; empty before the first step."""
        return self.optimizer.state[self.slot]

    def read(self, fragment: Fragment) -> Tensor:
        """float32 (length,); a view where the shard is float32."""
        return self.values.data.view(-1)[fragment.place].float()

    def write(self, fragment: Fragment, value: Tensor) -> None:
        self.values.data.view(-1)[fragment.place].copy_(value)

    def read_moment(self, fragment: Fragment, index: int) -> Tensor:
        """First (0) or second (1) moment, float32 (length,), a copy."""
        values, start = self._covering(fragment, index)
        return values[fragment.offset - start :][: fragment.length].clone()

    def write_moment(self, fragment: Fragment, index: int, value: Tensor) -> None:
        """Overwrites a fragment of a moment; the blocks it shares are quantized again."""
        values, start = self._covering(fragment, index)
        values[fragment.offset - start :][: fragment.length].copy_(value)
        state = self.state
        keys = moment_keys(state)
        assert keys is not None
        stored = state[keys[index]].view(-1)
        if stored.dtype != torch.uint8:
            return  # `values` is a view of the state
        number = index + 1
        blocks = slice(start // BLOCKSIZE_8BIT, -(-(start + len(values)) // BLOCKSIZE_8BIT))
        codes, absmax = quantize_moment(values, state[f"qmap{number}"])
        stored[start : start + len(values)].copy_(codes)
        state[f"absmax{number}"][blocks].copy_(absmax)

    def _covering(self, fragment: Fragment, index: int) -> tuple[Tensor, int]:
        """(values, start): the moment over whole blocks that cover a fragment; a view where it is not 8-bit."""
        state, place = self.state, fragment.place
        keys = moment_keys(state)
        assert keys is not None
        stored = state[keys[index]].view(-1)
        if stored.dtype != torch.uint8:
            return stored[place], place.start
        number = index + 1
        first, last = place.start // BLOCKSIZE_8BIT, -(-place.stop // BLOCKSIZE_8BIT)
        start, stop = first * BLOCKSIZE_8BIT, min(last * BLOCKSIZE_8BIT, stored.numel())
        absmax = state[f"absmax{number}"][first:last]
        return decode_moment(stored[start:stop], absmax, state[f"qmap{number}"]), start

    def set_step(self, step: int) -> None:
        """Sets the optimizer's step count (of bias correction)."""
        state = self.state
        if moment_keys(state) == MOMENT_KEYS[0]:
            state["step"].fill_(step)
        else:
            state["step"] = step

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        master = {f"{self.key}/master": self.values.detach()} if self.is_copy else {}
        return master | {f"{self.key}/{key}": value for key, value in saved_state(self.state).items()}


class ShardedState:
    """The shards of this rank, by parameter name.

    Args:
        shards: of this rank.
        parameters: all trained parameters by name: whole on every rank, or sharded by rows, in which case the shards'
            values are the parameters' own.
        ranks: who holds the other shards.
        num_replicas: how often every shard is there: 1, as many as ranks (every rank has all shards), or, where ranks
            of a group divide them, the number of groups, which are of consecutive ranks.
    """

    def __init__(
        self,
        shards: list[Shard],
        parameters: Mapping[str, nn.Parameter],
        *,
        ranks: Ranks = ALONE,
        num_replicas: int = 1,
    ) -> None:
        self.shards, self._parameters, self._ranks = shards, parameters, ranks
        self._num_replicas, self._group_size = num_replicas, ranks.world_size // num_replicas
        self._is_whole = self._group_size == 1
        self._places: dict[str, list[tuple[Shard, Fragment]]] = {name: [] for name in parameters}
        for shard in shards:
            for fragment in shard.fragments:
                self._places[fragment.name].append((shard, fragment))

    # ---------------------------------------------------------------- by parameter

    def read(self, name: str, target: int = 0) -> Tensor | None:
        """The parameter in the precision of its master, float32, in its shape, on rank `target`. Collective."""
        return self._collect(name, target, lambda shard, fragment: shard.read(fragment))

    def moment(self, name: str, index: int, target: int = 0) -> Tensor | None:
        """First (0) or second (1) moment, float32, in the parameter's shape, on rank `target`. Collective."""
        return self._collect(name, target, lambda shard, fragment: shard.read_moment(fragment, index))

    def _collect(self, name: str, target: int, read: Any) -> Tensor | None:
        parameter = self._parameters[name]
        places = self._places[name]
        is_target = self._ranks.rank == target
        if self._is_whole:
            (place,) = places
            return read(*place).view(parameter.shape) if is_target else None
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        for shard, fragment in places if self._ranks.rank < self._group_size else ():  # each shard once
            whole[fragment.source].copy_(read(shard, fragment))
        work = self._ranks.reduce(whole, target)
        if work is not None:
            work.wait()
        return whole.view(parameter.shape) if is_target else None

    def has_moments(self, name: str) -> bool:
        """Whether the optimizer has moments of a parameter yet; the same on all ranks."""
        # Flat partitions are stepped all together, those that hold nothing of this parameter as well.
        own = [shard for shard, _ in self._places[name]] or self.shards
        return any(shard.state for shard in own)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Sets a parameter, and this rank's part of its master, from the whole value."""
        flat = value.reshape(-1)
        for shard, fragment in self._places[name]:
            shard.write(fragment, flat[fragment.source])
        parameter = self._parameters[name]
        if not isinstance(parameter, DTensor):
            parameter.data.copy_(value)  # in place: `.data = ` would leave a flat buffer behind

    @torch.no_grad()
    def write_moments(self, name: str, first: Tensor, second: Tensor) -> None:
        """Overwrites this rank's part of both moments, which there must be, from the whole ones."""
        for shard, fragment in self._places[name]:
            for index, moment in enumerate((first, second)):
                shard.write_moment(fragment, index, moment.reshape(-1)[fragment.source])

    @torch.no_grad()
    def reset_moments(self, name: str) -> None:
        """Makes the optimizer's state of a parameter that of a new one."""
        for shard, fragment in self._places[name]:
            if shard.state:
                zeros = torch.zeros(fragment.length, dtype=torch.float32, device=shard.values.device)
                for index in (0, 1):
                    shard.write_moment(fragment, index, zeros)
                # The step count is the shard's. Layers are re-initialized together; one that keeps its P takes
                # a first step that is too small, which is harmless; the others' would be too large with the old count.
                shard.set_step(0)

    def masters(self) -> dict[str, Tensor]:
        """All master copies, float32 by parameter name, on rank 0's host; none on the others. Collective."""
        if not any(shard.is_copy for shard in self.shards):
            return {}
        found = {}
        for name in self._parameters:
            if (value := self.read(name)) is not None:
                found[name] = value.cpu()  # one at a time: rank 0's device holds no more than the others'
        return found

    # ---------------------------------------------------------------- saving

    def saved(self) -> dict[str, Tensor]:
        """The tensors that this rank saves; of replicated shards each rank saves some."""
        return {name: tensor for shard in self._own() for name, tensor in shard.saved().items()}

    def _own(self) -> list[Shard]:
        return self.shards[self._ranks.rank // self._group_size :: self._num_replicas]

    def layout(self) -> list[list[dict[str, Any]]]:
        """JSON: for each rank, its saved shards and what they hold. Collective."""
        return self._ranks.gather_objects([_describe(shard) for shard in self._own()])

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes back what any engine saved; the parameters themselves have been loaded. Collective.

        From the same layout bit for bit; else masters and moments in float32, the latter quantized again.
        """
        saved = checkpoint.metadata["engine_state"][LAYOUT]
        if saved == self.layout():
            # of those who have the same shards, and saved some of them each
            for part in range(self._ranks.rank % self._group_size, len(saved), self._group_size):
                tensors = checkpoint.tensors("optimizer", part)
                for shard in self.shards:
                    if any(entry["key"] == shard.key for entry in saved[part]):
                        self._restore_shard(shard, tensors)
            return
        found = _assemble(checkpoint, self.shards, self._parameters)
        for shard in self.shards:
            values, first, second, step = found[shard.key]
            shard.values.data.view(-1).copy_(values)
            state = {} if step is None else new_state(shard.optimizer, first, second, step, shape=shard.values.shape)
            restore_state(shard.optimizer, shard.slot, state)

    @torch.no_grad()
    def start_anew(self) -> None:
        """Makes masters those of the parameters, and optimizer states those of new ones."""
        for shard in self.shards:
            self._restore_shard(shard, {})

    def _restore_shard(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        prefix = f"{shard.key}/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        master = own.pop("master", None)
        if master is not None:
            shard.values.data.copy_(master)
        elif shard.is_copy:
            for fragment in shard.fragments:
                shard.write(fragment, _own_values(shard, fragment, self._parameters))
        restore_state(shard.optimizer, shard.slot, own)


def _own_values(shard: Shard, fragment: Fragment, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """A fragment of a parameter as the parameter itself has it, flat."""
    parameter = parameters[fragment.name]
    if isinstance(parameter, DTensor):  # of which the shard is this rank's part
        return shard.read(fragment)
    return parameter.detach().reshape(-1)[fragment.source]


def _describe(shard: Shard) -> dict[str, Any]:
    kind = (
        "torch" if isinstance(shard.optimizer, torch.optim.Adam) else f"bitsandbytes-{shard.optimizer.args.optim_bits}"
    )
    return {
        "key": shard.key,
        "optimizer": kind,
        "length": shard.values.numel(),
        "fragments": [[f.name, f.start, f.length, f.offset] for f in shard.fragments],
    }


# ---------------------------------------------------------------- reading another layout


@dataclass(frozen=True)
class _SavedShard:
    """A shard of a checkpoint, decoded: flat float32 vectors; moments and step are None before the first step."""

    fragments: list[Fragment]
    master: Tensor | None
    moments: tuple[Tensor, Tensor] | None
    step: int | None


def _saved_shards(checkpoint: Checkpoint, *, moments: bool) -> Iterator[_SavedShard]:
    """Shard by shard, one rank's file in memory at a time."""
    for part, shards in enumerate(checkpoint.metadata["engine_state"][LAYOUT]):
        tensors = checkpoint.tensors("optimizer", part)
        for entry in shards:
            prefix = f"{entry['key']}/"
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            master = own.pop("master", None)
            keys = moment_keys(own) if moments else None
            yield _SavedShard(
                fragments=[Fragment(*fragment) for fragment in entry["fragments"]],
                master=None if master is None else master.reshape(-1).float(),
                moments=None if keys is None else (_decoded(own, 0), _decoded(own, 1)),
                step=None if keys is None else int(own["step"]),
            )


def _decoded(saved: Mapping[str, Tensor], index: int) -> Tensor:
    keys = moment_keys(saved)
    assert keys is not None
    stored = saved[keys[index]].reshape(-1)
    if stored.dtype != torch.uint8:
        return stored.float()
    from bitsandbytes.functional import create_dynamic_map

    return decode_moment(stored, saved[f"absmax{index + 1}"], create_dynamic_map(signed=index == 0))


_Vectors = tuple[Tensor, Tensor, Tensor, int | None]


def _assemble(
    checkpoint: Checkpoint, shards: list[Shard], parameters: Mapping[str, nn.Parameter]
) -> dict[str, _Vectors]:
    """(values, first moment, second moment, step) of each wanted shard, flat float32 on the CPU.

    Where nothing was saved of a parameter's master, the value is the parameter's. A shard that takes over several
    step counts takes the smallest: its first steps are then too small, and not too large.
    """
    wanted: dict[str, list[tuple[Shard, Fragment]]] = {}
    vectors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    steps: dict[str, int] = {}
    for shard in shards:
        values, first, second = (torch.zeros(shard.values.numel(), dtype=torch.float32) for _ in range(3))
        for fragment in shard.fragments:
            wanted.setdefault(fragment.name, []).append((shard, fragment))
            values[fragment.place] = _own_values(shard, fragment, parameters).float().cpu()
        vectors[shard.key] = values, first, second
    smallest: int | None = None
    for saved in _saved_shards(checkpoint, moments=True):
        if saved.step is not None:
            smallest = saved.step if smallest is None else min(saved.step, smallest)
        for theirs in saved.fragments:
            if theirs.name not in parameters:
                raise CheckpointError(f"{checkpoint.path} belongs to another model: {theirs.name} is not trained here")
            for shard, ours in wanted.get(theirs.name, []):
                start = max(theirs.start, ours.start)
                length = min(theirs.start + theirs.length, ours.start + ours.length) - start
                if length <= 0:
                    continue
                source = slice(theirs.offset + start - theirs.start, theirs.offset + start - theirs.start + length)
                target = slice(ours.offset + start - ours.start, ours.offset + start - ours.start + length)
                values, first, second = vectors[shard.key]
                if saved.master is not None:
                    values[target] = saved.master[source]
                if saved.moments is not None and saved.step is not None:
                    first[target], second[target] = saved.moments[0][source], saved.moments[1][source]
                    steps[shard.key] = min(saved.step, steps.get(shard.key, saved.step))
    # A partition that holds nothing is stepped with the others, and must know that there are moments.
    empty = {shard.key for shard in shards if not any(fragment.length for fragment in shard.fragments)}
    return {key: (*found, steps.get(key, smallest if key in empty else None)) for key, found in vectors.items()}


def saved_masters(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The float32 masters of a checkpoint by parameter name; none where the parameters are their own.

    Raises CheckpointError if it holds masters of parameters that `shapes` does not have.
    """
    masters: dict[str, Tensor] = {}
    for saved in _saved_shards(checkpoint, moments=False):
        if saved.master is None:
            continue
        for fragment in saved.fragments:
            if fragment.name not in shapes:
                raise CheckpointError(f"{checkpoint.path} holds a master of {fragment.name}, which its model lacks")
            whole = masters.setdefault(fragment.name, torch.zeros(shapes[fragment.name].numel(), dtype=torch.float32))
            whole[fragment.source] = saved.master[fragment.place]
    return {name: whole.view(shapes[name]) for name, whole in masters.items()}
