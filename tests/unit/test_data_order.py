"""The epoch permutation: a bijection for every size, a pure function of its key."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_ds.data.order import permuted


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_is_a_bijection(num_rows: int, seed: int, epoch: int) -> None:
    rows = permuted(np.arange(num_rows), num_rows, seed, epoch)
    assert sorted(rows.tolist()) == list(range(num_rows))


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(2, 10**12), data=st.data())
def test_a_position_does_not_depend_on_what_else_is_asked(num_rows: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=20))
    together = permuted(np.array(positions), num_rows, 7, 1)
    alone = [int(permuted(np.array([position]), num_rows, 7, 1)[0]) for position in positions]
    assert together.tolist() == alone
    assert all(0 <= row < num_rows for row in alone)


def test_key_changes_the_order_and_nothing_else_does() -> None:
    positions = np.arange(1000)
    orders = {tuple(permuted(positions, 1000, *key)) for key in [(0, 0), (0, 1), (1, 0), (1,), (0, 0, 0)]}
    assert len(orders) == 5
    assert tuple(permuted(positions, 1000, 0, 0)) == tuple(permuted(positions, 1000, 0, 0))


def test_order_is_pinned() -> None:
    """Resuming an old run needs the very same order in every later version."""
    assert permuted(np.arange(10), 10, 0, 0).tolist() == [5, 9, 1, 0, 4, 2, 3, 8, 6, 7]


def test_looks_shuffled() -> None:
    """Uniform permutations keep one fixed point on average and correlate with the identity by about 1/sqrt(n)."""
    num_rows = 4096
    rows = permuted(np.arange(num_rows), num_rows, 3, 0)
    assert (rows == np.arange(num_rows)).sum() < 10
    assert abs(np.corrcoef(rows, np.arange(num_rows))[0, 1]) < 5 / num_rows**0.5
    assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 5 / num_rows**0.5
