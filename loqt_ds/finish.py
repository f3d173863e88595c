"""After the last step: export, reload with transformers, compare perplexities, sample, and say what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.core.quantization import BUFFERS
from loqt_ds.data import Tokenizer
from loqt_ds.evaluation import Evaluation
from loqt_ds.export import export_model, load_export
from loqt_ds.generation import answer_greedily, only_what_is_asked
from loqt_ds.memory import Division, plan
from loqt_ds.method.conversion import TASKS, loqt_layers
from loqt_ds.method.description import num_positions
from loqt_ds.run import Run
from loqt_ds.trainer import ticker

Say = Callable[[str], None]


def collect(run: Run) -> Finished:
    """What rank 0 needs of the others to `finish`; frees the rest. Collective, and the last one of a run."""
    ranks = run.engine.ranks
    output = ranks.on_main(lambda: _export_directory(run))
    masters = {name: tensor.cpu() for name, tensor in run.engine.masters().items()} if output is not None else {}
    # The optimizer's memory makes room for the reloaded model; masters wait on the host.
    is_sampled = run.config.eval.num_samples and run.config.model.task == "causal_lm"
    run.engine.release(keep=output is not None or bool(is_sampled))
    for layer in loqt_layers(run.engine.network).values():
        layer.stop_keeping_dequantized()
    BUFFERS.clear()
    if run.engine.device.type == "cuda":
        torch.cuda.empty_cache()
    return Finished(output, masters)


@dataclass
class Finished:
    """Where to export to (None: nothing is to be exported), and the float32 masters, on rank 0."""

    output: Path | None
    masters: dict[str, Tensor]


def finish(run: Run, trained: Evaluation, finished: Finished, *, say: Say) -> None:
    """Exports, evaluates what transformers loads back, prints both perplexities and continuations, points onward. On
    rank 0."""
    config = run.config
    say("")
    say(f"trained model:   {trained.describe()}")
    sampled = run.engine.network
    if config.export.format != "none":
        sampled = _export(run, trained, finished, say)
    if (loss := run.data.summary.get("unigram_loss")) is not None:
        say(describe_frequencies(loss, config.model.task))
    if config.eval.num_samples and config.model.task == "causal_lm":
        _say_samples(run, sampled, say)
    _say_onward(run, say)


def describe_frequencies(loss: float, task: str) -> str:
    """`unigram_loss` of the data in one line, for people: what a model reaches that has never seen an input."""
    if task == "regression":
        return f"the mean of the training numbers alone: loss {loss:.4f}"
    if task == "classification":
        return f"class frequencies alone: loss {loss:.4f}"
    return f"token frequencies alone: loss {loss:.4f}, perplexity {Evaluation(loss, 0, task=task).perplexity:.2f}"


def make_room(
    network: nn.Module, device: torch.device, num_bytes: int, *, limit_gib: float | None = None, say: Say
) -> torch.device:
    """Moves the trained network to the host where the card, or the limit on it, has no room for `num_bytes` beside it:
    a card that training fills as planned would otherwise run out of memory after the last step. The export is then made
    on the host.

    Returns where the exported model is loaded: the host, if the card has no room for it alone (of weights that were
    sharded over several)."""
    if device.type != "cuda":
        return device
    if num_bytes > (free := _free_bytes(device, limit_gib)):
        say(
            f"{device} has no room for the exported model ({num_bytes / 2**30:.2f} GiB) beside the trained one "
            f"({free / 2**30:.2f} GiB are free): the export is made and compared on the host"
        )
        network.to("cpu")
        torch.cuda.empty_cache()
        if num_bytes > (free := _free_bytes(device, limit_gib)):
            say(
                f"{device} has no room for it alone ({free / 2**30:.2f} GiB): it is loaded and evaluated on the host, "
                "which takes long; a smaller eval.max_tokens shortens it"
            )
            return torch.device("cpu")
    return device


def _free_bytes(device: torch.device, limit_gib: float | None) -> int:
    """What this process may still use of a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    return free if limit_gib is None else min(free, int(limit_gib * 2**30) - allocated)


def _export_directory(run: Run) -> Path | None:
    """A run that went on after an export keeps it, and writes run/export-step_N beside it; one that had nothing left to
    do writes none."""
    if run.config.export.format == "none":
        return None
    output = run.directory / "export"
    if output.exists():
        output = run.directory / f"export-step_{run.engine.step_index}"
    if output.exists() or (output.name != "export" and not run.trainer.num_steps_taken):
        return None
    return output


def _export(run: Run, trained: Evaluation, finished: Finished, say: Say) -> nn.Module:
    """Writes the export, reloads it, evaluates it; returns the reloaded model, or the trained one where there is
    nothing to write."""
    config, output, masters = run.config, finished.output, finished.masters
    if output is None:
        say(f"{run.directory} holds an export of this step already: nothing was trained since, nothing is written")
        return run.engine.network
    # Rank 0 exports alone, whatever was divided before.
    planned = plan(config, vocab_size=int(run.model_config.vocab_size), division=Division()).entries
    # As much again for the evaluation, and what answers need.
    needed = planned["export_model"] + 2 * planned["export_workspace"] + planned["answers"]
    limit_gib = config.train.memory_limit_gib
    device = make_room(run.engine.network, run.engine.device, needed, limit_gib=limit_gib, say=say)
    report = export_model(
        run.engine.network,
        model_config=run.model_config,
        tokenizer_dir=run.tokenizer_dir,
        output_dir=output,
        format=config.export.format,
        masters=masters,
        base_dir=None if config.export.base is None else Path(config.export.base),
        base_option="export.base",
        generation=run.generation,
        say=say,
    )
    reloaded = load_export(report.output_dir, device=str(device))
    result = replace(run.evaluator, device=device)(reloaded, tick=ticker(say))
    run.logger.event(
        "export",
        {
            "step": run.engine.step_index,
            "path": str(report.output_dir),
            "format": config.export.format,
            "num_bytes": report.num_bytes,
            **{f"{name}_trained": value for name, value in trained.record().items() if name != "num_tokens"},
            **result.record(),
        },
    )
    say(
        f"exported model:  {result.describe()} "
        f"({config.export.format}, {report.num_bytes / 2**20:.1f} MiB, as transformers loads it)"
    )
    return reloaded


@torch.no_grad()
def sample(
    model: Any, tokenizer: Tokenizer, prompt: list[int], *, num_tokens: int, seed: int, device: torch.device
) -> list[int]:
    """Continues a prompt by sampling at temperature 0.8 from the 50 most probable tokens; returns the new ids.

    Draws from its own random state: the run's is left as it was.
    """
    was_training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), only_what_is_asked(model):
            torch.manual_seed(seed)
            ids = torch.tensor([prompt], device=device)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=True,
                temperature=0.8,
                top_k=50,
                eos_token_id=tokenizer.eot_id,
                pad_token_id=tokenizer.pad_id,
            )
    finally:
        model.train(was_training)
    return output[0, len(prompt) :].tolist()


def _say_samples(run: Run, model: nn.Module, say: Say) -> None:
    """Continuations of the first tokens of held-out rows, or answers to questions that leave room for them: never more
    than the model sees."""
    options, tokenizer, device = run.config.eval, run.tokenizer, next(model.parameters()).device
    longest = num_positions(run.model_config) or sys.maxsize
    say("")
    if run.data.questions:
        room = longest - options.sample_tokens
        prompts = [q.prompt for q in run.data.questions if len(q.prompt) <= room][: options.num_samples]
        made = answer_greedily(
            model,
            prompts,
            max_new_tokens=options.sample_tokens,
            batch_size=1,
            eot_id=tokenizer.eot_id,
            pad_id=tokenizer.pad_id,
            device=device,
        )
        _say_continuations("held-out prompt ⟶ answer", tokenizer, prompts, made, say)
        return
    prompt_length = min(32, max(1, run.config.data.sequence_length // 2), longest - 1)
    rows = islice((row for batch in run.data.validation.batches(1) for row in batch["input_ids"]), options.num_samples)
    prompts = [[token for token in row[:prompt_length].tolist() if token != tokenizer.pad_id] for row in rows]
    made = [
        sample(
            model,
            tokenizer,
            prompt,
            num_tokens=min(options.sample_tokens, longest - len(prompt)),
            seed=run.config.train.seed + number,
            device=device,
        )
        for number, prompt in enumerate(prompts)
    ]
    _say_continuations("held-out text ⟶ continuation", tokenizer, prompts, made, say)


def _say_continuations(
    what: str, tokenizer: Tokenizer, prompts: list[list[int]], continuations: list[list[int]], say: Say
) -> None:
    for number, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True), start=1):
        say(f"--- sample {number}: {what}")
        say(f"{tokenizer.decode(prompt)} ⟶ {tokenizer.decode(ids)}")


def _say_onward(run: Run, say: Say) -> None:
    directory = shlex.quote(str(run.directory))
    checkpoints = sorted((run.directory / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    say("")
    say(f"run directory:   {run.directory}")
    say("  config.yaml      every option of this run")
    say("  metrics.jsonl    one JSON object a line; tensorboard/ has the same as curves")
    say("  checkpoints/     to go on from" + (", newest " + checkpoints[-1].name if checkpoints else ""))
    best = sorted((run.directory / "best").glob("step_*"))
    if best:
        say(f"  best/            the best {run.config.eval.metric}: {best[-1].name}")
    reader = f"{TASKS[run.config.model.task]}.from_pretrained"
    for export in sorted(run.directory.glob("export*")):
        is_adapter = (export / "adapter").is_dir()
        say(
            f"  {export.name + '/':<16} for {'PeftModel.from_pretrained, base/ and adapter/' if is_adapter else reader}"
        )
    say("next:")
    say(f"  tensorboard --logdir {directory}/tensorboard")
    if best or checkpoints:
        chosen = shlex.quote(str((best or checkpoints)[-1]))
        say(f"  python tools/export.py --checkpoint {chosen} --format bf16 --output exported")
    say("  python -m loqt_ds.train --help")
