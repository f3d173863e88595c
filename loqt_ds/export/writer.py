"""The directory: shards, index, configuration, tokenizer; written beside, synced, renamed by the caller.

A shard is made when its turn comes, so the export needs the memory of one shard and one layer beside the model.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loqt_ds.checkpoint import copy_file, fsync_directory, write_bytes, write_json, write_safetensors
from loqt_ds.export.pack import WeightFormat
from loqt_ds.export.report import ExportError

INDEX_FILE = "model.safetensors.index.json"
REPORT_FILE = "export_report.json"
GENERATION_FILE = "generation_config.json"

# What a directory given as the tokenizer's may hold that is not of the tokenizer: weights and configuration of a model.
_NOT_OF_TOKENIZER = ("config.json", GENERATION_FILE, REPORT_FILE, INDEX_FILE)
_NOT_OF_TOKENIZER_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Unit:
    """Tensors that stay together in one shard, made when they are written."""

    num_bytes: int
    """An upper bound, known before `make` is called."""
    make: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class WrittenWeights:
    """The safetensors files of an export."""

    files: dict[str, dict[str, Any]]
    """File name -> {"bytes", "sha256"}."""
    weight_map: dict[str, str]
    """Tensor name -> file name."""

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(entry["bytes"] for entry in self.files.values())


def plan_shards(units: Sequence[Unit], max_shard_bytes: int) -> list[list[Unit]]:
    """In order, as many units in a shard as fit; a larger unit gets a shard of its own."""
    shards: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if shards[-1] and size + unit.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.num_bytes
    return shards


def write_weights(directory: Path, units: Sequence[Unit], max_shard_bytes: int) -> WrittenWeights:
    """Make and write all tensors, with an index where there is more than one shard."""
    shards = plan_shards(units, max_shard_bytes)
    files: dict[str, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for unit in shard:
            tensors |= unit.make()
        files[name] = write_safetensors(directory / name, tensors, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_FILE, index)
    return WrittenWeights(files=files, weight_map=weight_map)


def skipped_modules(model: nn.Module, adapted: Mapping[str, nn.Module]) -> list[str]:
    """Names of the linears that transformers must leave dense: the head and whatever was not adapted."""
    from transformers.pytorch_utils import Conv1D

    linears = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    skipped = [name for name in linears if name not in adapted]
    if not skipped:
        raise ExportError(
            "the model has no dense linear (no output head): bitsandbytes refuses an empty list of modules to skip; "
            "export with format=bf16"
        )
    return skipped


def model_config_json(
    model: nn.Module, adapted: Mapping[str, nn.Module], model_config: Any, weight_format: WeightFormat
) -> str:
    """`config.json`: the model's own configuration, its dtype, and how its weights are quantized."""
    config = copy.deepcopy(model_config)
    config.architectures = [type(model).__name__]
    config.dtype = weight_format.dtype
    config.use_cache = True  # training may have switched it off; generation wants it
    if weight_format.quant_type is not None:
        config.quantization_config = {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": weight_format.quant_type,
            # Left out, transformers would compute in float32 without a word.
            "bnb_4bit_compute_dtype": weight_format.dtype_name,
            "bnb_4bit_use_double_quant": weight_format.double_quant,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": skipped_modules(model, adapted),
        }
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return config.to_json_string()


def write_configuration(directory: Path, config_json: str, generation: Mapping[str, Any] | None) -> None:
    """Write `config.json`, and for a model that generates `generation_config.json`."""
    write_bytes(directory / "config.json", config_json.encode())
    if generation is not None:
        write_json(directory / GENERATION_FILE, generation)


def generation_defaults(model_config: Any) -> dict[str, Any]:
    """What `generation_config.json` says where nobody has written one: the model's special tokens."""
    from transformers import GenerationConfig

    return options_of(GenerationConfig.from_model_config(model_config))


def options_of(generation_config: Any) -> dict[str, Any]:
    """A GenerationConfig as JSON, without what it leaves to transformers."""
    options: dict[str, Any] = json.loads(generation_config.to_json_string())
    return options


def read_generation(directory: Path) -> dict[str, Any] | None:
    """What `generation_config.json` of a model's directory says; None where there is none.

    Raises ExportError where it cannot be read.
    """
    path = directory / GENERATION_FILE
    if not path.is_file():
        return None
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}, which goes along with the export, cannot be read ({error}); mend it") from error
    if not isinstance(options, dict):
        raise ExportError(f"{path}, which goes along with the export, is no JSON object; mend it, or remove it")
    return options


def with_end(generation: Mapping[str, Any], end: int) -> dict[str, Any]:
    """The same, with `end` among the tokens that end a text."""
    known = generation.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    ends = known if end in known else [*known, end]
    return {**generation, "eos_token_id": ends[0] if len(ends) == 1 else ends}


def copy_tokenizer(source: Path, directory: Path) -> list[str]:
    """Copy the files of a tokenizer directory (not of a model that lies beside it); returns their names."""
    names = []
    for path in _tokenizer_files(source):
        relative = path.relative_to(source)
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, target)
        names.append(relative.as_posix())
    return names


def _tokenizer_files(source: Path) -> Iterator[Path]:
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        foreign = relative.as_posix() in _NOT_OF_TOKENIZER or path.suffix in _NOT_OF_TOKENIZER_SUFFIXES
        if path.is_file() and not hidden and not foreign:
            yield path


def refuse_existing(output_dir: Path) -> None:
    """Raise ExportError where the export would overwrite something."""
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if output_dir.exists():
        raise ExportError(
            f"the output directory {output_dir} exists and is not empty; choose another --output, or remove it first"
        )


def _is_running(pid: int) -> bool:
    """Whether a process of this machine other than this one has the number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def complete_or_nothing(output_dir: Path) -> Iterator[Path]:
    """Yield a fresh directory beside `output_dir`; it is renamed to that if the block ends well, removed if it raises.

    What exports to the same directory left when they died is removed.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".tmp-{output_dir.name}-"
    for path in output_dir.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        # The names of other directories may begin the same way, and an export to one of them may be running.
        if pid != path.name and pid.isascii() and pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    directory = output_dir.parent / f"{prefix}{os.getpid()}"
    directory.mkdir()
    try:
        yield directory
        for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory):
            fsync_directory(path)
        os.replace(directory, output_dir)
        fsync_directory(output_dir.parent)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
