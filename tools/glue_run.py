"""One fine-tuning of a comparison on GLUE: one task, one method, one seed, from one encoder.

    full     every weight trained, torch's AdamW
    lora     frozen weights and PEFT's LoRA beside the linears that LoQT adapts (arXiv 2106.09685); alpha is the rank
    loqt     this project, merging every so many steps
    nomerge  this project, one initialization (loqt.schedule=never)

All see the same rows in the same order, and start from the same weights, the drawn classifier's included. The rate
falls linearly after a warm-up of a tenth, gradients are clipped to the norm 1, and what is judged is the model after
the last step. lora, loqt and nomerge train their factors and the classifier with its pooler, and nothing else; the
classifier has the same rate in all of them. loqt and nomerge are runs of the product, of the recipe `glue_small`; their
first step only finds P, so that their factors get one update less than the others'.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rivals_base import imported
from torch import Tensor, nn

from loqt_ds.config import Config, load_config
from loqt_ds.core.schedules import LRSchedule
from loqt_ds.data import build_data, load_or_train_tokenizer
from loqt_ds.data.glue import TASKS
from loqt_ds.evaluation import evaluate, model_inputs, num_predicted, summed_loss
from loqt_ds.method import head
from loqt_ds.method.conversion import build_empty, checkpoint_files, target_linears, task_head_parameters, tie_weights
from loqt_ds.preflight import configure_model, resolve_config
from loqt_ds.run import prepare

Say = Callable[[str], None]

# Directories of the five tasks that are there, and steps of 32 rows that fit into half an hour with all others.
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE"}
STEPS = {"cola": 240, "sst2": 240, "mrpc": 115, "stsb": 180, "rte": 78}
METHODS = ("full", "lora", "loqt", "nomerge")
# Peak rates of what a method trains in the place of the adapted linears, from which --search starts, and of the
# classifier.
RATES = {"full": 3e-3, "lora": 3e-3, "loqt": 3e-3, "nomerge": 3e-3}
RATE_OF_HEAD = 1e-3


@dataclass(frozen=True)
class Spec:
    """One run. interval: steps between merges."""

    task: str
    method: str
    seed: int
    lr: float
    steps: int
    rows: int = 32
    length: int = 128
    rank: int = 32
    interval: int = 60

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-seed{self.seed}-lr{self.lr:g}-steps{self.steps}"


def config_of(spec: Spec, base: Path, glue: Path, output: Path) -> Config:
    """The product's run of this description; others take the data and the model from it."""
    labels = TASKS[spec.task].labels
    task = ["model.task=classification", f"model.num_labels={len(labels)}"]
    if not labels:
        task = ["model.task=regression", "model.num_labels=null"]
    schedule = ["loqt.schedule=static", f"loqt.interval={spec.interval}"]
    if spec.method == "nomerge":
        schedule = ["loqt.schedule=never", "loqt.interval=100"]
    options = [
        f"model.path={base}",
        *task,
        *schedule,
        f"loqt.rank={spec.rank}",
        f"data.glue_task={spec.task}",
        f"data.path={glue / FOLDERS[spec.task]}",
        f"data.sequence_length={spec.length}",
        f"optim.lr={spec.lr}",
        f"optim.lr_full_rank={RATE_OF_HEAD}",
        f"train.seed={spec.seed}",
        f"train.max_steps={spec.steps}",
        f"train.micro_batch_size={spec.rows}",
        "train.dtype=fp32",
        "train.device=cpu",
        "eval.every=0",
        f"checkpoint.every={spec.steps}",
        "checkpoint.best=false",
        "logging.tensorboard=false",
        "logging.progress=none",
        "export.format=none",
        f"output_dir={output}",
    ]
    return load_config("glue_small", options)


def run(spec: Spec, base: Path, glue: Path, work: Path) -> dict[str, Any]:
    """Trains and judges; what is known of it. Raises ValueError for data or an encoder that cannot be used."""
    output = work / f"{spec.name}.run"
    shutil.rmtree(output, ignore_errors=True)  # of a process that was ended
    config = config_of(spec, base, glue, output)
    started = time.perf_counter()
    result = _product(config) if spec.method in ("loqt", "nomerge") else _dense(spec, config)
    shutil.rmtree(output, ignore_errors=True)  # its checkpoints
    return {"spec": asdict(spec), "seconds": time.perf_counter() - started, **result}


def _silent(_: str) -> None:
    """What a run says is not shown: there are sixty of them."""


def _product(config: Config) -> dict[str, Any]:
    made = prepare(config, say=_silent)
    try:
        with redirect_stdout(io.StringIO()), made.logger:
            judged = made.trainer.fit()
    finally:
        if made.lock is not None:
            made.lock.file.close()
    trained = sum(p.numel() for p in made.engine.network.parameters() if p.requires_grad)
    blind = made.data.summary["unigram_loss"]
    return {"trained_parameters": trained, "final": judged.record(), "blind_loss": blind}


def dense_model(config: Config, description: Any) -> nn.Module:
    """transformers' model with the weights that the product reads and draws, in float32."""
    assert config.model.path is not None
    model = build_empty(description, attention=config.model.attention, task=config.model.task)
    source = checkpoint_files(config.model.path, seed=config.train.seed)(model)
    with torch.no_grad():
        for path, module in model.named_modules():
            if list(module.named_parameters(recurse=False)):
                for name, tensor in source.module(path, module).items():
                    module.register_parameter(name, nn.Parameter(tensor.float()))
    tie_weights(model)
    return model


def add_lora(model: nn.Module, rank: int) -> None:
    """PEFT's LoRA beside the linears that LoQT adapts; they and the classifier are all that is trained."""
    peft = imported("peft", "peft")
    trained = task_head_parameters(model)
    targets = list(target_linears(model, "all-linear"))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    peft.inject_adapter_in_model(config, model)  # freezes all but the adapters
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)


def _dense(spec: Spec, config: Config) -> dict[str, Any]:
    device = torch.device("cpu")
    config = resolve_config(config, device)
    tokenizer = load_or_train_tokenizer(config, _silent)
    description = configure_model(config, tokenizer)
    data = build_data(config, tokenizer, say=_silent)
    torch.manual_seed(spec.seed)
    model = dense_model(config, description)
    of_head = task_head_parameters(model)
    if spec.method == "lora":
        add_lora(model, spec.rank)
    head.install(model, task=config.model.task)
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if name not in of_head], "lr": spec.lr},
        {"params": [p for name, p in trained.items() if name in of_head], "lr": RATE_OF_HEAD},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    rates = LRSchedule("linear", max_steps=spec.steps, warmup_steps=config.num_warmup_steps, min_ratio=0.0)
    for step in range(spec.steps):
        for group, peak in zip(optimizer.param_groups, (spec.lr, RATE_OF_HEAD), strict=True):
            group["lr"] = peak * rates.multiplier(step)
        _step(model, optimizer, data.train.next_batch(), list(trained.values()))
    assert data.scorer is not None
    batches = data.validation.batches(spec.rows)
    judged = evaluate(model, batches, device, task=config.model.task, scorer=data.scorer())
    num_trained = sum(parameter.numel() for parameter in trained.values())
    blind = data.summary["unigram_loss"]
    return {"trained_parameters": num_trained, "final": judged.record(), "blind_loss": blind}


def _step(model: nn.Module, optimizer: Any, batch: dict[str, Tensor], trained: list[Tensor]) -> None:
    inputs, targets = model_inputs(batch, torch.device("cpu"))
    (summed_loss(model, inputs, targets) / num_predicted(batch)).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
