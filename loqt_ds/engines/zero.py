"""The factors and their optimizer state inside DeepSpeed's ZeRO partitions (one process).

ZeRO (stage 1 and 2) keeps, per parameter group, one flat float32 master and one optimizer state over it. A factor B is
a slice of the flat tensor. In 8-bit states the blocks of 256 elements belong to the flat tensor, so that a block may
straddle two layers: a slice is written by dequantizing the blocks that cover it, replacing the slice, and quantizing
those blocks again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.optim import BLOCKSIZE_8BIT, MOMENT_KEYS, moment_keys, quantize_moment, restore_state, saved_state


class ZeroState:
    """Access to one ZeRO optimizer's flat masters and states by parameter name."""

    def __init__(self, zero_optimizer: Any, parameters: dict[str, nn.Parameter]) -> None:
        self._zero, self._parameters = zero_optimizer, parameters
        self._places: dict[str, tuple[int, slice]] = {}  # name -> (group, slice of the flat tensor)
        names = {id(parameter): name for name, parameter in parameters.items()}
        for number, group in enumerate(zero_optimizer.bit16_groups):
            for parameter in group:
                address = parameter._hp_mapping.hp_fragment_address
                self._places[names[id(parameter)]] = number, slice(address.start, address.start + address.numel)

    @property
    def num_groups(self) -> int:
        return len(self._zero.single_partition_of_fp32_groups)

    def flat(self, group: int) -> Tensor:
        """The flat float32 master of a group."""
        return self._zero.single_partition_of_fp32_groups[group]

    def state(self, group: int) -> dict[str, Any]:
        """The optimizer's state of a group's flat master; empty before the first step."""
        return self._zero.optimizer.state[self.flat(group)]

    def group_of(self, name: str) -> int:
        return self._places[name][0]

    def read(self, name: str) -> Tensor:
        """The master of a parameter, float32, in its shape."""
        group, place = self._places[name]
        return self.flat(group).data[place].view(self._parameters[name].shape)

    def write(self, name: str, value: Tensor) -> None:
        """Sets a parameter and its master."""
        self.read(name).copy_(value)
        self._parameters[name].data.copy_(value)  # in place: `.data = ` would leave the flat buffer behind

    def read_moment(self, name: str, index: int) -> Tensor:
        """First (0) or second (1) moment in float32, in the parameter's shape."""
        group, place = self._places[name]
        values, start = self._covering(self.state(group), place, index)
        return values[place.start - start : place.stop - start].view(self._parameters[name].shape).clone()

    def write_moment(self, name: str, index: int, value: Tensor) -> None:
        """Overwrites a moment."""
        group, place = self._places[name]
        state = self.state(group)
        values, start = self._covering(state, place, index)
        values[place.start - start : place.stop - start] = value.reshape(-1)
        keys = moment_keys(state)
        assert keys is not None
        stored = state[keys[index]]
        if stored.dtype != torch.uint8:
            return  # `values` is a view of the state
        number = index + 1
        blocks = slice(start // BLOCKSIZE_8BIT, -(-(start + len(values)) // BLOCKSIZE_8BIT))
        codes, absmax = quantize_moment(values, state[f"qmap{number}"])
        stored[start : start + len(values)].copy_(codes)
        state[f"absmax{number}"][blocks].copy_(absmax)

    def _covering(self, state: dict[str, Any], place: slice, index: int) -> tuple[Tensor, int]:
        """(values, start): the moment over whole blocks that cover a slice, float32; a view where it is not 8-bit."""
        keys = moment_keys(state)
        assert keys is not None
        stored = state[keys[index]]
        if stored.dtype != torch.uint8:
            return stored[place], place.start
        import bitsandbytes.functional as F

        number = index + 1
        first, last = place.start // BLOCKSIZE_8BIT, -(-place.stop // BLOCKSIZE_8BIT)
        start, stop = first * BLOCKSIZE_8BIT, min(last * BLOCKSIZE_8BIT, stored.numel())
        values = F.dequantize_blockwise(
            stored[start:stop].contiguous(),
            absmax=state[f"absmax{number}"][first:last].contiguous(),
            code=state[f"qmap{number}"],
            blocksize=BLOCKSIZE_8BIT,
        )
        return values, start

    def set_step(self, group: int, step: int) -> None:
        """Sets the optimizer's step count of a group (of bias correction)."""
        state = self.state(group)
        state["step"] = torch.tensor(float(step)) if moment_keys(state) == MOMENT_KEYS[0] else step

    # ---------------------------------------------------------------- saving

    def masters(self) -> dict[str, Tensor]:
        """The float32 master of each parameter, by name."""
        return {name: self.read(name) for name in self._places}

    def saved(self) -> dict[str, Tensor]:
        """`master.<parameter>` for each parameter, and `zero.<group>.<key>` for the flat optimizer states."""
        tensors = {f"master.{name}": master for name, master in self.masters().items()}
        for group in range(self.num_groups):
            tensors |= {f"zero.{group}.{key}": value for key, value in saved_state(self.state(group)).items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `saved` gave; parameters themselves are loaded with the model."""
        for name in self._places:
            self.read(name).copy_(tensors[f"master.{name}"])
        for group in range(self.num_groups):
            prefix = f"zero.{group}."
            saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            restore_state(self._zero.optimizer, self.flat(group), saved)


class ZeroStore:
    """B and its optimizer state in ZeRO partitions, for the controller."""

    def __init__(self, zero: ZeroState) -> None:
        self._zero = zero

    def read(self, name: str) -> Tensor:
        return self._zero.read(f"{name}.B")

    def write(self, name: str, value: Tensor) -> None:
        self._zero.write(f"{name}.B", value)

    def moments(self, name: str) -> tuple[Tensor, Tensor] | None:
        if not self._zero.state(self._zero.group_of(f"{name}.B")):
            return None
        return self._zero.read_moment(f"{name}.B", 0), self._zero.read_moment(f"{name}.B", 1)

    def set_moments(self, name: str, first: Tensor, second: Tensor) -> None:
        self._zero.write_moment(f"{name}.B", 0, first)
        self._zero.write_moment(f"{name}.B", 1, second)

    def reset_moments(self, name: str) -> None:
        zeros = torch.zeros_like(self.read(name))
        self.set_moments(name, zeros, zeros)
        # The step count is the group's. All layers are re-initialized together; one that keeps its P meanwhile takes a
        # first step that is too small, which is harmless, where the others' would be too large with the old count.
        self._zero.set_step(self._zero.group_of(f"{name}.B"), 0)
