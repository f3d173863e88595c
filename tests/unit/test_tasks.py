"""model.task: masked tokens, classes and numbers, against transformers' own losses and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import VOCAB, llama_config, relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loqt_ds.config import ConfigError, LoQTConfig, ModelConfig, validate
from loqt_ds.config.fields import Config
from loqt_ds.engines.single import SingleEngine
from loqt_ds.method import head
from loqt_ds.method.conversion import (
    build_empty,
    build_meta,
    build_model,
    checkpoint_files,
    initializer,
    loqt_layers,
    task_head_parameters,
)
from loqt_ds.method.description import model_description, num_positions

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=86,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
DEBERTA = dict(relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"])
ENCODERS: dict[str, Any] = {
    "bert": lambda **k: tf.BertConfig(**SMALL, **k),
    "roberta": lambda **k: tf.RobertaConfig(**SMALL, pad_token_id=0, **k),
    "deberta": lambda **k: tf.DebertaV2Config(**SMALL, **DEBERTA, **k),
    "distilbert": lambda **k: tf.DistilBertConfig(
        vocab_size=VOCAB,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=86,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        **k,
    ),
    "albert": lambda **k: tf.AlbertConfig(**SMALL, embedding_size=16, **k),
}
OTHERS = ("distilbert", "albert", "roberta")
LOQT = LoQTConfig(rank=4)


def batch(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(3, VOCAB, (3, 9), generator=draw), "attention_mask": mask}


def converted(kind: str, task: str, **changes: Any) -> nn.Module:
    model, _ = build_model(ENCODERS[kind](**changes), LOQT, initializer(0), task=task)
    return model


def compare(model: Any, inputs: dict[str, Tensor], targets: Tensor, count: int) -> None:
    """The summed loss and its gradients against transformers' mean loss of the same labels."""
    own = model(**inputs, targets=targets, use_cache=False)
    theirs = model(**inputs, labels=targets).loss * count
    assert own.dtype == torch.float32 and own.item() == pytest.approx(theirs.item(), rel=1e-5)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = [torch.autograd.grad(loss, list(trained.values()), allow_unused=True) for loss in (own, theirs)]
    for name, mine, wanted in zip(trained, *grads, strict=True):
        assert (mine is None) == (wanted is None), name
        if mine is not None and wanted.norm() > 1e-6:
            assert relative(mine, wanted) < 1e-4, name


@pytest.mark.parametrize("kind", ["bert", "deberta", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_masked_tokens_have_transformers_loss(kind: str):
    model = converted(kind, "masked_lm")
    report = head.install(model, task="masked_lm")
    assert report.whole_logits is None
    assert head.install(build_meta(ENCODERS[kind](), LOQT, task="masked_lm"), task="masked_lm").whole_logits is None
    inputs = batch()
    targets = torch.where(torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.3, inputs["input_ids"], -100)
    compare(model, inputs, targets, int((targets != -100).sum()))
    assert torch.equal(
        model(**inputs, targets=torch.full_like(targets, -100)), torch.zeros(())
    )  # nothing masked, nothing lost


@pytest.mark.parametrize("kind", ["bert", "deberta", pytest.param("distilbert", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_rows_have_transformers_loss_and_their_head_is_trained_in_full(kind: str, task: str):
    problem = "regression" if task == "regression" else "single_label_classification"
    model = converted(kind, task, num_labels=1 if task == "regression" else 3, problem_type=problem)
    assert head.install(model, task=task).describe().startswith("the loss is the")
    targets = torch.tensor([0.5, -100.0, 3.25]) if task == "regression" else torch.tensor([2, 0, 1])
    compare(model, batch(), targets, 3)
    around = task_head_parameters(model)
    assert any("classifier" in name for name in around)
    assert not any(name.startswith(("classifier", "pooler")) or ".pooler" in name for name in loqt_layers(model))
    outputs = model(**batch())
    assert torch.equal(head.loss_of_outputs(outputs, targets, task), model(**batch(), targets=targets))


def test_ten_steps_learn_the_classes():
    from helpers import make_config

    config = make_config(loqt=dict(rank=4, interval=4), train=dict(max_steps=10))
    model, source = build_model(ENCODERS["deberta"](num_labels=3), config.loqt, initializer(0), task="classification")
    head.install(model, task="classification")
    engine = SingleEngine(model, config, original=source.weight)
    losses = []
    for _ in range(10):
        loss = engine(**batch(), targets=torch.tensor([2, 0, 1]))
        engine.backward(loss / 3)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_targets_that_do_not_fit_are_a_bug():
    model = converted("bert", "classification", num_labels=3)
    head.install(model, task="classification")
    with pytest.raises(RuntimeError, match="one target for each row"):
        model(**batch(), targets=torch.zeros(3, 9, dtype=torch.long))


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    for kind in ("bert", "deberta"):
        torch.manual_seed(3)
        tf.AutoModelForMaskedLM.from_config(ENCODERS[kind]()).save_pretrained(root / f"{kind}-mlm")
        tf.AutoModel.from_config(ENCODERS[kind]()).save_pretrained(root / f"{kind}-base")
    tensors = load_file(root / "bert-mlm" / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    } | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    (root / "bert-old").mkdir()
    save_file(old, root / "bert-old" / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.mark.parametrize("name", ["bert-mlm", "bert-base", "bert-old", "deberta-mlm", "deberta-base"])
def test_a_head_that_the_checkpoint_lacks_is_drawn_and_all_else_is_read(name: str, saved: Path):
    kind = name.partition("-")[0]
    config = ENCODERS[kind](num_labels=3)
    loqt = LoQTConfig(rank=4, quantize_w="none", quantize_p="none")

    def build(seed: int) -> tuple[Any, Any]:
        return build_model(config, loqt, checkpoint_files(saved / name, seed=seed), task="classification")

    model, source = build(5)
    # BERT's pooler is of its base model, and of a masked language model's it is no part.
    pooler = {"bert-base": [], "bert-mlm": ["bert.pooler.dense"], "bert-old": ["bert.pooler.dense"]}
    assert source.drawn == sorted(["classifier", *pooler.get(name, ["pooler.dense"])])
    directory = saved / (f"{kind}-mlm" if name == "bert-old" else name)
    reference = tf.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = batch()
    with torch.no_grad():
        hidden = model.eval().base_model(**inputs).last_hidden_state
        assert relative(hidden, reference(**inputs).last_hidden_state) < 1e-6
    again, other = build(5)[0], build(6)[0]
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.02, rel=0.5)


def test_masked_lm_reads_its_own_checkpoint_with_the_tied_head(saved: Path):
    config = ENCODERS["bert"]()
    loqt = LoQTConfig(rank=4, quantize_w="none", quantize_p="none")
    model, _ = build_model(config, loqt, checkpoint_files(saved / "bert-mlm"), task="masked_lm")
    reference = tf.AutoModelForMaskedLM.from_pretrained(saved / "bert-mlm", dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative(model.eval()(**batch()).logits, reference(**batch()).logits) < 1e-6


def test_without_a_seed_a_missing_head_is_refused(saved: Path):
    with pytest.raises(ValueError, match="has no tensor"):
        checkpoint_files(saved / "deberta-mlm")(build_empty(ENCODERS["deberta"](), task="classification"))


def test_what_else_is_missing_is_refused(saved: Path, tmp_path: Path):
    tensors = load_file(saved / "deberta-base" / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no tensor deberta.encoder.layer.1.output.dense.weight"):
        checkpoint_files(tmp_path, seed=0)(build_empty(ENCODERS["deberta"](), task="classification"))


@pytest.mark.parametrize("task, number", [("classification", 3), ("regression", 1)])
def test_a_head_for_other_classes_is_drawn_anew(task: str, number: int, tmp_path: Path):
    other = tf.AutoModelForSequenceClassification.from_config(ENCODERS["bert"](num_labels=5))
    other.save_pretrained(tmp_path)
    model, source = build_model(
        ENCODERS["bert"](num_labels=number), LOQT, checkpoint_files(tmp_path, seed=0), task=task
    )
    assert source.drawn == ["classifier"] and model.classifier.weight.shape == (number, 32)  # type: ignore[attr-defined]
    assert torch.equal(model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("task", ["masked_lm", "classification"])
def test_what_pre_training_had_beside_is_left_out(task: str, tmp_path: Path):
    """bert-base-uncased is saved so: with a pooler, and with a head for pairs of sentences."""
    tf.BertForPreTraining(ENCODERS["bert"]()).save_pretrained(tmp_path)
    seed = 0 if task == "classification" else None
    _, source = build_model(ENCODERS["bert"](num_labels=3), LOQT, checkpoint_files(tmp_path, seed=seed), task=task)
    masked = ["bert.pooler.dense", "cls.seq_relationship"]
    left: list[str] = source.left_out  # type: ignore[attr-defined]
    assert left == masked if task == "masked_lm" else {"cls.seq_relationship", "cls.predictions"} <= set(left)


def test_a_base_saved_with_a_pooler_and_without_a_prefix(tmp_path: Path):
    tf.RobertaModel(ENCODERS["roberta"]()).save_pretrained(tmp_path)
    _, source = build_model(
        ENCODERS["roberta"](num_labels=3), LOQT, checkpoint_files(tmp_path, seed=0), task="classification"
    )
    assert source.left_out == ["pooler.dense"]  # type: ignore[attr-defined]
    tensors = load_file(tmp_path / "model.safetensors") | {"unknown.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no place for, the first being unknown.weight"):
        checkpoint_files(tmp_path, seed=0)(build_empty(ENCODERS["roberta"](num_labels=3), task="classification"))


# ---------------------------------------------------------------- options


def description(tmp_path: Path, model_config: Any, **model: Any) -> Any:
    model_config.save_pretrained(tmp_path)
    return model_description(Config(model=ModelConfig(shape=str(tmp_path / "config.json"), **model)))


def test_positions_that_limit_a_model_are_those_it_learns() -> None:
    from transformers import GPT2Config, LlamaConfig, T5Config, XLNetConfig

    assert num_positions(GPT2Config(n_positions=48)) == 48
    assert num_positions(LlamaConfig(max_position_embeddings=64)) == 64
    assert num_positions(T5Config(n_positions=512)) is None, "its positions are relative"
    assert num_positions(XLNetConfig()) is None, "it says -1"


def test_the_number_of_classes_is_the_options_or_the_descriptions(tmp_path: Path):
    assert description(tmp_path, ENCODERS["bert"](), task="classification", num_labels=4).num_labels == 4
    assert description(tmp_path, ENCODERS["bert"](num_labels=5), task="classification").num_labels == 5
    assert description(tmp_path, ENCODERS["bert"](), task="regression").num_labels == 1
    with pytest.raises(ConfigError, match="model.num_labels=None .*give model.num_labels"):
        description(tmp_path, ENCODERS["bert"](), task="classification")


def test_a_task_that_the_model_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"model.task=masked_lm: .*llama; use causal_lm or classification"):
        build_empty(llama_config(), task="masked_lm")


def test_num_labels_without_classes_is_refused():
    with pytest.raises(ConfigError, match="model.num_labels=3 has no effect with model.task=causal_lm"):
        validate(Config(model=ModelConfig(shape="llama_9m", num_labels=3)))
