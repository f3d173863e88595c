"""Command line: `python -m loqt_ds.train [--config RECIPE] [section.field=value ...]`.

Parse, build, train, finish. `launch/pretrain.py` calls the same `main` with a DeepSpeed configuration.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from loqt_ds.config import help_text, load_config

USAGE_ERROR, FAILED = 2, 1


def set_environment() -> None:
    """What has to be decided before torch and the others are imported; what the user has set stays."""
    # Threads that spin while they wait make a CPU run several times slower as soon as anything else runs beside it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)


def parse(arguments: Sequence[str] | None, *, deepspeed: bool) -> argparse.Namespace:
    """--config, overrides, and --ds_config where DeepSpeed runs."""
    parser = argparse.ArgumentParser(
        prog="launch/pretrain.py" if deepspeed else "python -m loqt_ds.train",
        description="Train a language model with LoQT: 4-bit weights, low-rank factors, merged at growing intervals.",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        default="default",
        help="a recipe: a name in configs/recipes/ or the path of a YAML file (default: %(default)s)",
    )
    if deepspeed:
        parser.add_argument("--ds_config", required=True, help="DeepSpeed configuration, such as configs/zero2.json")
        parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="options of the recipe to change")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None, *, deepspeed: bool = False) -> int:
    """Returns the exit status: 0, 1 (training failed), 2 (a mistake in the request), 128 + n (signal n)."""
    options = parse(arguments, deepspeed=deepspeed)
    set_environment()
    try:
        config = load_config(options.config, options.overrides)
        from loqt_ds.run import choose_device, prepare, resolve_config

        ds_config = None
        if deepspeed:
            from loqt_ds.engines.deepspeed import check_deepspeed

            ds_config = check_deepspeed(options.ds_config, resolve_config(config, choose_device(config)))
        run = prepare(config, ds_config=ds_config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("stopped by SIGINT before the first step", file=sys.stderr)
        return 128 + signal.SIGINT
    from torch import OutOfMemoryError

    from loqt_ds.finish import finish
    from loqt_ds.trainer import Interrupted, TrainingFailed

    try:
        with run.logger:
            trained = run.trainer.fit()
            finish(run, trained, say=run.logger.say)
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except (ValueError, OSError, OutOfMemoryError) as error:
        print(f"error: {error}. {run.trainer.last_checkpoint()}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:  # during the export; training itself turns the signal into Interrupted
        print(f"stopped by SIGINT. {run.trainer.last_checkpoint()}", file=sys.stderr)
        return 128 + signal.SIGINT
    except Interrupted as error:
        print(str(error), file=sys.stderr)
        return 128 + error.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
