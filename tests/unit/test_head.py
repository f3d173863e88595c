"""The loss without logits, on models of transformers as they are: against the loss of their own logits."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from helpers import VOCAB, LiveBytes, llama_config, make_config, make_engine, relative, token_batch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
)

from loqt_ds.config import ConfigError
from loqt_ds.core import cross_entropy
from loqt_ds.method import head
from loqt_ds.method.conversion import build_empty, build_meta

SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# The cap is so low that it bends the logits of a fresh model.
CONFIGS: dict[str, Any] = {
    "llama": llama_config(),
    "tied": llama_config(tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "opt": OPTConfig(**SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 24}),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.2),
    "cohere": CohereConfig(**SMALL, logit_scale=0.3),
}
TRANSFORMED = ("gemma2", "cohere")


def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype).eval()
    with torch.no_grad():  # a fresh head is nearly zero
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch(rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    ids = token_batch(0, rows=rows, length=length)
    targets = ids[:, 1:].clone()
    targets[0, :4] = -100
    return {"input_ids": ids[:, :-1], "targets": targets}


def stock_loss(model: Any, given: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=given["input_ids"], use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), given["targets"].flatten(), reduction="sum")


def with_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("several_blocks", [False, True])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_loss_and_gradients_are_those_of_the_models_logits(
    kind: str, several_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(kind)
    given = batch()
    expected = with_gradients(model, stock_loss(model, given))
    logits = model(input_ids=given["input_ids"]).logits
    report = head.install(model)
    assert (report.whole_logits, report.is_transformed) == (None, kind in TRANSFORMED)
    if several_blocks:
        monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 64)
        monkeypatch.setattr(cross_entropy, "MAX_ROWS", 7)
    actual = with_gradients(model, model(**given, use_cache=False))
    assert actual["loss"].dtype == torch.float32 and actual["loss"].dim() == 0
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-5 * value.norm() + 1e-6, name
    assert torch.equal(model(input_ids=given["input_ids"]).logits, logits), "without targets it is what it was"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_in_bf16_it_is_as_near_to_the_truth_as_the_models_own(kind: str) -> None:
    model, given = make(kind, torch.bfloat16), batch()
    usual = with_gradients(model, stock_loss(model, given))
    head.install(model)
    actual = with_gradients(model, model(**given, use_cache=False))
    exact = make(kind).to(torch.bfloat16).float()
    truth = with_gradients(exact, stock_loss(exact, given))
    for name, value in truth.items():
        assert relative(actual[name], value) <= 1.5 * relative(usual[name], value) + 2e-3, name


class Outputs(LlamaForCausalLM):
    """A model that does something else to its logits: forbids a token, or makes them of another input."""

    what = "forbids"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.what == "forbids":
            mask = torch.zeros(output.logits.shape[-1])
            mask[3] = -1e4
            output.logits = output.logits + mask
        elif self.what == "in place":
            output.logits *= 2
        elif self.what == "ranks":  # an entry depends on the others of its token
            output.logits = output.logits - output.logits.amax(-1, keepdim=True) / 2
        elif self.what == "trained":
            output.logits = output.logits * self.model.norm.weight[0]
        elif self.what == "twice":
            self.lm_head(torch.zeros(1, 1, 32))
        elif self.what == "fails":
            raise LookupError("no such thing")
        return output


@pytest.mark.parametrize("what", ["forbids", "in place", "ranks", "trained", "twice"])
def test_what_cannot_be_had_in_blocks_is_computed_from_all_logits_and_said(what: str) -> None:
    torch.manual_seed(0)
    model, given = Outputs(llama_config()), batch()
    model.what = what
    expected = with_gradients(model, stock_loss(model, given))
    report = head.install(model)
    assert report.whole_logits is not None and "Outputs" in report.describe() and "all tokens" in report.describe()
    actual = with_gradients(model, model(**given, use_cache=False))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_what_comes_before_the_head_is_the_models_affair() -> None:
    """Here a layer between decoder and head."""
    model, given = make("llama"), batch()
    between = nn.Linear(32, 32)
    model.between = between  # trained with it
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (between(inputs[0]),))
    expected = with_gradients(model, stock_loss(model, given))
    assert head.install(model).whole_logits is None
    actual = with_gradients(model, model(**given, use_cache=False))
    assert actual.keys() == expected.keys() and "between.weight" in actual
    assert all(relative(actual[name], expected[name]) < 1e-5 for name in expected)


def test_other_heads_and_models_that_cannot_be_tried_are_said() -> None:
    class Head(nn.Linear):
        pass

    model = make("llama")
    model.lm_head.__class__ = Head
    assert "Head, not nn.Linear" in str(head.install(model).whole_logits)
    failing = Outputs(llama_config())
    failing.what = "fails"
    assert "LookupError: no such thing" in str(head.install(failing).whole_logits)
    assert "which module makes its logits" in str(head.install(nn.Sequential(nn.Linear(3, 3))).whole_logits)


def test_no_logits_of_all_tokens_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that comes and goes is the gradient of the head."""
    vocab, tokens = 3001, 100
    for config in (llama_config(vocab_size=vocab), Gemma2Config(**SMALL | {"vocab_size": vocab}, head_dim=8)):
        model = AutoModelForCausalLM.from_config(config).train()
        head.install(model)
        monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 100 * 64)
        monkeypatch.setattr(cross_entropy, "KEPT_ELEMENTS", 100 * vocab - 1)
        ids = torch.randint(0, vocab, (1, tokens))
        with LiveBytes(*model.parameters(), ids) as live:
            loss = model(input_ids=ids, use_cache=False, targets=ids)
            torch.autograd.grad(loss, list(model.parameters()))
        assert live.largest == 4 * vocab * 32 < 4 * vocab * tokens


def test_a_copied_or_pickled_model_is_one_of_its_own() -> None:
    model, given = make("llama"), batch()
    head.install(model)
    loss = model(**given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert head.is_installed(other) and torch.equal(other(**given), loss)
        with torch.no_grad():
            other.lm_head.weight.zero_()
            other.model.embed_tokens.weight.zero_()
        assert not torch.equal(other(**given), loss) and torch.equal(model(**given), loss)


def test_installed_twice_it_is_installed_once() -> None:
    model, given = make("gemma2"), batch()
    head.install(model)
    loss = model(**given)
    stock = model.forward.stock
    assert head.install(model).is_transformed and torch.equal(model(**given), loss)
    assert model.forward.stock == stock


def test_transformers_sees_the_models_own_signature_and_generates() -> None:
    model = make("llama")
    signature = inspect.signature(model.forward)
    ids = token_batch(0)[:, :5]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    head.install(model)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
    assert model(input_ids=ids, labels=ids).loss.dim() == 0


def test_a_failure_within_leaves_the_model_as_it_was() -> None:
    model, given = make("llama"), batch()
    head.install(model)
    loss = model(**given)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((3, 11), VOCAB), targets=given["targets"])
    with pytest.raises(RuntimeError, match="one target for each token"):
        model(input_ids=given["input_ids"], targets=given["targets"][:, 1:])
    with pytest.raises(RuntimeError, match="leaves out logits"):
        model(**given, logits_to_keep=1)
    assert torch.equal(model(**given), loss) and model(input_ids=given["input_ids"]).logits.shape[-1] == VOCAB


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    model, given = make("llama").train(), batch()
    expected = with_gradients(model, stock_loss(model, given))
    head.install(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    actual = with_gradients(model, model(**given, use_cache=False))
    for name, value in expected.items():
        assert relative(actual[name], value) < 1e-5, name


def test_under_an_engine_and_autocast() -> None:
    engine, given = make_engine(make_config()), batch()
    head.install(engine.network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = engine(**given)
        expected = stock_loss(engine.network, given)
    assert loss.dtype == torch.float32 and relative(loss, expected) < 1e-5
    engine.backward(loss)
    assert engine.step().applied


def test_a_model_on_the_meta_device_is_told_of_what_it_will_do() -> None:
    for kind, config in CONFIGS.items():
        report = head.install(build_empty(config, attention="eager"))
        assert (report.whole_logits, report.is_transformed) == (None, kind in TRANSFORMED)
    converted = build_meta(CONFIGS["llama"], make_config().loqt, dtype=torch.bfloat16)
    assert head.install(converted, kernels="torch").whole_logits is None


def test_kernels_that_cannot_run_are_refused() -> None:
    model = make("llama")
    with pytest.raises(ConfigError, match=r"model\.kernels=liger needs a CUDA device"):
        head.install(model, kernels="liger")
    assert not head.is_installed(model)
    with pytest.raises(ConfigError, match=r"model\.kernels='cuda' does not exist"):
        head.install(model, kernels="cuda")


def test_a_head_with_another_forward_keeps_it() -> None:
    model, given = make("llama"), batch()
    stock = model.lm_head.forward
    model.lm_head.forward = lambda x: 3 * stock(x)
    expected = stock_loss(model, given).item()
    assert "another forward" in str(head.install(model).whole_logits)
    assert model(**given).item() == pytest.approx(expected, rel=1e-6)
