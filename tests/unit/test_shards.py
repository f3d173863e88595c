"""Shards of trained state: by parameter name, on disk, and from one layout to another.

References: whole parameters and moments put together here, in numpy and float64, from the layout, the codes, the tables
and the absmax of each block of 256. Ranks are threads; optimizers are torch's and bitsandbytes' own, after real steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from helpers import as_ranks, relative
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from loqt_ds.config import LoQTConfig, OptimConfig
from loqt_ds.engines.base import ReplicaMismatch
from loqt_ds.engines.state import (
    ShardedFactors,
    check_replicas,
    digest,
    load_model,
    model_tensors,
    own_part,
    replicated_tensors,
    restore_random,
)
from loqt_ds.method.conversion import convert
from loqt_ds.optim import ParameterOptimizer
from loqt_ds.ranks import ALONE, Ranks
from loqt_ds.shards import Fragment, Shard, ShardedState, saved_masters

BLOCK = 256
KINDS = ("adamw", "adamw8bit", "adamw8bit-small")
Array = np.ndarray[Any, Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- layouts


def optimizer_of(kind: str, tensor: Tensor) -> torch.optim.Optimizer:
    """adamw: 32 bits. adamw8bit: 8 bits from 300 elements on. adamw8bit-small: bitsandbytes' own 32 bits."""
    if kind == "adamw":
        return torch.optim.AdamW([tensor], lr=0.01)
    size = 300 if kind == "adamw8bit" else 10**9
    return bitsandbytes.optim.AdamW8bit([tensor], lr=0.01, min_8bit_size=size)


@dataclass
class Layout:
    """Parameters in groups, each group one flat vector, cut anywhere: piece i is rank i's shard of the group."""

    shapes: dict[str, tuple[int, ...]]
    groups: list[list[str]]
    cuts: list[list[int]]  # of each group, world_size + 1 of them
    world_size: int

    def fragments(self, group: int, rank: int) -> tuple[Fragment, ...]:
        """Written out element by element: whose number `start + i` of the flat vector is."""
        owners = [(name, i) for name in self.groups[group] for i in range(int(np.prod(self.shapes[name])))]
        first, last = self.cuts[group][rank], self.cuts[group][rank + 1]
        found: dict[str, list[int]] = {}
        for offset, (name, index) in enumerate(owners[first:last]):
            if name in found:
                found[name][1] += 1
            else:
                found[name] = [index, 1, offset]
        return tuple(Fragment(name, *numbers) for name, numbers in found.items())

    def size(self, group: int) -> int:
        """Elements of the group's parameters, without padding."""
        return sum(int(np.prod(self.shapes[name])) for name in self.groups[group])

    def length(self, group: int, rank: int) -> int:
        return self.cuts[group][rank + 1] - self.cuts[group][rank]


def random_layout(seed: int, world_size: int, *, padded: bool = False) -> Layout:
    """Parameters of odd sizes; cuts anywhere, or equal pieces with padding at the end, as ZeRO makes them."""
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "a.B": (int(draw.integers(20, 40)), 7),
        "b.B": (7, int(draw.integers(40, 90))),
        "c.B": (int(draw.integers(1, 9)), 7),
        "d.B": (7, int(draw.integers(100, 160))),
        "embed": (61, int(draw.integers(9, 30))),
        "norm": (int(draw.integers(1, 40)),),
    }
    return cut_anew(shapes, seed, world_size, padded=padded)


def cut_anew(shapes: dict[str, tuple[int, ...]], seed: int, world_size: int, *, padded: bool) -> Layout:
    draw = np.random.default_rng(1000 + seed)
    names = list(shapes)
    groups = [["a.B", "b.B", "c.B", "d.B"], ["embed", "norm"]]
    if not padded and seed % 2:
        groups = [names]  # all in one
    cuts = []
    for group in groups:
        total = sum(int(np.prod(shapes[name])) for name in group)
        if padded:
            piece = -(-total // world_size)
            cuts.append([piece * i for i in range(world_size + 1)])
        else:
            inner = sorted(int(x) for x in draw.integers(1, total, world_size - 1))
            cuts.append([0, *inner, total])
    return Layout(shapes, groups, cuts, world_size)


@dataclass
class Member:
    """One rank's parameters, shards and optimizers of a layout, after some steps."""

    layout: Layout
    ranks: Ranks
    parameters: dict[str, nn.Parameter]
    shards: list[Shard]
    state: ShardedState = field(init=False)

    def __post_init__(self) -> None:
        self.state = ShardedState(self.shards, self.parameters, ranks=self.ranks)

    def step(self, seed: int) -> None:
        """An update of every shard by its own optimizer; the gradient of an element depends on its place alone, and is
        zero for padding."""
        for shard in self.shards:
            group, rank = map(int, shard.key.split("."))
            gradient = random(100_000, seed=1000 * seed + group)[: self.layout.size(group)]
            piece = gradient[self.layout.cuts[group][rank] : self.layout.cuts[group][rank + 1]]
            shard.slot.grad = nn.functional.pad(piece, (0, shard.values.numel() - piece.numel()))
            shard.optimizer.step()
            shard.slot.grad = None


def member(
    layout: Layout, ranks: Ranks, kind: str, *, num_steps: int = 2, dtype: torch.dtype = torch.float32
) -> Member:
    """The values of a group are one draw, whatever the cuts are; so the ranks' parameters are the same."""
    sizes = [layout.size(group) for group in range(len(layout.groups))]
    flats = [
        nn.functional.pad(random(size, seed=group), (0, layout.cuts[group][-1] - size))
        for group, size in enumerate(sizes)
    ]
    parameters: dict[str, nn.Parameter] = {}
    for flat, group in zip(flats, layout.groups, strict=True):
        start = 0
        for name in group:
            size = int(np.prod(layout.shapes[name]))
            value = flat[start : start + size].reshape(layout.shapes[name])
            parameters[name] = nn.Parameter(value.to(dtype).clone())
            start += size
    shards = []
    for group, flat in enumerate(flats):
        first, last = layout.cuts[group][ranks.rank], layout.cuts[group][ranks.rank + 1]
        values = nn.Parameter(flat[first:last].clone())
        shards.append(
            Shard(
                f"{group}.{ranks.rank}",
                layout.fragments(group, ranks.rank),
                values,
                values,
                optimizer_of(kind, values),
                True,
            )
        )
    one = Member(layout, ranks, parameters, shards)
    for step in range(num_steps):
        one.step(step)
    return one


# ---------------------------------------------------------------- references


def flat_moment(shard: Shard, index: int) -> Array:
    """A shard's moment in float64: itself, or table[code] · absmax of the block of 256."""
    state = shard.optimizer.state[shard.slot]
    if "exp_avg" in state:
        return state[("exp_avg", "exp_avg_sq")[index]].reshape(-1).double().numpy().copy()
    number = index + 1
    stored = state[f"state{number}"].reshape(-1)
    if stored.dtype != torch.uint8:
        return stored.double().numpy().copy()
    table, absmax = state[f"qmap{number}"].double().numpy(), state[f"absmax{number}"].double().numpy()
    return table[stored.numpy()] * np.repeat(absmax, BLOCK)[: stored.numel()]


def whole(members: list[Member], name: str, index: int | None) -> Array:
    """A parameter's master (None) or moment, put together from all ranks, in float64 and in its shape."""
    result = np.full(int(np.prod(members[0].layout.shapes[name])), np.nan)
    for one in members:
        for shard in one.shards:
            flat = shard.values.detach().double().numpy() if index is None else flat_moment(shard, index)
            for f in shard.fragments:
                if f.name == name:
                    result[f.start : f.start + f.length] = flat[f.offset : f.offset + f.length]
    assert not np.isnan(result).any()
    return result.reshape(members[0].layout.shapes[name])


def check_nearest(shard: Shard, index: int, wanted: Array, blocks: range) -> None:
    """The codes of these blocks are the nearest to `wanted` (of the whole shard) under the absmax of each block."""
    number = index + 1
    state = shard.optimizer.state[shard.slot]
    codes, absmax = state[f"state{number}"].reshape(-1).numpy(), state[f"absmax{number}"].numpy()
    table = state[f"qmap{number}"].double().numpy()
    for block in blocks:
        values = wanted[block * BLOCK : (block + 1) * BLOCK]
        largest = np.abs(values).max()
        assert absmax[block] == pytest.approx(largest, rel=1e-6)
        scaled = values / max(largest, 1e-300)
        stored = table[codes[block * BLOCK : block * BLOCK + values.size]]
        nearest = np.abs(scaled[:, None] - table[None, :]).min(1)
        # the search decides between two neighbours in float32
        assert (np.abs(stored - scaled) <= nearest + 1e-6).all()


def one_shard(kind: str, length: int, fragments: list[Fragment]) -> Shard:
    """A shard after two steps of its optimizer."""
    values = nn.Parameter(random(length))
    optimizer = optimizer_of(kind, values)
    for step in range(2):
        values.grad = random(length, seed=step + 1)
        optimizer.step()
    values.grad = None
    return Shard("key", tuple(fragments), values, values, optimizer, True)


# ---------------------------------------------------------------- one shard

FRAGMENTS = [
    Fragment("first", 0, 100, 0),
    Fragment("one-block", 5, 256, 256),
    Fragment("straddles", 3, 30, 500),
    Fragment("several", 0, 700, 530),
    Fragment("single", 9, 1, 1279),
    Fragment("tail", 0, 53, 1280),
]
LENGTH = 1333  # five blocks of 256 and one of 53


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda f: f.name)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_moment_is_read_from_its_place(kind: str, index: int, fragment: Fragment) -> None:
    shard = one_shard(kind, LENGTH, [fragment])
    expected = flat_moment(shard, index)[fragment.place]
    assert expected.any()
    found = shard.read_moment(fragment, index)
    assert found.dtype == torch.float32 and found.shape == (fragment.length,)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=0)
    found.fill_(7.0)
    np.testing.assert_array_equal(flat_moment(shard, index)[fragment.place], expected)  # it was a copy


@pytest.mark.parametrize("scale", [1e-6, 1.0], ids=["smaller", "larger"])
@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda f: f.name)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_writing_a_moment_touches_only_the_blocks_it_must(
    kind: str, index: int, fragment: Fragment, scale: float
) -> None:
    """With values larger than the neighbours', whose blocks then get a new absmax, and smaller ones."""
    shard = one_shard(kind, LENGTH, [fragment])
    state = shard.optimizer.state[shard.slot]
    before = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
    identities = {key: id(value) for key, value in state.items() if isinstance(value, Tensor)}
    new = random(fragment.length, seed=9).abs() * scale
    expected = flat_moment(shard, index)
    expected[fragment.place] = new.double().numpy()
    shard.write_moment(fragment, index, new)
    assert {key: id(value) for key, value in state.items() if isinstance(value, Tensor)} == identities, "in place"
    keys = ("exp_avg", "exp_avg_sq") if kind == "adamw" else ("state1", "state2")
    changed = {key for key, value in before.items() if not torch.equal(state[key], value)}
    if kind != "adamw8bit":
        assert changed == {keys[index]}
        np.testing.assert_array_equal(flat_moment(shard, index), expected)
        return
    number = index + 1
    assert changed <= {keys[index], f"absmax{number}"} and keys[index] in changed
    first, last = fragment.offset // BLOCK, -(-(fragment.offset + fragment.length) // BLOCK)
    outside = np.ones(LENGTH, bool)
    outside[first * BLOCK : last * BLOCK] = False
    codes = state[keys[index]].numpy()
    assert (codes[outside] == before[keys[index]].numpy()[outside]).all()
    assert (
        np.delete(state[f"absmax{number}"].numpy(), np.s_[first:last])
        == np.delete(before[f"absmax{number}"].numpy(), np.s_[first:last])
    ).all()
    check_nearest(shard, index, expected, range(first, last))


@pytest.mark.parametrize("kind", KINDS)
def test_a_moment_of_zero_is_read_as_zero(kind: str) -> None:
    """Adam divides one moment by the root of the other: tiny by tiny would move what has no gradient."""
    shard = one_shard(kind, LENGTH, FRAGMENTS)
    for fragment in FRAGMENTS:
        for index in (0, 1):
            shard.write_moment(fragment, index, torch.zeros(fragment.length))
            assert not shard.read_moment(fragment, index).any()
    for fragment in FRAGMENTS:
        assert not shard.read_moment(fragment, 0).any() and not shard.read_moment(fragment, 1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_moment_written_back_changes_no_code(kind: str) -> None:
    shard = one_shard(kind, LENGTH, FRAGMENTS)
    for index in (0, 1):
        for fragment in FRAGMENTS:
            shard.write_moment(fragment, index, shard.read_moment(fragment, index))
    first = [flat_moment(shard, index) for index in (0, 1)]
    for index in (0, 1):
        for fragment in FRAGMENTS:
            shard.write_moment(fragment, index, shard.read_moment(fragment, index))
    for index in (0, 1):
        # A block whose largest entry is negative loses 0.7 %: bitsandbytes' signed map ends at -0.993.
        np.testing.assert_allclose(flat_moment(shard, index), first[index], rtol=0.008 * 3)


def test_values_are_read_and_written_in_place_and_in_float32() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = random(4, 25).to(dtype)
        before = values.clone().view(-1)
        fragment = Fragment("x", 3, 30, 11)
        shard = Shard("key", (fragment,), values, values, torch.optim.AdamW([nn.Parameter(values)]), True)
        assert shard.read(fragment).dtype == torch.float32
        assert torch.equal(shard.read(fragment), before[11:41].float())
        new = random(30, seed=2)
        shard.write(fragment, new)
        before[11:41] = new.to(dtype)
        assert torch.equal(values.view(-1), before)
    assert (fragment.place, fragment.source) == (slice(11, 41), slice(3, 33))


# ---------------------------------------------------------------- by name, over ranks

LAYOUTS = [(seed, world_size, padded) for seed, world_size in enumerate((1, 2, 3, 4, 2, 3)) for padded in (False, True)]


def test_the_layouts_are_hard_ones() -> None:
    straddling = cut = pieces = missing = padding = 0
    for seed, world_size, padded in LAYOUTS:
        layout = random_layout(seed, world_size, padded=padded)
        for group in range(len(layout.groups)):
            for rank in range(world_size):
                fragments = layout.fragments(group, rank)
                pieces += len(fragments)
                straddling += sum(f.offset % BLOCK != 0 for f in fragments)
                cut += sum(f.length < np.prod(layout.shapes[f.name]) for f in fragments)
                missing += len(layout.groups[group]) - len(fragments)
                padding += sum(f.length for f in fragments) < layout.length(group, rank)
    assert straddling > 30 and cut > 20 and missing > 20 and padding > 0 and pieces > 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "world_size", "padded"), LAYOUTS)
def test_masters_and_moments_are_put_together_on_their_target(
    seed: int, world_size: int, padded: bool, kind: str
) -> None:
    layout = random_layout(seed, world_size, padded=padded)
    names = list(layout.shapes)

    def read(ranks: Ranks) -> tuple[Member, list[Any], dict[str, Tensor]]:
        one = member(layout, ranks, kind)
        found = []
        for number, name in enumerate(names):
            target = number % world_size
            read = [one.state.read(name, target)] + [one.state.moment(name, index, target) for index in (0, 1)]
            assert all((tensor is None) == (ranks.rank != target) for tensor in read)
            found.append(read)
            assert one.state.has_moments(name)
        return one, found, one.state.masters()

    results = as_ranks(world_size, read)
    members = [result[0] for result in results]
    for number, name in enumerate(names):
        for position, index in enumerate((None, 0, 1)):
            tensor = results[number % world_size][1][number][position]
            assert tensor.shape == layout.shapes[name] and tensor.dtype == torch.float32
            np.testing.assert_allclose(tensor.detach().double(), whole(members, name, index), rtol=1e-6, atol=0)
    assert set(results[0][2]) == set(names) and all(result[2] == {} for result in results[1:])
    for name, tensor in results[0][2].items():
        assert (tensor.detach().double().numpy() == whole(members, name, None)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "world_size", "padded"), LAYOUTS[2:8])
def test_what_is_written_by_name_is_there_on_all_ranks(seed: int, world_size: int, padded: bool, kind: str) -> None:
    layout = random_layout(seed, world_size, padded=padded)
    name = "b.B"
    value, first = random(*layout.shapes[name][::-1], seed=5).t(), random(*layout.shapes[name][::-1], seed=6).t()
    second = first.square()
    assert not value.is_contiguous()  # what a layer on the left side hands over

    before = as_ranks(world_size, lambda ranks: member(layout, ranks, kind, dtype=torch.bfloat16))

    def write(ranks: Ranks) -> Member:
        one = member(layout, ranks, kind, dtype=torch.bfloat16)
        storage = one.parameters[name].data_ptr()
        one.state.write(name, value)
        one.state.write_moments(name, first, second)
        assert one.parameters[name].data_ptr() == storage
        return one

    after = as_ranks(world_size, write)
    for other in layout.shapes:
        expected = value.double().numpy() if other == name else whole(before, other, None)
        assert (whole(after, other, None) == expected).all()  # masters are exact
        for one, old in zip(after, before, strict=True):
            shown = value.to(torch.bfloat16) if other == name else old.parameters[other]
            assert torch.equal(one.parameters[other], shown)
    for one, old in zip(after, before, strict=True):
        for shard, untouched in zip(one.shards, old.shards, strict=True):
            for index, moment in enumerate((first, second)):
                wanted, blocks = flat_moment(untouched, index), range(0)
                for f in shard.fragments:
                    if f.name == name:
                        wanted[f.place] = moment.reshape(-1).double().numpy()[f.source]
                        blocks = range(f.offset // BLOCK, -(-(f.offset + f.length) // BLOCK))
                if f"absmax{index + 1}" in shard.state:
                    check_nearest(shard, index, wanted, blocks)
                    outside = np.delete(np.arange(wanted.size), np.s_[blocks.start * BLOCK : blocks.stop * BLOCK])
                    assert (flat_moment(shard, index)[outside] == wanted[outside]).all()
                else:
                    np.testing.assert_array_equal(flat_moment(shard, index), wanted)
    for one in after:
        assert all(int(shard.state["step"]) == 2 for shard in one.shards), "the step count stays"


@pytest.mark.parametrize("kind", KINDS)
def test_resetting_all_is_a_new_optimizer(kind: str) -> None:
    layout = random_layout(3, 2, padded=True)

    def train(ranks: Ranks) -> list[list[Tensor]]:
        used, fresh = member(layout, ranks, kind), member(layout, ranks, kind, num_steps=0)
        assert not any(fresh.state.has_moments(name) for name in layout.shapes)
        values = [shard.values.detach().clone() for shard in used.shards]
        for name in layout.shapes:
            used.state.reset_moments(name)
            fresh.state.reset_moments(name)  # nothing to reset
        assert not any(fresh.state.has_moments(name) for name in layout.shapes)
        for one in (used, fresh):
            for shard, value in zip(one.shards, values, strict=True):
                shard.values.data.copy_(value)
            one.step(5)
            one.step(6)
        held = [slice(0, shard.fragments[-1].place.stop) for shard in used.shards]  # all but the padding
        return [
            [shard.values.detach()[place] for shard, place in zip(one.shards, held, strict=True)]
            for one in (used, fresh)
        ]

    for used, fresh in as_ranks(2, train):
        assert all(torch.equal(one, other) for one, other in zip(used, fresh, strict=True))


def test_factors_are_addressed_by_their_layers() -> None:
    layout = random_layout(0, 1)
    one = member(layout, ALONE, "adamw")
    store = ShardedFactors(one.state)
    assert torch.equal(store.read("b"), one.state.read("b.B")) and store.has_moments("b")
    assert torch.equal(store.moment("b", 1), one.state.moment("b.B", 1))
    value = random(*layout.shapes["b.B"], seed=4)
    store.write("b", value)
    assert torch.equal(one.parameters["b.B"], value) and torch.equal(one.state.read("b.B"), value)
    store.set_moments("b", value, value.square())
    assert torch.equal(one.state.moment("b.B", 0), value) and torch.equal(store.moment("b", 1), value.square())
    store.reset_moments("b")
    assert not store.moment("b", 0).any() and store.moment("a", 0).any()


# ---------------------------------------------------------------- saved and restored


def save(root: Path, members: list[Member], *, without: str = "\0") -> Checkpoint:
    """Every rank writes its own part; tensors whose name contains `without` are left out."""

    def write(ranks: Ranks) -> Path:
        one = members[ranks.rank]
        one.state._ranks = ranks
        tensors = {name: tensor for name, tensor in one.state.saved().items() if without not in name}
        metadata = {"engine_state": {"shards": one.state.layout()}}
        return save_checkpoint(root, 7, tensors={"optimizer": tensors}, metadata=metadata, keep=0, ranks=ranks)

    return load_checkpoint(as_ranks(len(members), write)[0])


def trained(layout: Layout, kind: str, **options: Any) -> list[Member]:
    return as_ranks(layout.world_size, lambda ranks: member(layout, ranks, kind, **options))


def restored(checkpoint: Checkpoint, layout: Layout, kind: str, **options: Any) -> list[Member]:
    """Members of a layout with another state, which took back what the checkpoint holds."""

    def read(ranks: Ranks) -> Member:
        one = member(layout, ranks, kind, num_steps=3, **options)
        one.state.restore(checkpoint)
        return one

    return as_ranks(layout.world_size, read)


def assert_same_state(one: Shard, other: Shard) -> None:
    assert torch.equal(one.values, other.values)
    state, expected = one.optimizer.state[one.slot], other.optimizer.state[other.slot]
    assert set(state) == set(expected)
    for key, value in expected.items():
        assert type(state[key]) is type(value), key
        assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "world_size", "padded"), LAYOUTS[1:8:2] + LAYOUTS[4:5])
def test_the_same_layout_goes_on_bit_for_bit(
    seed: int, world_size: int, padded: bool, kind: str, num_steps: int, tmp_path: Path
) -> None:
    layout = random_layout(seed, world_size, padded=padded)
    expected = trained(layout, kind, num_steps=num_steps)
    found = restored(save(tmp_path, expected), layout, kind)
    for _ in range(2):
        for one, other in zip(found, expected, strict=True):
            for shard, wanted in zip(one.shards, other.shards, strict=True):
                assert_same_state(shard, wanted)
            one.step(8)
            other.step(8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "world_size", "padded"), LAYOUTS[:8])
@pytest.mark.parametrize("new_size", [1, 2, 4])
def test_another_layout_keeps_masters_exactly_and_moments_to_their_bits(
    seed: int, world_size: int, padded: bool, kind: str, new_size: int, tmp_path: Path
) -> None:
    layout = random_layout(seed, world_size, padded=padded)
    expected = trained(layout, kind)
    checkpoint = save(tmp_path, expected)
    new = cut_anew(layout.shapes, seed + 41, new_size, padded=padded)
    found = restored(checkpoint, new, kind)
    for name in layout.shapes:
        np.testing.assert_array_equal(whole(found, name, None), whole(expected, name, None))
    check_moments(found, expected, exact=kind != "adamw8bit" or new == layout)
    assert all(int(shard.state["step"]) == 2 for one in found for shard in one.shards if shard.fragments)
    for one in found:
        one.step(9)  # what was restored is a state that the optimizer can go on from


def check_moments(found: list[Member], expected: list[Member], *, exact: bool) -> None:
    """Those of the new shards are the old ones, put together in float64; in 8 bits in the nearest codes."""
    for index in (0, 1):
        old = {name: whole(expected, name, index).reshape(-1) for name in expected[0].layout.shapes}
        for one in found:
            for shard in one.shards:
                if not shard.fragments:
                    continue
                wanted = np.zeros(shard.values.numel())
                for f in shard.fragments:
                    wanted[f.place] = old[f.name][f.source]
                if exact:
                    for f in shard.fragments:  # bitsandbytes' own code of a zero, here of padding, is not quite zero
                        np.testing.assert_array_equal(flat_moment(shard, index)[f.place], wanted[f.place])
                elif "absmax1" in shard.state:
                    check_nearest(shard, index, wanted, range(-(-wanted.size // BLOCK)))
                else:  # a shard below the size from which on moments are in 8 bits
                    np.testing.assert_allclose(flat_moment(shard, index), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("saved", "kind"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_another_kind_of_adam_takes_the_moments_over(saved: str, kind: str, tmp_path: Path) -> None:
    layout = random_layout(2, 2)
    expected = trained(layout, saved)
    found = restored(save(tmp_path, expected), random_layout(2, 2, padded=True), kind)
    for name in layout.shapes:
        np.testing.assert_array_equal(whole(found, name, None), whole(expected, name, None))
    check_moments(found, expected, exact=False)
    for one in found:
        one.step(9)


def test_a_rank_that_holds_nothing_of_a_group_saves_and_restores(tmp_path: Path) -> None:
    """More ranks than elements: the last ones have padding only."""
    shapes: dict[str, tuple[int, ...]] = {name: (11, 7) for name in ("a.B", "b.B", "c.B", "d.B")}
    shapes |= {"embed": (1, 1), "norm": (1,)}
    layout = cut_anew(shapes, 0, 4, padded=True)
    assert layout.fragments(1, 3) == () and layout.length(1, 3) == 1
    expected = trained(layout, "adamw")
    checkpoint = save(tmp_path, expected)
    again = restored(checkpoint, layout, "adamw")
    for one, other in zip(again, expected, strict=True):
        for shard, wanted in zip(one.shards, other.shards, strict=True):
            assert_same_state(shard, wanted)
    for size in (1, 3):
        found = restored(checkpoint, cut_anew(shapes, 0, size, padded=True), "adamw")
        for name in shapes:
            np.testing.assert_array_equal(whole(found, name, None), whole(expected, name, None))
        check_moments(found, expected, exact=True)


def test_a_shard_of_several_step_counts_takes_the_smallest(tmp_path: Path) -> None:
    """Its first steps are then too small, and not too large."""
    layout = random_layout(2, 3)
    members = trained(layout, "adamw")
    for number, one in enumerate(members):
        one.shards[0].set_step(20 + number)
        one.shards[1].set_step(5)
    for kind in ("adamw", "adamw8bit"):
        (one,) = restored(save(tmp_path / kind, members), cut_anew(layout.shapes, 2, 1, padded=True), kind)
        assert [int(shard.state["step"]) for shard in one.shards] == [20, 5]
    wide = restored(save(tmp_path / "wide", members), layout, "adamw")
    assert [[int(shard.state["step"]) for shard in one.shards] for one in wide] == [[20, 5], [21, 5], [22, 5]]


def test_before_the_first_step_there_is_no_state_to_restore(tmp_path: Path) -> None:
    layout = random_layout(2, 2)
    checkpoint = save(tmp_path, trained(layout, "adamw8bit", num_steps=0))
    for one in restored(checkpoint, random_layout(2, 2, padded=True), "adamw8bit"):
        assert not any(shard.state for shard in one.shards)
        assert not any(one.state.has_moments(name) for name in layout.shapes)


@pytest.mark.parametrize("same", [True, False])
def test_a_parameter_without_a_saved_master_is_the_models(same: bool, tmp_path: Path) -> None:
    """The model has been loaded before; a checkpoint of an engine without masters says nothing more."""
    layout = random_layout(2, 2)
    checkpoint = save(tmp_path, trained(layout, "adamw"), without="/master")
    new = layout if same else random_layout(2, 2, padded=True)
    found = restored(checkpoint, new, "adamw", dtype=torch.bfloat16)
    for name, parameter in found[0].parameters.items():
        np.testing.assert_array_equal(whole(found, name, None), parameter.detach().double().numpy())
    check_moments(found, trained(layout, "adamw"), exact=True)


def test_a_checkpoint_of_other_parameters_is_refused_on_all_ranks(tmp_path: Path) -> None:
    layout = random_layout(2, 2)
    checkpoint = save(tmp_path, trained(layout, "adamw"))
    shapes = {("z.B" if name == "c.B" else name): shape for name, shape in layout.shapes.items()}
    new = Layout(shapes, [["a.B", "b.B", "z.B", "d.B"], ["embed", "norm"]], layout.cuts, 2)

    def read(ranks: Ranks) -> str:
        with pytest.raises(CheckpointError, match="another model") as caught:
            member(new, ranks, "adamw").state.restore(checkpoint)
        return str(caught.value)

    assert all("c.B" in message and str(checkpoint.path) in message for message in as_ranks(2, read))


def test_masters_of_a_checkpoint_come_whole(tmp_path: Path) -> None:
    layout = random_layout(5, 3, padded=True)
    members = trained(layout, "adamw8bit", dtype=torch.bfloat16)
    shapes = {name: torch.Size(shape) for name, shape in layout.shapes.items()}
    checkpoint = save(tmp_path / "with", members)
    found = saved_masters(checkpoint, shapes)
    assert set(found) == set(shapes)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.shape == shapes[name]
        np.testing.assert_array_equal(tensor.double().numpy(), whole(members, name, None))
    assert saved_masters(save(tmp_path / "without", members, without="/master"), shapes) == {}
    shapes.pop("embed")
    with pytest.raises(CheckpointError, match="embed") as caught:
        saved_masters(checkpoint, shapes)
    assert str(checkpoint.path) in str(caught.value)


def test_restored_tensors_do_not_hold_the_checkpoint(tmp_path: Path) -> None:
    """A mapped file would keep its disk space after rotation has deleted it."""
    layout = random_layout(2, 1)
    checkpoint = save(tmp_path, trained(layout, "adamw8bit"))
    (one,) = restored(checkpoint, layout, "adamw8bit")
    for file in checkpoint.path.glob("*.safetensors"):
        file.write_bytes(b"\xff" * file.stat().st_size)  # through a mapping, this would be seen
    for shard, wanted in zip(one.shards, trained(layout, "adamw8bit")[0].shards, strict=True):
        assert_same_state(shard, wanted)


# ---------------------------------------------------------------- replicas


def replicated(ranks: Ranks, kind: str, num_steps: int, *, masters: bool = True) -> ShardedState:
    """Three parameters that every rank has whole, each its own shard."""
    parameters, shards = {}, []
    for number, name in enumerate(("x.B", "y.B", "norm")):
        value = random(20 + number, 31, seed=number)
        parameters[name] = nn.Parameter(value.to(torch.bfloat16) if masters else value.clone())
        values = nn.Parameter(value.clone()) if masters else parameters[name]
        optimizer = optimizer_of(kind, values)
        for step in range(num_steps):
            values.grad = random(20 + number, 31, seed=10 * step + number)
            optimizer.step()
        values.grad = None
        shards.append(Shard(name, (Fragment(name, 0, value.numel(), 0),), values, values, optimizer, masters))
    return ShardedState(shards, parameters, ranks=ranks, num_replicas=ranks.world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_of_replicas_each_rank_saves_some_and_all_take_back_all(kind: str, world_size: int, tmp_path: Path) -> None:
    def write(ranks: Ranks) -> tuple[Path, set[str]]:
        state = replicated(ranks, kind, 2)
        name = "y.B"
        target = ranks.world_size - 1
        for tensor in (state.read(name, target), state.moment(name, 0, target), state.moment(name, 1, target)):
            assert (tensor is not None) == (ranks.rank == target)
        assert (set(state.masters()) == {"x.B", "y.B", "norm"}) == ranks.is_main
        saved = state.saved()
        metadata = {"engine_state": {"shards": state.layout()}}
        path = save_checkpoint(tmp_path, 3, tensors={"optimizer": saved}, metadata=metadata, keep=0, ranks=ranks)
        return path, {name.rpartition("/")[0] for name in saved}

    results = as_ranks(world_size, write)
    owned = [names for _, names in results]
    assert sum(map(len, owned)) == 3 and set.union(*owned) == {"x.B", "y.B", "norm"}
    assert max(map(len, owned)) == -(-3 // world_size)
    checkpoint = load_checkpoint(results[0][0])
    expected = replicated(ALONE, kind, 2)
    for new_size in (1, world_size, 3):

        def read(ranks: Ranks) -> ShardedState:
            state = replicated(ranks, kind, 1)
            state.restore(checkpoint)
            return state

        for state in as_ranks(new_size, read):
            for shard, wanted in zip(state.shards, expected.shards, strict=True):
                if new_size == world_size:
                    assert_same_state(shard, wanted)
                else:
                    assert torch.equal(shard.values, wanted.values)
                    assert shard.state["step"] == wanted.state["step"]
                    fragment = shard.fragments[0]
                    for index in (0, 1):
                        ours = shard.read_moment(fragment, index)
                        assert relative(ours, wanted.read_moment(fragment, index)) < 0.02


def test_parameters_that_are_their_own_masters_have_none(tmp_path: Path) -> None:
    state = replicated(ALONE, "adamw", 1, masters=False)
    assert state.masters() == {} and not any("/master" in name for name in state.saved())
    value = random(20, 31, seed=77)
    state.write("x.B", value)
    assert torch.equal(state.read("x.B"), value) and torch.equal(state._parameters["x.B"], value)


# ---------------------------------------------------------------- one parameter with its own optimizer


def item_of(
    name: str, master: str, shape: tuple[int, ...], *, seed: int = 0
) -> tuple[ParameterOptimizer, ShardedState]:
    """`master`: fp32 or bf16, of a bf16 parameter; own: a float32 parameter."""
    parameter = nn.Parameter(random(*shape, seed=seed).to(torch.float32 if master == "own" else torch.bfloat16))
    optim = OptimConfig(name=name, master="fp32" if master == "own" else master)
    item = ParameterOptimizer(parameter, optim, weight_decay=0.0, generator=torch.Generator().manual_seed(0))
    is_copy = item.values is not parameter
    whole = (Fragment("w", 0, parameter.numel(), 0),)
    shard = Shard("w", whole, item.values, item.master, item.optimizer, is_copy)
    return item, ShardedState([shard], {"w": parameter})


def go_on(item: ParameterOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        item.parameter.grad = random(*item.parameter.shape, seed=step).to(item.parameter.dtype)
        item.step(0.01)


@pytest.mark.parametrize("master", ["own", "fp32", "bf16"])
def test_a_written_value_keeps_more_than_the_parameter_shows(master: str) -> None:
    item, state = item_of("adamw", master, (8, 8))
    value = random(8, 8, seed=5)
    state.write("w", value)
    expected = value.to(torch.bfloat16).float() if master == "bf16" else value
    found = state.read("w")
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(item.parameter, value.to(item.parameter.dtype))
    assert list(state.masters()) == (["w"] if master == "fp32" else [])
    before = item.values.detach().double()
    go_on(item, 0, 1)  # the step starts from what was written
    moved = (item.values.detach().double() - before).abs()
    assert 0.005 < float(moved.mean()) < 0.02 and float(moved.max()) < 0.03


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_reset_state_is_that_of_a_new_parameter(name: str) -> None:
    (used, state), (fresh, _) = item_of(name, "own", (80, 64)), item_of(name, "own", (80, 64))
    go_on(used, 0, 3)
    state.reset_moments("w")
    state.write("w", fresh.parameter.detach())
    go_on(used, 9, 12)
    go_on(fresh, 9, 12)
    assert torch.equal(used.parameter, fresh.parameter)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("master", ["fp32", "bf16", "own"])
@pytest.mark.parametrize("shape", [(6, 7), (80, 64)], ids=str)
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_saved_and_restored_state_goes_on_as_if_nothing_had_happened(
    name: str, master: str, shape: tuple[int, ...], num_steps: int, tmp_path: Path
) -> None:
    one, state = item_of(name, master, shape)
    go_on(one, 0, num_steps)
    metadata = {"engine_state": {"shards": state.layout()}}
    path = save_checkpoint(tmp_path, 1, tensors={"optimizer": state.saved()}, metadata=metadata, keep=0)
    weights, rng = one.parameter.detach().clone(), one._generator.get_state()
    go_on(one, num_steps, 6)

    two, other = item_of(name, master, shape, seed=50)
    go_on(two, 20, 22)  # some other state is overwritten
    two.parameter.data.copy_(weights)
    other.restore(load_checkpoint(path))
    two._generator.set_state(rng)
    go_on(two, num_steps, 6)
    assert torch.equal(one.parameter, two.parameter)
    assert_same_state(other.shards[0], state.shards[0])


# ---------------------------------------------------------------- what engines keep alike


@pytest.mark.parametrize(
    "tensor",
    [
        random(1),
        random(3, 5),
        random(7).to(torch.bfloat16),
        random(2, 2, 3).double(),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor(True),
        torch.randint(0, 255, (13,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
        torch.zeros(9),
        random(4, 6).t(),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_a_digest_tells_every_single_bit(tensor: Tensor) -> None:
    before = digest(tensor)
    assert before.shape == () and before.dtype == torch.int64
    assert digest(tensor.clone()) == before
    changed = tensor.contiguous().clone()
    raw = changed.view(-1).view(torch.uint8)
    seen = {before.item()}
    for byte in range(raw.numel()):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            seen.add(digest(changed).item())
            raw[byte] ^= 1 << bit
    assert digest(changed) == before
    assert len(seen) == 1 + 8 * raw.numel(), "nor do two single flips look alike"


def test_a_digest_of_nothing_and_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest(torch.empty(0)).item() == digest(torch.empty(0, 3, dtype=torch.bfloat16)).item()
    tensor = random(1003)
    expected = digest(tensor)
    for chunk in (1, 7, 64, 501):
        monkeypatch.setattr("loqt_ds.engines.state._HASH_CHUNK", chunk)
        assert digest(tensor) == expected


def test_a_digest_tells_words_that_change_places() -> None:
    draw = np.random.default_rng(0)
    tensor = random(400)
    before = digest(tensor)
    for _ in range(300):
        i, j = (int(x) for x in draw.choice(200, 2, replace=False))
        changed = tensor.clone()
        words = changed.view(torch.int64)
        words[[i, j]] = words[[j, i]]
        assert digest(changed) != before
        changed = tensor.clone()
        i, j = (int(x) for x in draw.choice(400, 2, replace=False))
        changed[[i, j]] = changed[[j, i]]
        assert digest(changed) != before


def test_a_digest_tells_two_flips_of_the_same_bit() -> None:
    """Two signs, say: with a plain weighted sum, 2^63 times two odd weights is nothing."""
    draw = np.random.default_rng(1)
    tensor = random(256)
    before = digest(tensor)
    for bit in range(64):
        for _ in range(8):
            i, j = (int(x) for x in draw.choice(128, 2, replace=False))
            changed = tensor.clone()
            words = changed.view(torch.int64)
            mask = -(2**63) if bit == 63 else 2**bit
            words[i] ^= mask
            words[j] ^= mask
            assert digest(changed) != before, bit
    for i, j in ((1, 3), (1, 255), (129, 131)):  # neighbours in memory whose only difference is the sign
        changed = tensor.clone()
        changed[[i, j]] *= -1
        assert digest(changed) != before


class Bag(nn.Module):
    """Parameters of random sizes, and a buffer that is not a LoQT layer's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = np.random.default_rng(seed)
        for number in range(int(draw.integers(1, 40))):
            self.register_parameter(f"p{number}", nn.Parameter(torch.zeros(int(draw.integers(0, 3000)))))
        self.register_buffer("mean", torch.zeros(50))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_parts_of_the_model_are_disjoint_complete_and_balanced(seed: int, world_size: int) -> None:
    model = Bag(seed)
    parts = as_ranks(world_size, lambda ranks: own_part(model, ranks))
    assert sum(map(len, parts)) == len(model.state_dict())
    assert {name for part in parts for name in part} == set(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[name]) for part in parts for name, t in part.items())
    assert parts[0].pop("mean") is not None  # may differ between ranks: rank 0's counts
    sizes = [sum(t.nbytes for t in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= max(p.nbytes for p in model.parameters())


def test_many_small_parts_make_up_for_a_large_one() -> None:
    model = nn.Module()
    for number, size in enumerate((10, 10, 10, 10, 40)):
        model.register_parameter(f"p{number}", nn.Parameter(torch.zeros(size)))
    parts = as_ranks(2, lambda ranks: own_part(model, ranks))
    assert [sum(t.numel() for t in part.values()) for part in parts] == [40, 40]


def small_model(seed: int) -> nn.Module:
    """Two LoQT layers, a norm, a shared parameter, a running mean, a buffer that is not saved."""
    model = nn.Sequential(nn.Linear(65, 34), nn.LayerNorm(34), nn.Linear(34, 65), nn.Linear(65, 65))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed + number))
    convert(model, LoQTConfig(rank=4, target_modules=["0", "2"]))
    model.shared = model[1].weight
    model.register_buffer("mean", random(9, seed=seed))
    model.register_buffer("rotary", torch.ones(3), persistent=False)
    return model


def test_a_model_is_saved_in_parts_and_loaded_whole(tmp_path: Path) -> None:
    model = small_model(0)
    assert set(model_tensors(model)) == set(model.state_dict()) - {"1.weight"}, "shared ones once"
    assert set(replicated_tensors(model)) == set(model_tensors(model)) - {"mean"}

    def write(ranks: Ranks) -> Path:
        mine = small_model(0)
        mine.mean.fill_(ranks.rank)
        tensors = {"model": own_part(mine, ranks)}
        return save_checkpoint(tmp_path, 1, tensors=tensors, metadata={}, keep=0, ranks=ranks)

    checkpoint = load_checkpoint(as_ranks(3, write)[0])
    assert checkpoint.num_parts("model") == 3
    other = small_model(50)
    load_model(other, checkpoint)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value) or name == "mean", name
    assert not other.mean.any() and other.shared is other[1].weight
    wider, fewer, more = small_model(0), small_model(0), small_model(0)
    wider[3] = nn.Linear(65, 66)
    del fewer[3]
    more.extra = nn.Parameter(torch.zeros(2))
    for changed, what in ((wider, "3."), (fewer, "3."), (more, "extra is in the model only")):
        with pytest.raises(CheckpointError, match="another model") as caught:
            load_model(changed, checkpoint)
        assert what in str(caught.value) and str(checkpoint.path) in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_replicas_that_differ_by_one_bit_are_named_with_their_rank(world_size: int) -> None:
    as_ranks(world_size, lambda ranks: check_replicas(small_model(0), ranks))
    if world_size == 1:
        return
    odd = world_size - 1

    def running_mean(ranks: Ranks) -> None:
        model = small_model(0)
        model.mean.fill_(ranks.rank)
        check_replicas(model, ranks)  # it is nobody's business here

    as_ranks(world_size, running_mean)
    for name in ("0.w_codes", "2.p_absmax", "2.B", "3.weight", "1.bias"):

        def flip(ranks: Ranks, name: str = name) -> str:
            model = small_model(0)
            if ranks.rank == odd:
                model_tensors(model)[name].view(-1).view(torch.uint8)[-1] ^= 128
            with pytest.raises(ReplicaMismatch) as caught:
                check_replicas(model, ranks)
            return str(caught.value)

        messages = as_ranks(world_size, flip)
        assert len(set(messages)) == 1 and f"same model: {name} differ" in messages[0]
        said = f"rank {odd} from the others" if world_size > 2 else "between ranks 0, 1; too few to tell which is right"
        assert said in messages[0]


def test_random_states_come_back_by_rank_and_new_ranks_are_seeded_apart(tmp_path: Path) -> None:
    states = [torch.Generator().manual_seed(40 + rank).get_state() for rank in range(2)]

    def write(ranks: Ranks) -> Path:
        tensors = {"random": {"torch": states[ranks.rank], "rounding_cpu": states[ranks.rank] + 0}}
        return save_checkpoint(tmp_path, 6, tensors=tensors, metadata={}, keep=0, ranks=ranks)

    checkpoint = load_checkpoint(as_ranks(2, write)[0])
    kept = torch.get_rng_state()
    try:
        seen = []
        for rank in range(4):
            ranks = Ranks()
            ranks.rank, ranks.world_size = rank, 4
            found = restore_random(checkpoint, ranks, torch.device("cpu"), seed=1)
            seen.append(torch.get_rng_state())
            assert set(found) == ({"torch", "rounding_cpu"} if rank < 2 else set())
            torch.manual_seed(0)
            restore_random(checkpoint, ranks, torch.device("cpu"), seed=1)
            assert torch.equal(torch.get_rng_state(), seen[-1]), "a function of the checkpoint, the seed and the rank"
        assert torch.equal(seen[0], states[0]) and torch.equal(seen[1], states[1])
        assert not any(torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))
    finally:
        torch.set_rng_state(kept)
