"""From a trained model, in memory or in a checkpoint, to a verified directory and a report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import loqt_ds
from loqt_ds.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_free_space,
    find_checkpoint,
    load_checkpoint,
    write_json,
)
from loqt_ds.config import Config, from_dict
from loqt_ds.export import adapter, gguf, writer
from loqt_ds.export.base import Contents, contents_of, loader_of, stored_weights
from loqt_ds.export.layout import Layout
from loqt_ds.export.pack import WeightFormat, pack_layer, packed_num_bytes
from loqt_ds.export.report import GIB, ExportError, ExportReport, LayerReport
from loqt_ds.export.verify import Expected, example_inputs, load_export, verify_export, verify_files
from loqt_ds.method.conversion import build_meta, loqt_layers, output_head, tie_weights
from loqt_ds.method.description import transformers_config
from loqt_ds.method.experts import is_expert
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.shards import saved_masters

FORMATS = ("nf4", "bf16", "adapter", "gguf")
DEFAULT_MAX_SHARD_SIZE_GIB = 5.0

Say = Callable[[str], object]


@torch.no_grad()
def export_model(
    model: nn.Module,
    *,
    model_config: Any,
    tokenizer_dir: Path | None,
    output_dir: Path,
    format: str = "nf4",
    masters: Mapping[str, Tensor] | None = None,
    double_quant: bool = False,
    max_shard_size_gib: float = DEFAULT_MAX_SHARD_SIZE_GIB,
    verify: bool = True,
    base_dir: Path | None = None,
    base_option: str = "--base",
    gguf_type: str = "bf16",
    generation: Mapping[str, Any] | None = None,
    source: str = "a model in memory",
    say: Say = print,
) -> ExportReport:
    """Merge, quantize once, write, reload, compare; the directory gets its name only if all of that worked.

    Args:
        model: holds `LoQTLinear` layers; it is not changed.
        model_config: its transformers configuration; None for a model that is not of transformers, which is exported
            as bf16 under the names of its own state_dict.
        tokenizer_dir: whose files travel along, or None.
        output_dir: must not exist, or be empty.
        format: "nf4": 4-bit in the type the weights were trained in (nf4 or fp4; int4 and unquantized ones become
            nf4); "bf16": dense; "adapter": nothing is merged, `output_dir` gets the directories base and adapter;
            "gguf": one file for llama.cpp, and the tokenizer's for others.
        masters: parameter name -> float32 tensor of the parameter's shape, used instead of it (B included).
        double_quant: store the scales in 8 bits; they then differ a little from those that were trained with.
        max_shard_size_gib: weights are split into files of at most this size.
        verify: reload with transformers (and PEFT) on the model's device, and compare.
        base_dir: with "adapter", the directory of a base that there is already: only the adapter is written, after it
            was found to be the same one.
        base_option: by which the user gave it, for messages.
        gguf_type: with "gguf", how matrices are stored, one of `gguf.TYPES`.
        generation: what `generation_config.json` is to say; None: the model's own `generation_config`.

    Raises:
        ExportError: an option or directory is refused, the disk is too small, or the reloaded model differs.
    """
    output_dir = Path(output_dir)
    check_options(format, double_quant, max_shard_size_gib, base_dir=base_dir, gguf_type=gguf_type, verify=verify)
    if model_config is None and format != "bf16":
        raise ExportError(
            f"export.format={format}: only transformers loads such files, and this model is not one of its own; "
            "use bf16"
        )
    writer.refuse_existing(output_dir)
    if format == "gguf":
        gguf.check_model(model_config)
    expected, notes = _expected(model, model_config, format, double_quant, masters or {})
    factors = expected.factors
    contents = Contents()
    if format == "adapter":
        adapter.check_layers(expected.layers, model_config)
        expected = adapter.base_of(expected)
        contents = contents_of(model, expected, base_dir, option=base_option)
    report = ExportReport(
        output_dir=output_dir,
        format=format,
        layers=[],
        num_bytes=0,
        num_shards=0,
        notes=notes,
        versions=_versions(format),
        source=source,
        loader=loader_of(model),
    )
    tokenizer_dir = None if tokenizer_dir is None else Path(tokenizer_dir)
    try:
        with writer.complete_or_nothing(output_dir) as temporary:
            where = temporary / adapter.BASE if format == "adapter" else temporary
            if format == "gguf":
                _write_gguf(where, expected, tokenizer_dir, gguf_type, report, verify=verify)
            elif base_dir is None:
                written = _write_model(where, expected, model, tokenizer_dir, max_shard_size_gib, generation, report)
                if verify:
                    _verify_model(where, written, expected, report)
            if format == "adapter":
                _write_adapter(temporary, expected, factors, model, base_dir, contents, report, verify=verify)
            write_json(temporary / writer.REPORT_FILE, report.to_dict())
    except (OSError, CheckpointError) as error:
        raise ExportError(f"the export could not be written to {output_dir}: {error}") from error
    for line in (*report.notes, *report.summary_lines()):
        say(line)
    return report


def _generation(model: nn.Module, model_config: Any, given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What `generation_config.json` says; None for a model that generates nothing."""
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and not can_generate():
        return None
    if given is not None:
        return given
    own = getattr(model, "generation_config", None)
    return writer.generation_defaults(model_config) if own is None else writer.options_of(own)


def _write_model(
    directory: Path,
    expected: Expected,
    model: nn.Module,
    tokenizer_dir: Path | None,
    max_shard_size_gib: float,
    generation: Mapping[str, Any] | None,
    report: ExportReport,
) -> writer.WrittenWeights:
    """Everything that transformers loads; completes the report."""
    directory.mkdir(exist_ok=True)
    units, model_config = _units(expected, report.layers), expected.model_config
    num_bytes = sum(unit.num_bytes for unit in units)
    check_free_space(directory, num_bytes, what="the export", remedy="or give another --output")
    written = writer.write_weights(directory, units, int(max_shard_size_gib * GIB))
    if model_config is not None:
        config_json = writer.model_config_json(model, expected.layers, model_config, expected.weight_format)
        writer.write_configuration(directory, config_json, _generation(model, model_config, generation))
    if tokenizer_dir is not None:
        writer.copy_tokenizer(tokenizer_dir, directory)
    report.num_bytes, report.num_shards = written.num_bytes, len(written.files)
    report.notes += _dense_note(expected)
    if report.format != "adapter":
        report.notes += _copied_note(report.layers)
    return written


def _verify_model(directory: Path, written: writer.WrittenWeights, expected: Expected, report: ExportReport) -> None:
    if expected.model_config is None:
        verify_files(directory, written)
        return
    report.verification = verify_export(directory, written, expected)
    report.notes += _patched_note(report.verification.patched_layers) + _repacked_note(expected)


def _write_gguf(
    directory: Path,
    expected: Expected,
    tokenizer_dir: Path | None,
    kind: str,
    report: ExportReport,
    *,
    verify: bool,
) -> None:
    """The file, and beside it the tokenizer for readers that are not llama.cpp: what transformers makes of the file's
    pieces gives other ids (of sentencepiece's kind). Completes the report."""
    path = directory / gguf.FILE
    num_values = sum(t.numel() for t in expected.dense.values())
    num_values += sum(layer.out_features * layer.in_features for layer in expected.layers.values())
    check_free_space(directory, 2 * num_values, what="the export", remedy="or give another --output")
    report.layers, notes = gguf.write_gguf(
        path, expected, kind=kind, tokenizer_dir=tokenizer_dir, model_name=report.output_dir.name
    )
    assert tokenizer_dir is not None, "write_gguf refuses that"
    writer.copy_tokenizer(tokenizer_dir, directory)
    report.notes += notes + gguf.notes_of(expected.model_config)
    report.num_bytes, report.num_shards = path.stat().st_size, 1
    if verify:
        report.verification = gguf.verify_gguf(path, expected, kind)


def _write_adapter(
    temporary: Path,
    expected: Expected,
    factors: Mapping[str, Tensor],
    model: nn.Module,
    base_dir: Path | None,
    contents: Contents,
    report: ExportReport,
    *,
    verify: bool,
) -> None:
    """The adapter, in a directory beside its base, or alone; completes the report."""
    base = temporary / adapter.BASE if base_dir is None else base_dir
    called = (report.output_dir / adapter.BASE if base_dir is None else base_dir).resolve()
    layers, directory = expected.layers, temporary / adapter.ADAPTER
    files = stored_weights(base).files
    made = adapter.write_adapter(directory, layers, factors, model, base=called, base_files=files, contents=contents)
    report.adapter = made
    report.num_bytes, report.num_shards = report.num_bytes + made.num_bytes, report.num_shards + 1
    if base_dir is not None and verify:
        report.notes += _repacked_note(expected)
    report.layers = report.layers or adapter.unchanged(expected)
    if verify:
        device = next(iter(layers.values())).B.device
        made.layers_relative_difference, made.logits_relative_difference = adapter.verify_adapter(
            load_export(base, device=str(device)),
            directory,
            model,
            layers,
            factors,
            example_inputs(model, str(device)),
            expected.weight_format.dtype,
        )


def export_checkpoint(
    checkpoint_dir: Path,
    output_dir: Path,
    *,
    format: str = "nf4",
    double_quant: bool = False,
    max_shard_size_gib: float = DEFAULT_MAX_SHARD_SIZE_GIB,
    verify: bool = True,
    base_dir: Path | None = None,
    gguf_type: str = "bf16",
    say: Say = print,
) -> ExportReport:
    """Export what a training checkpoint holds; fp32 masters are used where it has them.

    Args:
        checkpoint_dir: a `step_N` directory, or one of those (the newest that is undamaged), or a run directory (its
            best checkpoint, where it has kept one).
        Others: as for `export_model`.

    Raises:
        ExportError: as for `export_model`, or the checkpoint lacks something.
        CheckpointError: the checkpoint is damaged or not there.
    """
    check_options(format, double_quant, max_shard_size_gib, base_dir=base_dir, gguf_type=gguf_type, verify=verify)
    writer.refuse_existing(Path(output_dir))
    found = best_or_newest(Path(checkpoint_dir), say=say, option="--checkpoint")
    checkpoint = load_checkpoint(found, verify=False)
    model, model_config = rebuild(checkpoint)
    model.to(_device())
    say(f"exporting {found} (step {checkpoint.step}) as {format}")
    has_tokenizer = "tokenizer" in checkpoint.manifest["directories"]
    if not has_tokenizer:
        say("the checkpoint holds no tokenizer: the export will have none")
    return export_model(
        model,
        model_config=model_config,
        tokenizer_dir=checkpoint.directory("tokenizer") if has_tokenizer else None,
        output_dir=Path(output_dir),
        format=format,
        double_quant=double_quant,
        max_shard_size_gib=max_shard_size_gib,
        verify=verify,
        base_dir=base_dir,
        gguf_type=gguf_type,
        generation=checkpoint.metadata.get("generation"),
        source=f"{found.resolve()} (step {checkpoint.step})",
        say=say,
    )


def check_export(config: Config, model: nn.Module, model_config: Any) -> None:
    """Raises ExportError where the export at the end of a run would be refused: it is asked for before it starts."""
    form = config.export.format
    if form == "none":
        return
    check_options(form, False, DEFAULT_MAX_SHARD_SIZE_GIB)
    if form == "adapter":
        adapter.check_layers(loqt_layers(model), model_config)
    if form == "gguf":
        gguf.check_model(model_config)
        if config.model.task != "causal_lm":
            raise ExportError(f"export.format=gguf holds language models, not model.task={config.model.task}; use bf16")


def check_shared_base(config: Config, model: nn.Module, model_config: Any) -> None:
    """Raises ExportError where `export.base` is not the base of a model whose training is to begin: its weights, which
    training leaves as they are, are compared before the hours and not after them."""
    if config.export.format != "adapter" or config.export.base is None:
        return
    expected, _ = _expected(model, model_config, "adapter", False, {})
    contents_of(model, adapter.base_of(expected), Path(config.export.base), option="export.base")


def check_options(
    format: str,
    double_quant: bool,
    max_shard_size_gib: float,
    *,
    base_dir: Path | None = None,
    gguf_type: str = "bf16",
    verify: bool = True,
) -> None:
    """Raises ExportError for what cannot be honoured, before anything is loaded or written."""
    if format not in FORMATS:
        raise ExportError(f"export.format={format!r} does not exist; use one of {', '.join(FORMATS)}")
    if double_quant and format != "nf4":
        why = (
            "the base of an adapter keeps the scales of training" if format == "adapter" else "it has none to quantize"
        )
        raise ExportError(f"double quantization needs format=nf4, not format={format}: {why}")
    if base_dir is not None and format != "adapter":
        raise ExportError(f"--base is of an adapter, and format={format} writes a model of its own; use format=adapter")
    if base_dir is not None and not (base_dir / "config.json").is_file():
        raise ExportError(f"--base={base_dir} is no model directory; give the directory base of an adapter's export")
    if gguf_type not in gguf.TYPES:
        raise ExportError(f"gguf_type={gguf_type!r} does not exist; use one of {', '.join(gguf.TYPES)}")
    if gguf_type != "bf16" and format != "gguf":
        raise ExportError(f"gguf_type={gguf_type} is of format=gguf, and does nothing with format={format}")
    if format == "adapter" and verify:
        adapter.import_peft()
    if format == "gguf":
        gguf.import_gguf()
    if not max_shard_size_gib > 0:
        raise ExportError(f"max_shard_size_gib={max_shard_size_gib} must be above 0, for example 5")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _versions(format: str) -> dict[str, str]:
    packages = ["torch", "transformers", "bitsandbytes", "safetensors"]
    more = {"adapter": "peft", "gguf": "gguf"}.get(format)
    if more is not None and importlib.util.find_spec(more) is not None:
        packages.append(more)
    return {"loqt_ds": loqt_ds.__version__} | {name: importlib.metadata.version(name) for name in packages}


# ------------------------------------------------------------------------------------------------- what is exported


def _expected(
    model: nn.Module,
    model_config: Any,
    format: str,
    double_quant: bool,
    masters: Mapping[str, Tensor],
) -> tuple[Expected, list[str]]:
    """What the export must hold, and what to say about it; nothing is merged yet."""
    layers = loqt_layers(model)
    if not layers:
        raise ExportError("the model has no LoQT layer; save it with transformers' save_pretrained instead")
    of_masters = {name: layers[name].canonical(masters[f"{name}.B"]) for name in layers if f"{name}.B" in masters}
    weight_format, notes = _weight_format(layers, format, double_quant)
    expected = Expected(
        model_class=type(model),
        model_config=model_config,
        layout=Layout(model, model_config),
        weight_format=weight_format,
        layers=layers,
        factors=of_masters,
        dense=_dense_tensors(model, layers, masters),
        merge_errors={},
    )
    return expected, notes


def _weight_format(layers: Mapping[str, LoQTLinear], format: str, double_quant: bool) -> tuple[WeightFormat, list[str]]:
    """How adapted weights are exported, and what to say about it."""
    if format == "adapter":
        return adapter.base_format(layers)
    if format == "gguf":
        return WeightFormat(None, dtype=torch.float32), []  # merged; the file rounds by itself
    if format == "bf16":
        return WeightFormat(None), []
    kinds = sorted({layer.spec_w.kind for layer in layers.values()})
    if len(kinds) > 1:
        raise ExportError(f"the model's weights are stored as {' and '.join(kinds)}; export it with format=bf16")
    kind = kinds[0]
    if kind == "int4":
        note = "int4 weights have no format that transformers reads: the merged weights are re-quantized to nf4"
        return WeightFormat("nf4", double_quant), [note]
    if kind == "none":
        note = "the weights were trained without quantization: the merged weights are quantized to nf4 here"
        return WeightFormat("nf4", double_quant), [note]
    notes = ["fp4 weights are exported as fp4, the type they were trained in"] if kind == "fp4" else []
    return WeightFormat(kind, double_quant), notes


def _copied_note(reports: list[LayerReport]) -> list[str]:
    num_copied = sum(report.action == "copied" for report in reports)
    if not num_copied:
        return []
    return [f"B is zero in {num_copied} of {len(reports)} matrices: their stored codes are copied as they are"]


def _dense_note(expected: Expected) -> list[str]:
    dense = [name for name in expected.layers if expected.format_of(name).quant_type is None]
    if not dense or expected.weight_format.quant_type is None:
        return []
    return [
        f"transformers has no 4-bit module for {len(dense)} of {len(expected.layers)} matrices (experts, or what a "
        f"model keeps in float32): they are written as {expected.format_of(dense[0]).label} ({dense[0]} is one)"
    ]


def _patched_note(patched: list[str]) -> list[str]:
    if not patched:
        return []
    return [
        f"bitsandbytes on this CPU dequantizes {len(patched)} matrices wrongly (in_features divisible by 16, not by "
        f"64; {patched[0]} is one): their codes were verified, and to compare logits they were dequantized by "
        "table look-up. On a GPU the export computes rightly; do not evaluate it on a CPU"
    ]


def _repacked_note(expected: Expected) -> list[str]:
    """What a stranger's 4-bit model computes on this CPU is not what was compared."""
    from bitsandbytes.functional import has_avx512bf16

    is_quantized = any(expected.format_of(name).quant_type is not None for name in expected.layers)
    device = next(iter(expected.layers.values())).B.device
    if not is_quantized or device.type != "cpu" or not has_avx512bf16():
        return []
    return [
        "with AVX512-BF16, as this CPU has it, bitsandbytes computes 4-bit layers in bf16, whatever the model's dtype "
        "(logits then differ by about 5e-3), and fails where in_features do not divide by 64 or out_features by 32; "
        "what was compared was computed without that. loqt_ds.export.load_export loads without it too, and so does "
        "transformers after `import bitsandbytes; bitsandbytes.nn.modules.has_avx512bf16 = lambda: False`"
    ]


def _dense_tensors(
    model: nn.Module, layers: Mapping[str, LoQTLinear], masters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Everything that is not an adapted weight, by name; of tied tensors, the one that is not the output head's."""
    own = {
        f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict(keep_vars=True) if key != "bias"
    }
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in own}
    head = output_head(model)
    head_names = {name for name, module in model.named_modules() if module is head and head is not None}
    # The head comes last, so that of a tied pair the embedding's name is met first and stays.
    order = sorted(tensors, key=lambda name: name.rpartition(".")[0] in head_names)
    kept: dict[int, str] = {}
    for name in order:
        kept.setdefault(id(tensors[name]), name)
    names = set(kept.values())
    return {name: masters.get(name, tensor).detach() for name, tensor in tensors.items() if name in names}


def _units(expected: Expected, reports: list[LayerReport]) -> list[writer.Unit]:
    """What to write, in the order of the model; making a layer's appends to `reports`."""

    def dense_unit(name: str, tensor: Tensor) -> writer.Unit:
        return writer.Unit(num_bytes(name), lambda: {layout.dense_name(name): tensor.to(expected.dtype_of(name))})

    def num_bytes(name: str) -> int:
        return expected.dense[name].numel() * expected.dtype_of(name).itemsize

    def pack(name: str) -> tuple[LoQTLinear | None, dict[str, Tensor]]:
        layer = expected.layers.get(name)
        if layer is None:
            weight = expected.dense[f"{name}.weight"]
            return None, {"weight": weight.to("cpu", expected.dtype_of(f"{name}.weight"))}
        tensors, report = pack_layer(name, layer, expected.factors.get(name), expected.format_of(name))
        reports.append(report)
        expected.merge_errors[name] = report.merge_error
        return layer, tensors

    def unit(names: list[str]) -> writer.Unit:
        size = sum(
            packed_num_bytes(expected.layers[name].weight_shape, expected.format_of(name))
            if name in expected.layers
            else num_bytes(f"{name}.weight")
            for name in names
        )
        return writer.Unit(size, lambda: layout.to_files({name: pack(name) for name in names}))

    layout = expected.layout
    dense: list[writer.Unit] = []
    of_experts: list[str] = []  # by module: matrices of experts that are not adapted
    for name, tensor in expected.dense.items():
        if is_expert(name.removesuffix(".weight")):
            of_experts.append(name.removesuffix(".weight"))
        else:
            dense.append(dense_unit(name, tensor))
    groups: dict[str, list[str]] = {}
    for name in (*expected.layers, *of_experts):
        groups.setdefault(layout.group(name), []).append(name)
    return dense + [unit(names) for names in groups.values()]


# ------------------------------------------------------------------------------------------------- from a checkpoint


def best_or_newest(path: Path, *, say: Say, option: str) -> Path:
    """The checkpoint that a path means: of a run directory whose run keeps the best, and exports it, that one; else the
    newest that is undamaged.

    Raises CheckpointError where there is none, naming `option`.
    """
    best = path / "best"
    has_best = best.is_dir() and any(best.glob("step_*"))
    newest = None
    if not has_best or any((path / "checkpoints").glob("step_*")):
        newest = find_checkpoint(path, str(path), say=say, option=option)
        assert newest is not None, "a path either holds a checkpoint or raises"
        if not has_best or not load_checkpoint(newest, verify=False).metadata["config"]["checkpoint"].get("best"):
            return newest
    say(f"{option}={path} keeps its best checkpoint, which is taken; its newest is in {path / 'checkpoints'}")
    found = find_checkpoint(best, str(best), say=say, option=option)
    assert found is not None, "a path either holds a checkpoint or raises"
    return found


def rebuild(checkpoint: Checkpoint) -> tuple[nn.Module, Any]:
    """The trained model on the CPU, its trained parameters replaced by their fp32 masters where there are any."""
    for key in ("model_config", "config"):
        if key not in checkpoint.metadata:
            raise ExportError(f"{checkpoint.path} was not written by a training run: its metadata has no {key!r}")
    model_config = transformers_config(checkpoint.metadata["model_config"], str(checkpoint.path))
    config = from_dict(checkpoint.metadata["config"], source=str(checkpoint.path))
    state = checkpoint.tensors("model")
    trained_dtypes = {tensor.dtype for name, tensor in state.items() if name.endswith(".B")}
    if len(trained_dtypes) != 1:
        raise ExportError(f"{checkpoint.path} holds trained factors of types {trained_dtypes or 'none at all'}")
    model_class = None
    if (called := checkpoint.metadata.get("model_class")) is not None:  # of a model that a training loop made itself
        model_class = getattr(transformers, called, None)
        if model_class is None:
            raise ExportError(
                f"{checkpoint.path} is of a {called}, which transformers does not have; export the engine that holds "
                "the model instead"
            )
    model = build_meta(
        model_config, config.loqt, dtype=trained_dtypes.pop(), task=config.model.task, model_class=model_class
    )
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # shapes
        raise ExportError(f"{checkpoint.path} does not fit the model it describes: {error}") from error
    masters = {}
    if "optimizer" in checkpoint.groups():
        masters = saved_masters(checkpoint, {name: p.shape for name, p in model.named_parameters()})
    for name, master in masters.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(master, requires_grad=False))
    tie_weights(model)
    absent = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if absent or unexpected:
        raise ExportError(
            f"{checkpoint.path} does not fit the model it describes: it lacks {absent or 'nothing'} and has "
            f"{unexpected or 'nothing'} too much ({len(missing)} names were not found)"
        )
    return model.eval(), model_config
