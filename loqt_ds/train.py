"""Command line: `python -m loqt_ds.train [--config RECIPE] [section.field=value ...]`.

Parse, build, train, finish. `launch/pretrain.py` calls the same `main` in as many processes as its launcher starts,
with a DeepSpeed configuration or engine=fsdp2; `launch/finetune.py` with these or on one device, for recipes whose data
are examples. What goes wrong is caught here and nowhere else (see `failures`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from loqt_ds.config import Config, ConfigError, help_text, load_config

if TYPE_CHECKING:
    from loqt_ds.failures import Voice
    from loqt_ds.run import Run

USAGE_ERROR, FAILED = 2, 1

FIRST_SPEAKS_SECONDS = 30.0  # for the first process of a node, which may be importing yet, to say what is wrong


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


def parse(arguments: Sequence[str] | None, *, launched: bool, finetune: bool = False) -> argparse.Namespace:
    """--config, overrides, and --ds_config where a launcher may start several processes."""
    what = "Train a language model with LoQT: 4-bit weights, low-rank factors, merged at growing intervals."
    if finetune:
        what = (
            "Fine-tune a model on prompts and responses, or on classes, with LoQT; on one device without --ds_config."
        )
    program = "finetune" if finetune else "pretrain"
    parser = argparse.ArgumentParser(
        prog=f"launch/{program}.py" if launched else "python -m loqt_ds.train",
        description=what,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        default="default",
        help="a recipe: a name in configs/recipes/ or the path of a YAML file (default: %(default)s)",
    )
    if launched:
        parser.add_argument(
            "--ds_config",
            help="DeepSpeed configuration, such as configs/zero2.json; without it, engine=fsdp2"
            + (" or one device" if finetune else ""),
        )
        # The environment says the same, and torchrun says it there only.
        parser.add_argument("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not read")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="options of the recipe to change")
    with _only_the_first_speaks():
        try:
            return parser.parse_intermixed_args(arguments)
        except SystemExit as end:
            if end.code:  # not --help
                _let_the_first_speak()
            raise


# ---------------------------------------------------------------- what all processes see, told once


def _is_first() -> bool:
    """Whether this process speaks for those of its node, before they have met."""
    return _num_processes() == 1 or os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


@contextlib.contextmanager
def _only_the_first_speaks() -> Iterator[None]:
    """What all processes would print alike (a wrong command line, help) only the first of a node does."""
    if _is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _let_the_first_speak() -> None:
    """Lets another process than the first wait before it fails: launchers end all as soon as one has failed, and it is
    ended here, unless it fails alone."""
    if _is_first():
        return
    try:
        time.sleep(FIRST_SPEAKS_SECONDS)
    except KeyboardInterrupt as error:
        sys.exit(128 + _signal_of(error))


def _refuse(problem: Exception | str) -> int:
    """Says what is wrong, and returns the exit status. The first process of a node does so at once, another one if it
    has not been ended: it alone has the problem."""
    _let_the_first_speak()
    who = "" if _is_first() else f" (rank {os.environ.get('RANK', '?')})"
    print(f"error{who}: {problem}", file=sys.stderr)
    return USAGE_ERROR


# ---------------------------------------------------------------- parse, build, train, finish


def main(arguments: Sequence[str] | None = None, *, launched: bool = False, finetune: bool = False) -> int:
    """`launched`: by a launcher, which may start several processes; `finetune`: data are examples.

    Returns the exit status: 0, 1 (training failed), 2 (a mistake in the request), 128 + n (signal n).

    One of several processes does not return if the run fails, on it or another; it exits with that status.
    """
    options = parse(arguments, launched=launched, finetune=finetune)
    deepspeed = getattr(options, "ds_config", None) is not None
    set_environment()
    from loqt_ds.stopping import sigterm_raises

    with sigterm_raises():
        try:
            config, problem = _read(options, finetune=finetune)
            several = deepspeed or config.engine == "fsdp2"
            if problem is None and not several:
                problem = _wrong_start(launched=launched, finetune=finetune)
            if problem is not None and not (deepspeed and _num_processes() > 1):
                return _refuse(problem)  # at once: joining loads DeepSpeed
            voice = _join(config, deepspeed=deepspeed)
        except KeyboardInterrupt as error:
            with _only_the_first_speaks():
                print(f"stopped by {_signal_of(error).name} before the first step", file=sys.stderr)
            return 128 + _signal_of(error)
        except Exception as error:
            if _num_processes() == 1 and not isinstance(error, ValueError | OSError):
                raise
            return _refuse(_what_kept_apart(error))
        return _run(options, config, problem, voice, deepspeed=deepspeed)


def _wrong_start(*, launched: bool, finetune: bool) -> Exception | None:
    """What is wrong with starting one device's engine like this."""
    if _num_processes() > 1:
        what = f"launch/{'finetune' if finetune else 'pretrain'}.py" if launched else "`python -m loqt_ds.train`"
        return ConfigError(
            f"WORLD_SIZE={_num_processes()}: {what} without --ds_config and engine=fsdp2 runs in one process; start "
            "one, or give one of the two" + ("" if launched else " to launch/pretrain.py")
        )
    if launched and not finetune:
        return ConfigError(
            "launch/pretrain.py: give --ds_config, such as configs/zero2.json, or engine=fsdp2; or start "
            "`python -m loqt_ds.train`"
        )
    return None


def _signal_of(error: KeyboardInterrupt) -> signal.Signals:
    from loqt_ds.stopping import Terminated

    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


def _read(options: argparse.Namespace, *, finetune: bool) -> tuple[Config, Exception | None]:
    """The configuration, or what is wrong with it: to be told once all processes can hear it."""
    try:
        config = load_config(options.config, options.overrides)
        if config.engine == "fsdp2" and getattr(options, "ds_config", None) is not None:
            raise ConfigError(
                f"engine=fsdp2 with --ds_config {options.ds_config}: DeepSpeed is the other engine; leave one of them "
                "out"
            )
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

    seconds = config.train.collective_timeout_seconds
    if deepspeed:
        from loqt_ds.engines import deepspeed as engine

        return Voice(engine.start_distributed(timeout_seconds=seconds), timeout_seconds=seconds)
    if config.engine == "fsdp2":
        from loqt_ds.engines import fsdp

        return Voice(fsdp.start_distributed(timeout_seconds=seconds), timeout_seconds=seconds)
    return Voice()


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
