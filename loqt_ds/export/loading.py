"""What was exported, loaded again: a merged model, a base with its adapter, an adapter alone, or a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from loqt_ds.export.adapter import ADAPTER, BASE, CONFIG_FILE, load_adapter
from loqt_ds.export.base import BASE_FILE, check_base
from loqt_ds.export.gguf import FILE, load_gguf
from loqt_ds.export.report import ExportError
from loqt_ds.export.verify import load_export as load_model


@dataclass(frozen=True)
class Parts:
    """The directories of an exported model; `adapter` is None where everything is in one."""

    model: Path
    adapter: Path | None


def find_parts(directory: Path, *, base: Path | None = None) -> Parts | None:
    """Where model and adapter lie, for any directory that an export has made; None where it is none.

    Args:
        base: of an adapter, where its base is now; None: beside it, or where it was.

    Raises ExportError where the base of an adapter is not to be found.
    """
    if (directory / "config.json").is_file() or (directory / FILE).is_file():
        return Parts(directory, None)
    for adapter in (directory, directory / ADAPTER):
        if (adapter / CONFIG_FILE).is_file():
            return Parts(_base_of(adapter) if base is None else base, adapter)
    return None


def _base_of(adapter: Path) -> Path:
    """The base beside an adapter, or the one that it names."""
    beside = adapter.parent / BASE
    if (beside / "config.json").is_file():
        return beside
    try:
        named = json.loads((adapter / CONFIG_FILE).read_text())["base_model_name_or_path"]
        if (adapter / BASE_FILE).is_file():
            named = json.loads((adapter / BASE_FILE).read_text())["base"]
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"the adapter {adapter} does not say which base it is of ({error!r}); give it") from error
    if not (Path(named) / "config.json").is_file():
        raise ExportError(
            f"the base {named} of the adapter {adapter} is not there; give the directory it is in now: "
            f"load_export(DIR, base=BASE), or python -m loqt_ds.generate --model BASE --adapter {adapter}"
        )
    return Path(named)


def load_export(directory: Path, *, base: Path | None = None, device: str = "cpu") -> nn.Module:
    """The exported model as transformers (and PEFT) load it, in eval mode, with the layers put right that a CPU gets
    wrong (see `verify`). Of an adapter: the model of its base, with the adapter's layers in it.

    `base`: where an adapter's base is now, if it is neither beside the adapter nor where it was; its checksums are
    compared as ever.

    Raises ExportError: it cannot be loaded, or an adapter belongs to another base.
    """
    directory = Path(directory)
    parts = find_parts(directory, base=None if base is None else Path(base))
    if parts is None:
        raise ExportError(f"{directory} is no export: it has neither config.json, {CONFIG_FILE} nor {FILE}")
    if base is not None and parts.adapter is None:
        raise ExportError(f"base={base} is of an adapter, and {directory} is a model of its own; leave base out")
    return load_parts(parts, device=device)


def load_parts(parts: Parts, *, device: str = "cpu") -> nn.Module:
    """As `load_export`, of directories that are known."""
    if parts.adapter is not None:
        check_base(parts.adapter, parts.model)  # before anything is loaded
    if (parts.model / FILE).is_file():
        return load_gguf(parts.model / FILE).to(device)
    model = load_model(parts.model, device=device)
    if parts.adapter is None:
        return model
    adapted: nn.Module = load_adapter(model, parts.adapter).get_base_model()  # type: ignore[operator]
    return adapted.eval()
