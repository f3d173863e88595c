"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workshop import Workshop


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache of tokenizers and token stores for all tests here and the commands they start."""
    before = os.environ.get("LOQT_CACHE")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LOQT_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LOQT_CACHE"]
    else:
        os.environ["LOQT_CACHE"] = before


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that runs/ is made there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where weights are drawn, read, or room is made for them."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("loqt_ds.run.build_model", loaded)
    monkeypatch.setattr("loqt_ds.run.materialize_zeros", loaded)
