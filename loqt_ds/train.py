"""Command line: `python -m loqt_ds.train [--config RECIPE] [section.field=value ...]`.

Parse, build, train, finish. `launch/pretrain.py` calls the same `main` with a DeepSpeed configuration, in as many
processes as its launcher starts; `launch/finetune.py` with one or without, for recipes whose data are examples. What
goes wrong is caught here and nowhere else (see `failures`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from loqt_ds.config import Config, ConfigError, help_text, load_config

if TYPE_CHECKING:
    from loqt_ds.failures import Voice
    from loqt_ds.run import Run

USAGE_ERROR, FAILED = 2, 1


def set_environment() -> None:
    """What has to be decided before torch and the others are imported; what the user has set stays."""
    # Threads that spin while they wait make a CPU run several times slower as soon as anything else runs beside it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    names = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"  # until torch 2.8, and since
    if not any(name in os.environ for name in names):
        # Matrices of two shapes and activations of all lengths take turns: fixed segments would leave gaps.
        is_new = tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 9)
        os.environ[names[is_new]] = "expandable_segments:True"
    if _num_processes() > 1:
        # Otherwise each rank tells of a connection that another one closed, with the C++ stack.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # DeepSpeed's own calls, which torch 2.13 wants under new names.
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)


def _num_processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parse(arguments: Sequence[str] | None, *, deepspeed: bool, finetune: bool = False) -> argparse.Namespace:
    """--config, overrides, and --ds_config: required where DeepSpeed runs, optional for fine-tuning."""
    what = "Train a language model with LoQT: 4-bit weights, low-rank factors, merged at growing intervals."
    if finetune:
        what = (
            "Fine-tune a model on prompts and responses, or on classes, with LoQT; on one device without --ds_config."
        )
    program = "finetune" if finetune else "pretrain"
    parser = argparse.ArgumentParser(
        prog=f"launch/{program}.py" if deepspeed or finetune else "python -m loqt_ds.train",
        description=what,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        default="default",
        help="a recipe: a name in configs/recipes/ or the path of a YAML file (default: %(default)s)",
    )
    if deepspeed or finetune:
        parser.add_argument(
            "--ds_config", required=deepspeed, help="DeepSpeed configuration, such as configs/zero2.json"
        )
        # The environment says the same, and torchrun says it there only.
        parser.add_argument("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not read")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="options of the recipe to change")
    with _only_the_first_speaks():
        return parser.parse_intermixed_args(arguments)


@contextlib.contextmanager
def _only_the_first_speaks() -> Iterator[None]:
    """What all processes would print alike (a wrong command line, help) only the first does."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def main(arguments: Sequence[str] | None = None, *, deepspeed: bool = False, finetune: bool = False) -> int:
    """`deepspeed`: with --ds_config; `finetune`: with or without, and data that are examples.

    Returns the exit status: 0, 1 (training failed), 2 (a mistake in the request), 128 + n (signal n).

    One of several processes does not return if the run fails, on it or another; it exits with that status.
    """
    options = parse(arguments, deepspeed=deepspeed, finetune=finetune)
    deepspeed = getattr(options, "ds_config", None) is not None
    set_environment()
    from loqt_ds.stopping import sigterm_raises

    if not deepspeed and _num_processes() > 1:
        with _only_the_first_speaks():
            what = "launch/finetune.py without --ds_config" if finetune else "`python -m loqt_ds.train`"
            several = "give --ds_config" if finetune else "launch/pretrain.py with --ds_config in several"
            text = f"WORLD_SIZE={_num_processes()}: {what} runs in one process; start one, or {several}"
            print(f"error: {text}", file=sys.stderr)
        return USAGE_ERROR
    with sigterm_raises():
        try:
            config, problem = _read(options, finetune=finetune)
            if problem is not None and _num_processes() == 1:
                raise problem  # at once: joining loads DeepSpeed
            voice = _join(config, deepspeed=deepspeed)
        except KeyboardInterrupt as error:
            with _only_the_first_speaks():
                print(f"stopped by {_signal_of(error).name} before the first step", file=sys.stderr)
            return 128 + _signal_of(error)
        except Exception as error:
            if _num_processes() == 1 and not isinstance(error, ValueError | OSError):
                raise
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {_what_kept_apart(error)}", file=sys.stderr)
            return USAGE_ERROR
        return _run(options, config, problem, voice, deepspeed=deepspeed)


def _signal_of(error: KeyboardInterrupt) -> signal.Signals:
    from loqt_ds.stopping import Terminated

    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


def _read(options: argparse.Namespace, *, finetune: bool) -> tuple[Config, Exception | None]:
    """The configuration, or what is wrong with it: to be told once all processes can hear it."""
    try:
        config = load_config(options.config, options.overrides)
        if finetune and config.data.format == "text":
            raise ConfigError(
                f"launch/finetune.py with data.format=text of --config {options.config}: it trains on examples; give a "
                "recipe with data.format=instruction or classification, or use launch/pretrain.py"
            )
        return config, None
    except (ValueError, OSError) as error:
        return Config(), error


def _join(config: Config, *, deepspeed: bool) -> Voice:
    """Meets the other processes."""
    from loqt_ds.failures import Voice

    if not deepspeed:
        return Voice()
    from loqt_ds.engines.deepspeed import start_distributed

    seconds = config.train.collective_timeout_seconds
    return Voice(start_distributed(timeout_seconds=seconds), timeout_seconds=seconds)


def _what_kept_apart(error: Exception) -> str:
    """Why the processes could not meet."""
    if isinstance(error, ValueError):
        return str(error)
    address, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
    text = f"the {_num_processes()} processes could not meet at {address}:{port}"
    if "EADDRINUSE" in str(error):
        return f"{text}: another run has the port; give the launcher another one (--master_port)"
    return f"{text} ({' '.join(str(error).split())[:300]})"


def _run(
    options: argparse.Namespace, config: Config, problem: Exception | None, voice: Voice, *, deepspeed: bool
) -> int:
    from torch import OutOfMemoryError
    from torch.distributed import destroy_process_group

    from loqt_ds.engines.base import ReplicaMismatch
    from loqt_ds.finish import collect, finish
    from loqt_ds.run import prepare
    from loqt_ds.stopping import Interrupted
    from loqt_ds.trainer import TrainingFailed

    run: Run | None = None
    try:
        voice.ranks.agree(problem)
        run = prepare(config, ds_config=options.ds_config if deepspeed else None, voice=voice)
        voice.advice = run.trainer.last_checkpoint
        with run.logger:
            trained = run.trainer.fit()
            finished = collect(run)
            voice.close()
            if voice.ranks.world_size > 1:
                destroy_process_group()  # before rank 0 is left alone
            if voice.ranks.is_main:
                finish(run, trained, finished, say=run.logger.say)
        return 0
    except Interrupted as error:
        text = str(error) if error.everywhere else f"{error} {voice.advice()}"
        return voice.end(error, text, status=128 + error.signum)
    except KeyboardInterrupt as error:  # training itself turns the signal into Interrupted
        when = " before the first step" if run is None else f". {voice.advice()}"
        return voice.end(error, f"stopped by {_signal_of(error).name}{when}", status=128 + _signal_of(error))
    except TrainingFailed as error:
        return voice.end(error, f"error: {error}")
    except (ValueError, OSError, OutOfMemoryError, ReplicaMismatch) as error:
        if run is not None:
            return voice.end(error, f"error: {error}. {voice.advice()}")
        return voice.end(
            error, f"error: {error}", status=USAGE_ERROR if isinstance(error, ValueError | OSError) else FAILED
        )
    except Exception as error:
        if voice.ranks.world_size == 1:
            raise
        text = f"error: {type(error).__name__}: {error}. {voice.advice()}"
        return voice.end(error, text.strip(), with_traceback=True)


if __name__ == "__main__":
    sys.exit(main())
