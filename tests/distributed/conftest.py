"""One server of processes for all tests of this directory, with everything imported once."""

from __future__ import annotations

import pytest
import ranks


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    ranks.start_server()
