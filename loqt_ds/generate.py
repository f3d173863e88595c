"""`python -m loqt_ds.generate --model DIR`: text from what was trained, for a look at it.

DIR is an export (nf4, bf16, base and adapter, or gguf), a run directory (its best checkpoint, where it has kept one,
else its newest), or a checkpoint of it (`step_N`). `--adapter` takes an adapter over the base DIR. Without
`--prompt`, a terminal is asked for prompts one by one, and anything else is read to its end as one prompt. A run that
was trained on prompts and responses sees a prompt as its training did; for exports, `--template` or `--chat` says
what comes around it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loqt_ds.config import DataConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loqt_ds.data import Tokenizer

USAGE_ERROR = 2
LEAST_TEMPERATURE = 1e-30  # divided by less, logits are infinite in float32


@dataclass(frozen=True)
class Loaded:
    """A model that writes, and its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer
    opening: Callable[[str], list[int]]
    """A prompt as the model sees it."""
    what: str
    """For the person who asked."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: among the `top_k` most probable at a temperature; temperature 0: the first."""

    max_new_tokens: int
    temperature: float
    top_k: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (2 for whatever the user can put right)."""
    parser = argparse.ArgumentParser(
        prog="python -m loqt_ds.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, type=Path, help="an export, a run directory, or a checkpoint (step_N)"
    )
    parser.add_argument("--adapter", type=Path, help="an adapter over the base that --model is")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer's directory, where the model has none beside it")
    parser.add_argument("--prompt", nargs="+", help="texts to continue, each by itself")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--template", help=r"what comes around a prompt, such as 'Q: {prompt}\nA:' (\n: a line break)")
    either.add_argument("--chat", action="store_true", help="a prompt is a user's message, by the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the most probable token (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=50, help="sample among this many tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, or cuda:N")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _check(options)
        around = None
        if options.template is not None or options.chat:
            # As training reads rows of messages: by the tokenizer's own chat template.
            around = DataConfig(prompt_template=options.template, messages_field="messages" if options.chat else None)
        device = _device(options.device)
        loaded = load(options.model, options.adapter, options.tokenizer, around=around, device=device)
        print(loaded.what, file=sys.stderr)
        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_k)
        for number, prompt in enumerate(_prompts(options.prompt)):
            write(loaded, prompt, sampling, seed=options.seed + number)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for what no model can do."""
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens={options.max_new_tokens} must be at least 1")
    if not (options.temperature == 0 or options.temperature >= LEAST_TEMPERATURE):
        raise ValueError(
            f"--temperature={options.temperature} must be 0 (the most probable token), or at least "
            f"{LEAST_TEMPERATURE:g}"
        )
    if not -(2**63) <= options.seed < 2**64 - len(options.prompt or ()):
        raise ValueError(f"--seed={options.seed} has more than 64 bits")
    if options.top_k < 1:
        raise ValueError(f"--top-k={options.top_k} must be at least 1")
    if options.template is not None and "{prompt}" not in options.template:
        raise ValueError(f"--template={options.template!r} has no {{prompt}} in it, where the prompt belongs")
    if not options.model.is_dir():
        raise ValueError(f"--model={options.model} is no directory; give an export, a run directory, or a step_N of it")


def _device(wanted: str) -> str:
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device={wanted} is none that a model is loaded on; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device={wanted}: torch sees no CUDA device; use --device cpu")
    return wanted


def _prompts(given: list[str] | None) -> Iterator[str]:
    if given is not None:
        yield from given
    elif not sys.stdin.isatty():
        try:
            yield sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on standard input is not UTF-8 ({error}); convert it") from error
    else:
        print("a prompt, and Enter; nothing, and Enter, to end", file=sys.stderr)
        while True:
            try:
                prompt = input("> ")
            except EOFError:
                return
            if not prompt:
                return
            yield prompt


# ---------------------------------------------------------------- what is loaded


def load(
    model: Path, adapter: Path | None, tokenizer: Path | None, *, around: DataConfig | None, device: str
) -> Loaded:
    """The model of an export, a run directory or a checkpoint, on `device`; `around`: how prompts are written, instead
    of as in training.

    Raises ValueError (of several kinds) where there is none, it cannot be loaded, or it writes no text.
    """
    from loqt_ds.export.loading import Parts, find_parts, load_parts

    parts = find_parts(model)
    if adapter is not None:
        if parts is None:
            raise ValueError(f"--adapter needs the base as --model, and {model} is none: give the base's directory")
        inside = find_parts(adapter, base=parts.model)
        if inside is None or inside.adapter is None:
            raise ValueError(f"--adapter={adapter} holds no adapter_config.json; give the directory of an adapter")
        parts = Parts(parts.model, inside.adapter)
    if parts is None:
        return _load_checkpoint(model, tokenizer, around=around, device=device)
    found = _tokenizer(tokenizer or parts.model)  # before weights
    opening = _opening(around or DataConfig(), found)
    network = _writer(load_parts(parts, device=device), str(model), found)
    over = f" with the adapter {parts.adapter}" if parts.adapter is not None else ""
    return Loaded(network, found, opening, f"{parts.model}{over}, on {device}")


def _load_checkpoint(path: Path, tokenizer: Path | None, *, around: DataConfig | None, device: str) -> Loaded:
    from transformers import GenerationConfig

    from loqt_ds.checkpoint import load_checkpoint
    from loqt_ds.config import from_dict
    from loqt_ds.export.run import best_or_newest, rebuild

    found = best_or_newest(path, say=lambda text: print(text, file=sys.stderr), option="--model")
    checkpoint = load_checkpoint(found, verify=False)
    if tokenizer is None and "tokenizer" not in checkpoint.manifest["directories"]:
        raise ValueError(f"{found} holds no tokenizer; give --tokenizer DIR")
    words = _tokenizer(tokenizer or checkpoint.directory("tokenizer"))
    model, _ = rebuild(checkpoint)
    if checkpoint.metadata.get("generation") and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_dict(checkpoint.metadata["generation"])  # type: ignore[assignment]
    trained = from_dict(checkpoint.metadata["config"], source=str(found)).data
    if trained.format != "instruction":
        trained = DataConfig()
    elif trained.chat_template is not None and not Path(trained.chat_template).is_file():
        # The checkpoint's tokenizer has it, if it is not older than that.
        trained = replace(trained, chat_template=None, messages_field=trained.messages_field or "messages")
    opening = _opening(around or trained, words)
    return Loaded(
        _writer(model.to(device), str(path), words), words, opening, f"{found} (step {checkpoint.step}), on {device}"
    )


def _opening(data: DataConfig, tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Prompts as data of this description begin."""
    from loqt_ds.data.conversation import Reader
    from loqt_ds.data.instruction import beginning_of_text

    reader = Reader(data, tokenizer)
    beginning = [] if reader.is_chat else beginning_of_text(tokenizer)
    return lambda prompt: [*beginning, *tokenizer.encode(reader.opening(prompt))]


def _tokenizer(directory: Path) -> Tokenizer:
    from loqt_ds.data import load_tokenizer

    try:
        return load_tokenizer(str(directory))
    except ValueError as error:
        told = " ".join(str(error).split())  # transformers tells some on several lines
        raise ValueError(f"{told} (--tokenizer DIR takes another directory than the model's)") from error


def _writer(model: Any, name: str, tokenizer: Tokenizer) -> nn.Module:
    """The model, if it writes text, and has a row for each of the tokenizer's ids."""
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        raise ValueError(f"--model={name} is a {type(model).__name__}, which writes no text; give a language model")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"--model={name} is a {type(model).__name__}, which answers a text and does not continue it; give a "
            "language model without an encoder"
        )
    num_rows = int(model.config.get_text_config().vocab_size)
    if tokenizer.vocab_size > num_rows:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, and --model={name} knows {num_rows}: give "
            "the one that it was trained with as --tokenizer DIR"
        )
    writer: nn.Module = model.eval()
    return writer


# ---------------------------------------------------------------- what it writes


class _Printer:
    """What transformers' `generate` hands tokens to as they come; prints the text that they add.

    Everything is decoded each time: alone, the first token of a word has lost the space before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], ends: Sequence[int] = ()) -> None:
        self._tokenizer, self._ids, self._seen_prompt = tokenizer, list(prompt), False
        self._ends = {tokenizer.eot_id, *ends}
        self._printed = len(tokenizer.decode(prompt))

    def put(self, value: Tensor) -> None:
        """The prompt, (1, tokens), and then each token, (1,)."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self._ids += [index for index in value.reshape(-1).tolist() if index not in self._ends]
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose bytes are not all there
            self._print(text)

    def end(self) -> None:
        """After the last token."""
        self._print(self._tokenizer.decode(self._ids))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[self._printed :], end="", flush=True)
        self._printed = len(text)


def _ends(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a text: the tokenizer's, and what the model says itself."""
    own = model.generation_config.eos_token_id
    return [tokenizer.eot_id, *([] if own is None else own if isinstance(own, list) else [own])]


def write(loaded: Loaded, prompt: str, sampling: Sampling, *, seed: int) -> list[int]:
    """Prints the prompt and what the model adds, as it comes; returns the new ids.

    Raises ValueError for a prompt that is no text, or longer than the model's context.
    """
    import torch

    from loqt_ds.generation import only_what_is_asked
    from loqt_ds.method.description import num_positions

    model: Any = loaded.model
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes that Python has let pass
        raise ValueError(f"the prompt is not UTF-8 ({error}); convert it") from error
    ids = loaded.opening(prompt)
    if not ids:
        ids = [loaded.tokenizer.eot_id]  # what every document of the training data came after
    longest = num_positions(model.config.get_text_config())
    if longest is not None and len(ids) >= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, and the model sees {longest}: shorten it")
    num_tokens = sampling.max_new_tokens if longest is None else min(sampling.max_new_tokens, longest - len(ids))
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    torch.manual_seed(seed)
    print(prompt, end="", flush=True)
    ends = _ends(model, loaded.tokenizer)
    with torch.no_grad(), only_what_is_asked(model):
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            eos_token_id=ends,
            pad_token_id=loaded.tokenizer.pad_id,
            streamer=_Printer(loaded.tokenizer, ids, ends),
            **choice,
        )
    new: list[int] = output[0, len(ids) :].tolist()
    if len(new) == num_tokens < sampling.max_new_tokens:
        print(f"(ended at the {longest} tokens that the model sees)", file=sys.stderr)
    return new


if __name__ == "__main__":
    sys.exit(main())
