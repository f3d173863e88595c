"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch loads: OpenMP's waiting threads spin, and where cores are shared (two of them, with the tests' own
# processes beside this one) tiny models then train ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real data: `LOQT_TEST_DATA`, or `../shared/data` beside the repository; skips where it is absent."""
    folder = Path(os.environ.get("LOQT_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set LOQT_TEST_DATA to a folder that has it")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Ends a process group that a module's tests started in this process: DeepSpeed asks it for the number of ranks."""
    yield
    if "torch" not in sys.modules or not sys.modules["torch"].distributed.is_initialized():
        return
    if "deepspeed" in sys.modules and sys.modules["deepspeed"].comm.is_initialized():
        sys.modules["deepspeed"].comm.destroy_process_group()  # and what it keeps of its own
    else:
        sys.modules["torch"].distributed.destroy_process_group()
