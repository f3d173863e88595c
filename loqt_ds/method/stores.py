"""Where an engine keeps what a re-initialization reads and writes: B with its optimizer state, the bytes of W and P.

The controller finds P, merges, quantizes and compensates on the layer's owner; how that rank comes to have B or a whole
W, and how the others come to have the results, is told here: `FactorStore` for B, `PackedStore` for W and P.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from loqt_ds.method.linear import LoQTLinear
from loqt_ds.ranks import Ranks


class FactorStore(Protocol):
    """Where the trained factors and their optimizer states live; tensors are shaped like B, in float32.

    Reading is collective where the state is sharded: all ranks call, and `owner` alone gets the tensor.
    """

    def read(self, name: str, owner: int = 0) -> Tensor | None:
        """B of a layer in the precision of its master copy."""

    def write(self, name: str, value: Tensor) -> None:
        """Sets B and this rank's part of its master copy."""

    def has_moments(self, name: str) -> bool:
        """Whether the optimizer has moments of B yet; the same on all ranks."""

    def moment(self, name: str, index: int, owner: int = 0) -> Tensor | None:
        """First (0) or second (1) moment of B, which there must be."""

    def set_moments(self, name: str, first: Tensor, second: Tensor) -> None:
        """Overwrites this rank's part of both moments; the step count stays."""

    def reset_moments(self, name: str) -> None:
        """Makes the optimizer's state of B that of a new parameter."""


class PackedStore(Protocol):
    """The bytes of W and P, in layers of the ranks or sharded over them. All but `release` is collective."""

    def collect(self, name: str, owner: int) -> None:
        """Until `release`, the layer of rank `owner` has all bytes of W and P."""

    def install(self, name: str, owner: int) -> None:
        """Makes what rank `owner` has set in its layer W and P of all ranks, bit for bit."""

    def release(self, name: str) -> None:
        """Lets go of what `collect` has brought."""


class ReplicatedPacked:
    """Every rank has all of W and P: the `PackedStore` of one process, and of ZeRO."""

    def __init__(self, layers: Mapping[str, LoQTLinear], ranks: Ranks) -> None:
        self._layers, self._ranks = layers, ranks

    def collect(self, name: str, owner: int) -> None:
        pass

    def install(self, name: str, owner: int) -> None:
        for tensor in self._layers[name].packed_tensors().values():
            self._ranks.broadcast(tensor, owner)

    def release(self, name: str) -> None:
        pass
