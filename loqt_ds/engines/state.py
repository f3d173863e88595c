"""What every engine keeps alike: the model's tensors, replicas that must be equal, random states, factors by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loqt_ds.checkpoint import Checkpoint, CheckpointError
from loqt_ds.core.subspace import layer_seed
from loqt_ds.engines.base import ReplicaMismatch
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import loqt_layers
from loqt_ds.ranks import Ranks
from loqt_ds.shards import LAYOUT, ShardedState

_HASH_CHUNK = 2**20  # 8-byte words hashed at a time
_HASH_FACTORS = (0x1E3779B97F4A7C15, 0x7F51AFD7ED558CCD, 0x44CEB9FE1A85EC53)  # odd, so that each product is one-to-one


class ShardedFactors:
    """B and its optimizer state, by layer, for the controller (its `FactorStore`)."""

    def __init__(self, state: ShardedState) -> None:
        self._state = state

    def read(self, name: str, owner: int = 0) -> Tensor | None:
        return self._state.read(f"{name}.B", owner)

    def write(self, name: str, value: Tensor) -> None:
        self._state.write(f"{name}.B", value)

    def has_moments(self, name: str) -> bool:
        return self._state.has_moments(f"{name}.B")

    def moment(self, name: str, index: int, owner: int = 0) -> Tensor | None:
        return self._state.moment(f"{name}.B", index, owner)

    def set_moments(self, name: str, first: Tensor, second: Tensor) -> None:
        self._state.write_moments(f"{name}.B", first, second)

    def reset_moments(self, name: str) -> None:
        self._state.reset_moments(f"{name}.B")


# ---------------------------------------------------------------- the model


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (shared ones once) and the buffers that belong to a model's state (not, say, rotary tables)."""
    persistent = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers


def replicated_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What every rank must hold alike: parameters, and W and P. (Other buffers, say running means, may differ.)"""
    frozen = {f"{name}.{key}" for name, layer in loqt_layers(model).items() for key in layer.packed_bytes}
    parameters = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model_tensors(model).items() if name in frozen or name in parameters}


def own_part(model: nn.Module, ranks: Ranks, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a model that this rank saves: about as many bytes as each of the others. What is not the same on
    all ranks is saved as rank 0 has it. Sharded ones are gathered, parameters in `dtype`, on the host. Collective."""
    replicated = replicated_tensors(model)
    mine = _share(replicated, ranks)
    own = {}
    for name, tensor in whole_tensors(model, dtype):
        if name in mine or (ranks.is_main and name not in replicated):
            own[name] = tensor.cpu() if isinstance(replicated.get(name), DTensor) else tensor
    return own


def whole_tensors(model: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of `model_tensors`, each as one device has it: of what is sharded one after another is gathered,
    parameters in `dtype`, W and P as bytes. Collective."""
    num_bytes = _packed_bytes(model)
    for name, tensor in model_tensors(model).items():
        if not isinstance(tensor, DTensor):
            yield name, tensor
        elif name in num_bytes:
            yield name, tensor.full_tensor().view(torch.uint8)[: num_bytes[name]]
        else:
            yield name, tensor.full_tensor().to(dtype)


def _packed_bytes(model: nn.Module) -> dict[str, int]:
    """How many bytes of W and P there are, by name in the model."""
    return {f"{n}.{key}": size for n, layer in loqt_layers(model).items() for key, size in layer.packed_bytes.items()}


def _share(tensors: dict[str, Tensor], ranks: Ranks) -> set[str]:
    """Names of this rank's share, by bytes."""
    load = [0] * ranks.world_size
    mine = set()
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        rank = load.index(min(load))
        load[rank] += tensors[name].nbytes
        if rank == ranks.rank:
            mine.add(name)
    return mine


def own_rows(tensor: DTensor) -> slice:
    """Which rows of a tensor that FSDP shards are this rank's: the first ranks of a group have the same number, the
    last may have fewer, or none."""
    mesh = tensor.device_mesh
    each = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    start = min(each * mesh.get_local_rank(mesh.ndim - 1), tensor.shape[0])
    rows = slice(start, min(start + each, tensor.shape[0]))
    assert tensor.to_local().shape[0] == rows.stop - rows.start
    return rows


@torch.no_grad()
def load_model(model: nn.Module, checkpoint: Checkpoint, *, dtype: torch.dtype | None = None) -> None:
    """Copies parameters and persistent buffers from a checkpoint into a model of the same shape; of sharded ones, this
    rank's rows.

    `dtype`: in which sharded parameters are saved, which may be kept in a higher precision. Raises CheckpointError,
    naming the first tensor that does not fit, if the checkpoint is of another model.
    """
    wanted, num_bytes = model_tensors(model), _packed_bytes(model)
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, target in wanted.items():
        if isinstance(target, DTensor) and name in num_bytes:
            kinds[name] = (num_bytes[name],), torch.uint8
        else:
            kinds[name] = tuple(target.shape), dtype if isinstance(target, DTensor) and dtype else target.dtype
    found: set[str] = set()
    for part in range(checkpoint.num_parts("model")):  # one file in memory at a time
        for name, source in checkpoint.tensors("model", part).items():
            if name not in wanted:
                raise CheckpointError(f"{checkpoint.path} belongs to another model: {name} is in the checkpoint only")
            if (tuple(source.shape), source.dtype) != kinds[name]:
                raise CheckpointError(
                    f"{checkpoint.path} belongs to another model: {name} is {tuple(source.shape)} {source.dtype}, "
                    f"the model's is {kinds[name][0]} {kinds[name][1]}"
                )
            _load(wanted[name], source)
            found.add(name)
    if missing := sorted(set(wanted) - found):
        raise CheckpointError(f"{checkpoint.path} belongs to another model: {missing[0]} is in the model only")


def _load(target: Tensor, source: Tensor) -> None:
    """Copies a tensor; into a sharded one this rank's rows, and bytes as the words that they are sharded in."""
    if not isinstance(target, DTensor):
        target.copy_(source)
        return
    if source.dtype == torch.uint8:
        source = nn.functional.pad(source, (0, -source.numel() % target.dtype.itemsize)).view(target.dtype)
    target.to_local().copy_(source[own_rows(target)])


# ---------------------------------------------------------------- replicas


def digest(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bytes, int64 (), on its device. A change within eight bytes always changes it, any
    other change but for one in 2^64.

    Σ h(wᵢ + i·c) mod 2^64 over the 8-byte words w; h is one-to-one and has the form of MurmurHash3's finalizer. (A sum
    of multiples of the words alone would not see two signs that flip: 2^63 times two odd numbers is nothing.)
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, words.numel(), _HASH_CHUNK):
        chunk = words[start : start + _HASH_CHUNK]
        mixed = torch.arange(start, start + chunk.numel(), device=flat.device) * _HASH_FACTORS[0] + chunk
        for factor in _HASH_FACTORS[1:]:
            mixed ^= (mixed >> 32) & 0xFFFFFFFF  # the mask: torch shifts signed numbers, and would copy the sign
            mixed *= factor
        mixed ^= (mixed >> 32) & 0xFFFFFFFF
        total += mixed.sum()
    return total


def check_replicas(model: nn.Module, ranks: Ranks, *, num_groups: int = 1) -> None:
    """Raises ReplicaMismatch on all ranks, naming what differs, unless all hold the same model bit for bit.

    `num_groups`: of consecutive ranks over which sharded tensors are divided; those that hold the same part of them
    are compared.
    """
    if ranks.world_size == 1:
        return
    tensors = replicated_tensors(model)
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    found = ranks.all_gather(torch.stack([digest(tensor) for tensor in local]))  # (ranks, tensors)
    sharded = torch.tensor([isinstance(tensor, DTensor) for tensor in tensors.values()], device=found.device)
    group_size = ranks.world_size // num_groups
    alike = [(list(range(ranks.world_size)), ~sharded)]
    alike += [(list(range(part, ranks.world_size, group_size)), sharded) for part in range(group_size)]
    differing, said = torch.zeros_like(sharded), []
    for members, of_these in alike:
        if (differs := (found[members] != found[members[0]]).any(0) & of_these).any():
            differing |= differs
            said.append(_who_differs(found[members][:, of_these], members))
    if not said:
        return
    names = [name for name, differs in zip(tensors, differing.tolist(), strict=True) if differs]
    more = f" and {len(names) - 8} others" if len(names) > 8 else ""
    raise ReplicaMismatch(
        f"the ranks no longer hold the same model: {', '.join(names[:8])}{more} differ ({', '.join(said)}); look for "
        "failing memory there, and go on from the last checkpoint"
    )


def _who_differs(found: Tensor, members: list[int]) -> str:
    """Which of `members` (ranks) have other values, by what was found on each, (members, tensors)."""
    # The values that most ranks have are taken for the right ones.
    usual = found.mode(dim=0).values
    if not (2 * (found == usual).sum(0) > len(found)).all():
        return f"between ranks {', '.join(map(str, members))}; too few to tell which is right"
    odd = [rank for rank, row in zip(members, found, strict=True) if (row != usual).any()]
    return f"rank {', '.join(map(str, odd))} from the others"


# ---------------------------------------------------------------- saving, alike in all engines


def engine_state(name: str, step: int, controller: Controller, state: ShardedState) -> dict[str, Any]:
    """What an engine of that name saves beside tensors, as JSON. Collective."""
    return {"engine": name, "step": step, "controller": controller.state_dict(), LAYOUT: state.layout()}


def take_back(
    checkpoint: Checkpoint,
    model: nn.Module,
    controller: Controller,
    state: ShardedState,
    *,
    device: torch.device,
    seed: int,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Restores model, re-initializations, optimizer and random state from a checkpoint of any engine. Collective.

    Returns the random tensors that were saved of this rank. `dtype`: as of `load_model`. Raises CheckpointError or
    ValueError for a checkpoint that does not fit.
    """
    controller.load_state_dict(checkpoint.metadata["engine_state"]["controller"])  # first: it may refuse
    load_model(model, checkpoint, dtype=dtype)
    controller.check_originals()
    state.restore(checkpoint)
    return restore_random(checkpoint, controller.ranks, device, seed)


# ---------------------------------------------------------------- random states


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """torch's random state, of the CPU and of the device."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_random(checkpoint: Checkpoint, ranks: Ranks, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Restores this rank's `random_tensors`, the device's part only where it was saved on such a device; a rank that
    was not there is seeded anew. Returns all that was saved of this rank."""
    if ranks.rank >= checkpoint.num_parts("random"):
        torch.manual_seed(layer_seed(seed, checkpoint.step, f"rank {ranks.rank}"))
        return {}
    tensors = checkpoint.tensors("random", ranks.rank)
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
    return tensors
