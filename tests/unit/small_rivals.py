"""What the tests of tools/rivals*.py share: a small shape, batches, and the modules imported as the tools do it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Widths of whole blocks: bitsandbytes' CPU kernel errs on others.
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 64, 128, 2, 131
MATRICES = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
OTHERS = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
ADAPTERS = LAYERS * (4 * 2 * HIDDEN + 3 * (HIDDEN + INTERMEDIATE))  # numbers of A and B for each rank
PACKAGES = {
    **{"galore": "galore_torch", "qgalore": "q_galore_torch", "apollo": "apollo_torch", "apollomini": "apollo_torch"},
    **dict.fromkeys(("lora", "qlora", "loftq", "lqlora", "apiq", "relora"), "peft"),
}
MODULES = (
    *("rivals", "rivals_adapters", "rivals_projected", "rivals_initial", "rivals_base"),
    *("candidates", "candidates_rounding"),
)


@pytest.fixture(scope="module", name="rivals")
def rivals_fixture(repository: Path) -> Iterator[Any]:
    """`rivals`, imported as a tool imports it; all its parts are forgotten afterwards."""
    sys.path.insert(0, str(repository / "tools"))
    yield importlib.import_module("rivals")
    sys.path.remove(str(repository / "tools"))
    for name in MODULES:
        sys.modules.pop(name, None)


def write_shape(folder: Path, **others: int) -> str:
    """A shape's file."""
    content = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    content |= {"intermediate_size": INTERMEDIATE, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    file = folder / "tiny.json"
    file.write_text(json.dumps(content | {"max_position_embeddings": 64, "tie_word_embeddings": False} | others))
    return str(file)


@pytest.fixture(scope="module", name="shape")
def shape_fixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shape(tmp_path_factory.mktemp("shape"))


def batch_of(seed: int, rows: int = 3, length: int = 17) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}


def build(rivals: Any, name: str, shape: str, **options: Any) -> Any:
    """A contender; skips where its package is not installed."""
    package = PACKAGES.get(rivals.parse(name)[0])
    if package is not None:
        pytest.importorskip(package, reason="the compare extra is not installed")
    return rivals.build(name, rivals.Setup(shape, rows=3, length=17, **options))
