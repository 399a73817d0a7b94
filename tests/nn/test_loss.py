"""The loss without logits: the same number and gradient as cross entropy, and silence where it would not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtools.nn import loss as losses
from llmtools.nn.loss import CausalLoss, chunked_loss
from llmtools.quant import materialize, products


def problem(dtype: torch.dtype, *, bias: bool = False, tokens: int = 37) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 24, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(24, 101, bias=bias).to(dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(101, 24, generator=generator))
    labels = torch.randint(0, 101, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden, head, labels


@pytest.mark.parametrize("tokens_a_chunk", [1, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
def test_it_is_cross_entropy_in_any_chunks(
    tokens_a_chunk: int, dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * 101 * tokens_a_chunk)
    way = products.default(dtype).forward._replace(dtype=torch.float32 if wide else dtype)
    monkeypatch.setattr(materialize, "chosen", lambda dtype: products.Choice(way, way))
    hidden, head, labels = problem(dtype, bias=True)
    found = chunked_loss(hidden, head, labels)
    (grad,) = torch.autograd.grad(3 * found.sum, hidden)
    logits = F.linear(hidden.float(), head.weight.float(), head.bias.float())
    truth = F.cross_entropy(logits, labels, reduction="sum")
    (true_grad,) = torch.autograd.grad(3 * truth, hidden)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(found.sum, truth, rtol=tolerance)
    assert (grad.float() - true_grad.float()).abs().max() <= tolerance * true_grad.float().abs().max()
    assert (grad.dtype, grad[::5].abs().max()) == (dtype, 0)
    assert found.tokens == (labels != -100).sum()


def test_argmax_tokens_are_counted() -> None:
    hidden, head, labels = problem(torch.float32)
    best = head(hidden).argmax(1)
    labels[1:4] = best[1:4]
    assert chunked_loss(hidden, head, labels).correct == (best == labels).sum()


def test_an_impossible_word_costs_a_finite_amount() -> None:
    hidden, head, _ = problem(torch.float32, tokens=1)
    found = chunked_loss(1e3 * hidden, head, head(hidden).argmin(1))
    assert torch.isfinite(found.sum) and found.sum > 1e3


def test_nothing_to_learn_gives_zero_and_a_gradient() -> None:
    hidden, head, labels = problem(torch.float32)
    found = chunked_loss(hidden, head, torch.full_like(labels, -100))
    (grad,) = torch.autograd.grad(found.sum, hidden)
    assert (found.sum, found.tokens, grad.abs().sum()) == (0, 0, 0)


def model(kind: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=1, vocab_size=96, **options)
    return getattr(transformers, f"{kind}ForCausalLM")(config).train()


def adapted(base: Any) -> Any:
    import peft

    base.requires_grad_(False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_models_own_loss_and_gradients(kind: str) -> None:
    peft_model = adapted(model(kind))
    ids = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    expected = peft_model(input_ids=ids, labels=labels).loss
    true_grads = torch.autograd.grad(expected, trained)
    ours = CausalLoss(peft_model)
    for _ in range(2):  # the first call also looks at logits
        found = ours(peft_model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        assert found is not None and found.tokens == 14
        torch.testing.assert_close(found.sum / found.tokens, expected)
        for grad, truth in zip(torch.autograd.grad(found.sum / 14, trained), true_grads, strict=True):
            torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("Gemma2", {"head_dim": 16, "final_logit_softcapping": 1.0}), ("Granite", {"logits_scaling": 4.0})],
)
def test_logits_that_are_more_than_the_heads_product_are_left_to_the_model(kind: str, options: dict[str, Any]) -> None:
    base = model(kind, **options)
    nn.init.normal_(base.get_output_embeddings().weight)
    ids = torch.arange(8)[None]
    assert CausalLoss(adapted(base))(base, {"input_ids": ids, "labels": ids}) is None


def test_a_head_that_is_trained_is_left_to_the_model() -> None:
    base = model("Llama")
    ids = torch.arange(8)[None]
    assert CausalLoss(base)(base, {"input_ids": ids, "labels": ids}) is None


def test_without_labels_there_is_no_loss() -> None:
    base = model("Llama").requires_grad_(False)
    assert CausalLoss(base)(base, {"input_ids": torch.arange(8)[None]}) is None


def test_ignored_labels_may_be_left_in() -> None:
    """As where picking the others out would make the host wait for the device."""
    head, labels = nn.Linear(16, 40, bias=False).requires_grad_(False), torch.randint(0, 40, (50,))
    labels[::3] = losses.IGNORED
    results = []
    for kept in (labels != losses.IGNORED, torch.ones(50, dtype=torch.bool)):
        torch.manual_seed(1)
        hidden = torch.randn(50, 16, requires_grad=True)
        total, correct = losses._ChunkedLoss.apply(hidden[kept], head.weight, None, labels[kept])
        total.backward()
        results.append((total.detach(), correct, hidden.grad))
    for picked, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, picked)
