"""`python -m loqt_ds.export --checkpoint DIR --format nf4|bf16|adapter|gguf --output DIR`: export a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loqt_ds.export import FORMATS, export_checkpoint
from loqt_ds.export.gguf import TYPES
from loqt_ds.export.report import how_to_load
from loqt_ds.export.run import DEFAULT_MAX_SHARD_SIZE_GIB


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (2 for whatever the user can put right)."""
    parser = argparse.ArgumentParser(prog="python -m loqt_ds.export", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a step_N directory, or a run directory (its best checkpoint if it has kept one, else its newest)",
    )
    parser.add_argument("--output", required=True, type=Path, help="directory to make; must not exist or be empty")
    parser.add_argument(
        "--format",
        default="nf4",
        choices=FORMATS,
        help="nf4: merged 4-bit; bf16: merged dense; adapter: not merged, DIR/base and DIR/adapter for PEFT; "
        "gguf: merged, DIR/model.gguf for llama.cpp (default: %(default)s)",
    )
    parser.add_argument(
        "--base", type=Path, help="with --format adapter: write only the adapter, over this base of an earlier export"
    )
    parser.add_argument(
        "--gguf-type",
        default="bf16",
        choices=TYPES,
        help="with --format gguf: how matrices are stored (default: %(default)s)",
    )
    parser.add_argument(
        "--double-quant", action="store_true", help="store the scales in 8 bits (0.4 bits a weight less, not exact)"
    )
    parser.add_argument(
        "--max-shard-size-gib",
        type=float,
        default=DEFAULT_MAX_SHARD_SIZE_GIB,
        help="split the weights into files of at most this size (default: %(default)s)",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not reload the export and compare it")
    options = parser.parse_args(arguments)
    try:
        report = export_checkpoint(
            options.checkpoint,
            options.output,
            format=options.format,
            double_quant=options.double_quant,
            max_shard_size_gib=options.max_shard_size_gib,
            verify=not options.no_verify,
            base_dir=options.base,
            gguf_type=options.gguf_type,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"in {report.output_dir}; {how_to_load(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
