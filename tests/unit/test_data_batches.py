"""The global order of rows: all of them once an epoch, the same for every number of ranks, resumable anywhere."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_ds.data.batches import StoredSequence, TrainBatches, ValidationSet
from loqt_ds.data.errors import DataError
from loqt_ds.data.packing import IGNORED, PackedRows, collate

LENGTH = 3


class Store:
    """Tokens 0, 1, 2, ...: a token's value is its place, so that its coverage can be counted."""

    def __init__(self, num_tokens: int) -> None:
        self.tokens = np.arange(num_tokens, dtype=np.uint32)
        self.offsets = np.array([0, num_tokens], dtype=np.int64)


def batches(num_tokens: int, size: int, rank: int = 0, world_size: int = 1, **options: object) -> TrainBatches:
    identity = {"seed": options.get("seed", 0), "num_tokens": num_tokens}
    shuffle, seed = bool(options.get("shuffle", True)), int(str(options.get("seed", 0)))
    return TrainBatches(
        StoredSequence(PackedRows(Store(num_tokens), LENGTH), shuffle=shuffle, seed=seed),
        identity=identity,
        micro_batch_size=size,
        collate=partial(collate, sequence_length=LENGTH, pad_id=0),
        rank=rank,
        world_size=world_size,
    )


def targets(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return batch["targets"].tolist()


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(2, 200),
    size=st.integers(1, 5),
    world_size=st.sampled_from([1, 2, 4]),
    num_epochs=st.integers(1, 3),
)
def test_every_token_once_an_epoch_whatever_the_number_of_ranks(
    num_tokens: int, size: int, world_size: int, num_epochs: int
) -> None:
    num_rows = -(-(num_tokens - 1) // LENGTH)
    ranks = [batches(num_tokens, size, rank, world_size) for rank in range(world_size)]
    one = batches(num_tokens, 1)
    num_steps = -(-num_rows * num_epochs // (size * world_size))
    union: list[list[int]] = []
    for _ in range(num_steps):
        for rank in ranks:
            union += targets(rank.next_batch())
    assert union == [targets(one.next_batch())[0] for _ in range(len(union))]
    for epoch in range(num_epochs):
        rows = union[epoch * num_rows : (epoch + 1) * num_rows]
        seen = Counter(token for row in rows for token in row if token != IGNORED)
        assert seen == Counter(range(1, num_tokens))


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(2, 120),
    before=st.integers(0, 30),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
)
def test_resuming_continues_the_row_sequence(num_tokens: int, before: int, worlds: tuple[int, int]) -> None:
    """Also on another number of ranks, with another micro-batch size."""
    old = [batches(num_tokens, 2, rank, worlds[0]) for rank in range(worlds[0])]
    for _ in range(before):
        for rank in old:
            rank.next_batch()
    states = [json.loads(json.dumps(rank.state_dict())) for rank in old]
    assert all(state == states[0] for state in states)
    new = [batches(num_tokens, 3, rank, worlds[1]) for rank in range(worlds[1])]
    for rank in new:
        rank.load_state_dict(states[0])
    reference = batches(num_tokens, 1)
    for _ in range(before * 2 * worlds[0]):
        reference.next_batch()
    for _ in range(4):
        for rank in new:
            assert targets(rank.next_batch()) == [targets(reference.next_batch())[0] for _ in range(3)]


def test_epochs_differ_and_seeds_differ() -> None:
    one = batches(301, 100)
    first, second = targets(one.next_batch()), targets(one.next_batch())
    assert first != second and sorted(first) == sorted(second)
    assert targets(batches(301, 100, seed=1).next_batch()) != first
    assert targets(batches(301, 100).next_batch()) == first
    plain = batches(301, 100, shuffle=False)
    assert targets(plain.next_batch()) == sorted(first) == targets(plain.next_batch())


def test_a_state_of_other_data_is_refused() -> None:
    state = batches(301, 2).state_dict()
    with pytest.raises(DataError, match=r"num_tokens was 301, is 302.*checkpoint.resume=none"):
        batches(302, 2).load_state_dict(state)


def validation(num_tokens: int) -> ValidationSet:
    return ValidationSet(
        PackedRows(Store(num_tokens), LENGTH), collate=partial(collate, sequence_length=LENGTH, pad_id=0)
    )


@settings(max_examples=40, deadline=None)
@given(num_tokens=st.integers(2, 100), size=st.integers(1, 7), limit=st.none() | st.integers(1, 120))
def test_validation_is_always_the_same(num_tokens: int, size: int, limit: int | None) -> None:
    held_out = validation(num_tokens)
    rows = [row for batch in held_out.batches(size, limit) for row in targets(batch)]
    assert rows == [row for batch in held_out.batches(1, limit) for row in targets(batch)]
    predicted = [token for row in rows for token in row if token != IGNORED]
    if limit is None:
        assert predicted == list(range(1, num_tokens))
        assert held_out.num_predicted == num_tokens - 1
    else:
        assert len(predicted) >= min(limit, num_tokens - 1)
        assert len(predicted) < limit + LENGTH
        assert predicted == list(range(1, 1 + len(predicted)))
