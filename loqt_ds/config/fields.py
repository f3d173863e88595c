"""Every option of a run: one dataclass a section, one docstring a field.

The docstring under a field is its documentation: `--help` prints it with the default (see `parsing.help_text`), so that
an option cannot exist without being explained. `Literal` types are the list of valid values; the parser refuses any
other. Hyper-parameters that come from the paper (arXiv 2405.16528, section 4 and appendix) say so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ModelConfig:
    """Which model is trained: a shape (drawn from the seed) or a checkpoint."""

    shape: str | None = None
    """Name of a file in configs/models (without .json), or a path to a transformers config .json; weights are drawn
    from train.seed. Give this or model.path."""
    path: str | None = None
    """Directory of a transformers checkpoint (config.json and safetensors) whose weights training starts from."""
    vocab_size: int | Literal["auto"] | None = None
    """Vocabulary of a model built from model.shape: null takes the shape file's, auto takes the tokenizer's size
    rounded up to a multiple of 64."""
    task: Literal["causal_lm", "masked_lm", "classification", "regression"] = "causal_lm"
    """What is predicted: the next token, masked tokens, a class for each row, or a number for each row. For the last
    two the model's head (and its pooler) is trained in full, and drawn from train.seed where the checkpoint has
    none."""
    num_labels: int | None = None
    """Classes of model.task=classification; null: those that the model's description names."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers, eager where a model has no sdpa; flash_attention_2 needs its package, a
    CUDA device and bf16."""
    kernels: Literal["torch", "liger"] = "torch"
    """Who computes normalization, gated activation and loss: torch, or Liger-Kernel's fused kernels (a CUDA device and
    `pip install 'loqt-ds[liger]'`); both keep the same few tensors for the backward."""


@dataclass
class LoQTConfig:
    """The method: which linears are adapted, how they are quantized, when they are re-initialized."""

    rank: int = 128
    """Columns r of the projection P; at most the smaller side of every adapted matrix."""
    alpha: float = 0.5
    """Scale s of the low-rank path, W_eff = W_q + s * (B P^T or P B); it is not divided by the rank."""
    schedule: Literal["exponential", "static", "linear", "never"] = "exponential"
    """When layers are re-initialized: gaps of interval + int(growth^k), interval, interval + int(k * growth) steps, or
    never (one initialization, W then stays fixed, the result is an adapter)."""
    interval: int = 100
    """Smallest gap between re-initializations in steps (tau of the paper)."""
    growth: float = 1.2
    """How gaps grow (psi of the paper): the base for exponential, the slope in steps for linear."""
    max_gap: int | None = None
    """Largest gap in steps; gaps that grow beyond it are cut to it. null: no limit."""
    compensation_steps: int = 5
    """Iterations C of quantization-error compensation at a re-initialization; 0: W is quantized and B starts at
    zero."""
    quantize_w: Literal["nf4", "fp4", "int4", "none"] = "nf4"
    """4-bit format of the frozen weight W, in blocks of 64; none keeps W dense (the paper's LoQT-nq)."""
    quantize_p: Literal["nf4", "fp4", "int4", "none"] = "nf4"
    """4-bit format of the frozen projection P; none keeps P dense."""
    double_quant: Literal["none", "w", "p", "both"] = "none"
    """Whose absmax is quantized again to 8 bits, in blocks of 256: of neither, of W, of P, or of both (true = both,
    false = none)."""
    subspace: Literal["auto", "exact", "gram", "iterated", "sketch"] = "auto"
    """How P is found: exact SVD of the gradient, eigenvectors of its Gram matrix, subspace iteration on the gradient,
    or a randomized sketch that stands for it; auto takes gram up to a smaller side of 128, from there to 512
    iterated (gram where the rank is more than half of it), and sketch above. With several ranks, a sketch needs all of
    them to reach the layers in the same order: experts take iterated then, and a model that drops layers must."""
    sketch_oversampling: int = 32
    """Gaussian columns p added to the rank in a sketch and in subspace iteration."""
    optimizer_state: Literal["keep", "reset", "project", "transport"] = "transport"
    """What a re-initialization does to Adam's moments of B: keep them; reset them to zero; project both to the new P;
    transport: project the first and keep the second, and with it the size of steps (benchmarks/DEFAULTS.md)."""
    side: Literal["auto", "left", "right"] = "auto"
    """Side of W that P sits on: right is the input, left the output, auto the smaller of the two."""
    product: Literal["auto", "factored", "merged"] = "auto"
    """How a layer computes: factored, W_q and the low-rank path apart; merged, with W_eff made for the moment of each
    product, which saves operations where a micro-batch has more tokens than about two thirds of the matrix' width. auto
    merges where that is so and the computation is in fp32; in bf16 W_eff is rounded to bf16."""
    dequantized_cache_gib: float = 0.0
    """Memory for W kept dequantized between re-initializations, in the dtype of the computation, for as many layers as
    fit, first ones first; the others are dequantized for each product. Pays where micro-batches are small."""
    target_modules: str | list[str] = "all-linear"
    """Adapted linears: all-linear (every nn.Linear, Conv1D of GPT-2 and expert but the output head, the head of a task,
    and weights of one row or column, which are trained in full), a regular expression that must match the whole module
    name (of an expert: ...experts.down_proj.3), or a list of name suffixes such as [q_proj, v_proj]."""

    @property
    def double_quant_w(self) -> bool:
        """Whether the absmax values of W are quantized again."""
        return self.double_quant in ("w", "both")

    @property
    def double_quant_p(self) -> bool:
        """Whether the absmax values of P are quantized again."""
        return self.double_quant in ("p", "both")


@dataclass
class DataConfig:
    """Text and how it becomes batches. Neither path nor name: the Python standard library's own source."""

    format: Literal["text", "instruction", "classification"] = "text"
    """What a document is: text; instruction, a prompt and its response (loss on the response only); classification, one
    or two texts and a label."""
    path: str | list[str] | None = None
    """Local .txt, .jsonl or .parquet files, compressed or not: a file, a directory, a glob, or a list of these."""
    name: str | None = None
    """Name of a data set on the Hugging Face hub such as allenai/c4, or a directory that `datasets` can load."""
    config_name: str | None = None
    """Configuration of the named data set, such as en."""
    split: str = "train"
    """Split of the named data set that is trained on."""
    streaming: bool = False
    """Read the named data set while training instead of downloading and tokenizing all of it first."""
    text_field: str = "text"
    """Field of a .jsonl or .parquet row, or of a data set, that holds the text."""
    validation_path: str | list[str] | None = None
    """Local files to validate on, in the forms of data.path."""
    validation_split: str | None = None
    """Split of the named data set to validate on, such as validation."""
    validation_fraction: float = 0.05
    """Share of the documents held out for validation where neither validation_path nor validation_split is given."""
    tokenizer: str | None = None
    """A tokenizer directory, a sentencepiece .model file, or a hub name; null trains one from the corpus."""
    tokenizer_vocab_size: int = 4096
    """Pieces of a tokenizer that is trained from the corpus."""
    sequence_length: int = 256
    """Tokens per row."""
    packing: Literal["packed", "truncated"] = "packed"
    """packed: documents joined with end-of-text and cut to rows, nothing is lost; truncated: one document a row, cut
    and padded, as in the paper's runs (the cut tokens are counted and reported)."""
    mask_documents: bool = False
    """Keep attention of packed rows inside each document."""
    num_processes: int | None = None
    """Processes that tokenize; null: as many as there are processors."""
    cache_dir: str | None = None
    """Where tokenizers and tokenized corpora are kept; null: $LOQT_CACHE, or ~/.cache/loqt_ds."""
    shuffle: bool = True
    """Shuffle rows in every epoch by a permutation drawn from train.seed."""
    prompt_field: str = "prompt"
    """Field that holds the prompt, with data.format=instruction."""
    response_field: str = "response"
    """Field that holds the response, with data.format=instruction."""
    messages_field: str | None = None
    """Field that holds a conversation, a list of {role, content}, instead of prompt and response: it is written out by
    the tokenizer's chat template, or data.chat_template, and every assistant's message is a response. What follows the
    last one is left out, and a conversation that an assistant begins."""
    prompt_template: str | None = None
    """What a prompt is written into, with {prompt} for it, such as "Question: {prompt}\\nAnswer: ", where \\n is a line
    break, \\t a tab and \\\\ a backslash, in a shell as in a file; null: the prompt as it is, or, with
    data.chat_template, as a user's message."""
    chat_template: str | None = None
    """File of a Jinja chat template, instead of the tokenizer's own; prompt and response are then a user's and an
    assistant's message."""
    glue_task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"] | None = None
    """A task of GLUE, with data.format=classification: its columns, classes and metrics are known; data.path is its
    directory of the benchmark's archive (train.tsv, dev.tsv), or data.name is the hub's glue."""
    text_fields: list[str] = field(default_factory=lambda: ["text"])
    """Columns of the text, or of the two texts, that are classified, with data.format=classification."""
    label_field: str = "label"
    """Column of the class, or of the number with model.task=regression, with data.format=classification."""
    labels: list[str] | None = None
    """The classes as the label column calls them, in the order of their numbers, in quotation marks where YAML would
    read something else: ["no", "yes"], ["false", "true"] (also for a column of booleans); null: it holds their numbers,
    from 0."""
    header: bool = True
    """Whether the first row of a .tsv or .csv of examples names its columns; without, they are called 0, 1, 2, ..."""
    quoting: Literal["auto", "none", "csv"] = "auto"
    """Quotation marks of a .tsv or .csv of examples: none, they are text; csv, they enclose fields; auto: csv in a
    .csv, none in a .tsv."""


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adamw8bit"] = "adamw8bit"
    """adamw keeps moments in 32 bits, adamw8bit (bitsandbytes) in 8 bits with a scale for each block of 256."""
    lr: float = 0.01
    """Peak learning rate of B; .01 is the paper's, for B scaled by an alpha of about .5."""
    lr_full_rank: float | None = None
    """Peak learning rate of parameters trained in full (embeddings, norms, head, biases); null: optim.lr, as the
    paper."""
    train_full_rank: bool = True
    """Train embeddings, norms, head and biases in full; false: they stay as they are and B alone is trained, as for an
    adapter. What a checkpoint does not have (a classification head, its pooler) is trained all the same."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of Adam's first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    master: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights the optimizer updates: fp32 keeps masters beside bf16 weights (6 bytes a parameter);
    bf16 keeps none (2 bytes) and rounds stochastically."""
    layerwise: bool = False
    """Update every parameter inside the backward pass as soon as its gradient is there, so that gradients never exist
    all at once; the updates are the same, bit for bit, but where a gradient is not finite: then only its own parameter
    is skipped, others have been updated. With gradient accumulation one gradient of every parameter is
    kept from micro-batch to micro-batch, as without this option, and freed in the last one's backward. Clipping by the
    norm of all gradients is not possible; train.max_grad_norm_per_parameter is."""
    schedule: Literal["cosine", "linear", "constant", "cosine_rewarmup"] = "cosine"
    """Learning rate after warm-up; cosine_rewarmup also ramps from zero after each re-initialization."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; null: optim.warmup_ratio of all steps."""
    warmup_ratio: float = 0.1
    """Share of all steps that is warm-up, where optim.warmup_steps is null."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step as a share of the peak."""
    rewarmup_steps: int = 10
    """Steps of the ramp after each re-initialization, with cosine_rewarmup."""


@dataclass
class TrainConfig:
    """The loop."""

    max_steps: int | None = 1000
    """Optimizer steps; null where train.epochs is given."""
    epochs: float | None = None
    """Passes over the training rows, instead of train.max_steps: as many steps as see every row that often, rounded
    up."""
    micro_batch_size: int = 16
    """Rows in one forward pass of one device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step; a step sees micro_batch_size * this * devices rows."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of computation and of trained parameters; auto: bf16 where the device computes it fast, else fp32."""
    seed: int = 0
    """Seeds initial weights, data order and sketches."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm where theirs is larger; null: no clipping."""
    max_grad_norm_per_parameter: float | None = None
    """Each parameter's gradient is scaled down to this norm where its own is larger; the clipping that layer-wise
    updates can honour. On one device only, and not together with max_grad_norm. null: none."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in backward: less memory, about a third more time."""
    compile: bool = False
    """Train the transformer blocks through torch.compile (a C++ compiler on a CPU, Triton on CUDA): each block is one
    graph with LoQT layers as operators, and what lies between them is fused. The first step, and the first without a
    re-initialization, take the time of compiling. Losses are the same within rounding; evaluation is not compiled."""
    lean_activations: bool | Literal["auto"] = "auto"
    """Keep for the backward only what frozen weights need: normalized and activated values are computed again (12 h +
    4 i + 12 r bytes a token and layer in bf16 instead of 20 h + 8 i + 12 r). auto: only where keeping everything, which
    is a little faster, is planned to take more than four fifths of the device's memory, or of
    train.memory_limit_gib."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, or cuda:N."""
    memory_limit_gib: float | None = None
    """Memory of the device that this run may use, GiB; null: all of it. A plan above it is told before weights are made
    or refused; on CUDA torch's allocator fails beyond it."""
    collective_timeout_seconds: int = 1800
    """How long ranks that train together wait for one another before they take the missing one for lost."""


@dataclass
class FSDPConfig:
    """With engine=fsdp2: what is sharded, and over which ranks."""

    shard_frozen: bool = False
    """Shard the packed bytes of W and P over ranks too: each block's are gathered for its forward and its backward.
    Less memory, more traffic; false: every rank holds all of them."""
    num_replicas: int = 1
    """Groups of ranks that each hold everything: a rank's tensors are sharded over the world size / num_replicas ranks
    of its group (hybrid sharding; a group should be one machine), and gradients are averaged over groups."""
    reshard_after_forward: bool = True
    """Let go of a block's gathered parameters after its forward, and gather them again for its backward; false: they
    stay until the backward is over."""


@dataclass
class EvalConfig:
    """Evaluation on held-out documents."""

    every: int | Literal["epoch"] = 100
    """Steps between evaluations; epoch: as many as one pass over the training rows takes, rounded up (steps go on from
    one pass into the next, so that evaluations come up to a step later with every pass); 0: only at the end. Where
    training starts from model.path, there is one before its first step, too."""
    metric: Literal["loss", "exact_match", "accuracy", "f1", "matthews", "pearson", "spearman", "glue"] = "loss"
    """What checkpoint.best and eval.patience go by: the loss; exact_match, the share of held-out prompts whose answer
    has the reference's final number, after #### as in GSM8K; or a score of the task, with data.format=classification.
    Less is better for the loss, more for all others; of equal scores that with less loss is the better."""
    patience: int | None = None
    """Stop after this many evaluations without a better eval.metric; null: train to the end."""
    max_examples: int | None = None
    """Held-out prompts that are answered for eval.metric=exact_match, the first ones; null: all."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most, for eval.metric=exact_match."""
    max_tokens: int | None = None
    """Predicted tokens of an evaluation; null: all held-out documents."""
    micro_batch_size: int | None = None
    """Rows in one forward pass of evaluation; null: train.micro_batch_size."""
    num_samples: int = 3
    """Continuations sampled from the model at the end of the run."""
    sample_tokens: int = 64
    """Tokens of each continuation."""


@dataclass
class CheckpointConfig:
    """Checkpoints, and going on from one."""

    every: int = 500
    """Steps between checkpoints; one is always written at step 0 and at the end."""
    keep: int = 2
    """Newest checkpoints that are kept; 0: all."""
    best: bool = False
    """Keep the checkpoint with the best eval.metric in the run's directory best/, beside the newest ones, and go back
    to it for the export."""
    resume: str = "none"
    """none: a fresh run; auto: go on from the newest good checkpoint of the run directory, or start where it has none;
    else the path of a checkpoint."""


@dataclass
class LoggingConfig:
    """What is written while training."""

    every: int = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """Progress shown: a bar, plain lines, or none; auto: a bar on a terminal, lines elsewhere."""


@dataclass
class ExportConfig:
    """What is written at the end of the run."""

    format: Literal["nf4", "bf16", "adapter", "gguf", "none"] = "nf4"
    """nf4: merged and quantized in bitsandbytes' format, which transformers loads; bf16: merged and dense; adapter: not
    merged, P and B for PEFT over the frozen base; gguf: merged, one bf16 file for llama.cpp; none: no export."""
    base: str | None = None
    """With export.format=adapter: a base of an earlier export (its directory base), over which only the adapter is
    written; null: the run writes a base of its own."""


@dataclass
class Config:
    """A whole run."""

    name: str = "default"
    """Name of the run; a run without output_dir goes to runs/NAME-0001, -0002, ..."""
    output_dir: str | None = None
    """Directory of the run; null: a fresh numbered one under runs/."""
    engine: Literal["auto", "fsdp2"] = "auto"
    """Who takes the steps: auto: DeepSpeed where --ds_config is given, else one device; fsdp2: PyTorch's fully_shard
    (`torchrun --nproc_per_node N launch/pretrain.py`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loqt: LoQTConfig = field(default_factory=LoQTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def num_steps(self) -> int:
        """train.max_steps; of a configuration with train.epochs only once its rows are counted (settling.py)."""
        if self.train.max_steps is None:
            raise ValueError(f"train.epochs={self.train.epochs} is not a number of steps before the rows are counted")
        return self.train.max_steps

    @property
    def num_warmup_steps(self) -> int:
        """Warm-up in steps: optim.warmup_steps, or optim.warmup_ratio of all steps rounded to the nearest step."""
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        return round(self.optim.warmup_ratio * self.num_steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary of every field, in the order of declaration."""
        return dataclasses.asdict(self)
