"""`python tools/plan_memory.py`: the plan of a recipe or a shape, and whether it fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loqt_ds.config import Config, load_config
from loqt_ds.config.parsing import config_folder
from loqt_ds.memory.counting import GIB
from loqt_ds.memory.machine import CARD_SIZES_GB, USABLE_SHARE, device_bytes
from loqt_ds.memory.questions import Asker, answer

# What --shape counts with: the settings that need least memory and no more time.
LEAST = (
    "train.dtype=bf16",
    "optim.name=adamw8bit",
    "optim.master=bf16",
    "optim.layerwise=true",
    "loqt.double_quant=both",
    "train.micro_batch_size=1",
)
_LENGTH = 256  # tokens of a row, the paper's


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/plan_memory.py", description="What a run will need on one device, and whether it fits."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a recipe's name in configs/recipes, or a YAML file")
    what.add_argument(
        "--shape",
        help="a size such as 7b, a name in configs/models, or a transformers config .json; counted with "
        + " ".join(LEAST[:-1])
        + ", unless overrides say otherwise",
    )
    parser.add_argument("--rank", type=int, help="loqt.rank")
    parser.add_argument("--tokens", type=int, help="tokens of a micro-batch")
    parser.add_argument("--gpus", type=int, default=1, help="ranks, one on each GPU (default: %(default)s)")
    parser.add_argument(
        "--engine",
        help="single, fsdp2, the name of a DeepSpeed configuration in configs/ (zero1, zero2), or its file; default: "
        "the recipe's, or single, and zero2 for several GPUs",
    )
    parser.add_argument("--card-gib", type=float, help="memory of the device; default: the CUDA device's, if any")
    parser.add_argument("--vocab-size", type=int, help="rows of embedding and head, where model.vocab_size is auto")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="options to change")
    return parser


def _ds_config(engine: str) -> dict[str, Any]:
    """The DeepSpeed configuration of that name, or file."""
    folder = config_folder("recipes").parent
    file = Path(engine) if engine.endswith(".json") else folder / f"{engine}.json"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise ValueError(
            f"--engine={engine}: there is no file {file}; use single, fsdp2, one of {there}, or a .json file"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"--engine={engine}: {file} holds no JSON object; try zero2")
    return content


def _engine(options: argparse.Namespace) -> str:
    """Of the command line, or of the recipe; else one that does for the number of GPUs."""
    gpus = options.gpus
    if gpus < 1:
        raise ValueError(f"--gpus={gpus} is out of range; it must be at least 1")
    of_recipe = load_config(options.config, _overrides(options)).engine
    engine: str = options.engine or (of_recipe if of_recipe != "auto" else "single" if gpus == 1 else "zero2")
    if engine == "single" and gpus > 1:
        raise ValueError(f"--engine=single with --gpus={gpus}: one process has one GPU; use --engine=zero2 or fsdp2")
    if of_recipe not in ("auto", engine):
        raise ValueError(f"--engine={engine} with engine={of_recipe}: give one of them, or engine=auto")
    return engine


def _overrides(options: argparse.Namespace, *, least: Sequence[str] = ()) -> list[str]:
    engine = ["engine=fsdp2"] if options.engine == "fsdp2" else []
    if options.shape is None:
        return [*engine, *options.overrides]
    shape = options.shape
    if not shape.endswith(".json") and not (config_folder("models") / f"{shape}.json").is_file():
        shape = f"llama_{shape}"
    return [f"model.shape={shape}", *engine, *least, f"data.sequence_length={_LENGTH}", *options.overrides]


def _config(options: argparse.Namespace, engine: str) -> Config:
    least = [each for each in LEAST if engine == "single" or each != "optim.layerwise=true"]
    overrides = _overrides(options, least=least)
    if options.rank is not None:
        overrides.append(f"loqt.rank={options.rank}")
    if options.tokens is not None:
        if options.tokens < 2:
            raise ValueError(f"--tokens={options.tokens} is out of range; it must be at least 2")
        length = load_config(options.config, overrides).data.sequence_length
        if options.tokens % length == 0:
            overrides.append(f"train.micro_batch_size={options.tokens // length}")
        else:
            overrides += [f"data.sequence_length={options.tokens}", "train.micro_batch_size=1"]
    config = load_config(options.config, overrides)
    if options.shape is not None and config.name == "default":
        config.name = f"{Path(config.model.shape or '').stem}_r{config.loqt.rank}"
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan and the answers; returns 0, or 2 for what cannot be planned."""
    options = _parser().parse_args(arguments)
    try:
        engine = _engine(options)
        config = _config(options, engine)
        if options.card_gib is not None and not options.card_gib > 0:
            raise ValueError(f"--card-gib={options.card_gib} is out of range; it must be above 0")
        ds_config = None if engine in ("single", "fsdp2") else _ds_config(engine)
        asker = Asker(config, vocab_size=options.vocab_size, world_size=options.gpus, ds_config=ds_config)
        lines = asker.plan().lines()
        if config.train.lean_activations == "auto":
            lines.append("  train.lean_activations=auto is counted as true; a run with room to spare keeps more")
        each = f" on each of {options.gpus} GPUs" if options.gpus > 1 else ""
        if options.card_gib is not None:
            cards = [(int(options.card_gib * GIB), f"{options.card_gib:g} GiB{each}")]
        elif torch.cuda.is_available():
            capacity = device_bytes(torch.device("cuda", 0))
            cards = [(capacity, f"{torch.cuda.get_device_name(0)}, {capacity / GIB:.2f} GiB{each}")]
        else:
            usable = ((size, size * USABLE_SHARE) for size in CARD_SIZES_GB)
            cards = [(int(gib * GIB), f"a card of {size} GB ({gib:.1f} GiB usable){each}") for size, gib in usable]
        for capacity, what in cards:
            lines += answer(asker, capacity, what)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0
