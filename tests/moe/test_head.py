"""The head's loss without logits equals transformers' loss of full logits, and its gradients."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from moe import head
from moe.head import causal_lm_loss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(dtype, device="cpu", vocabulary=201):
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 16, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, 16, dtype=dtype, device=device, requires_grad=True)
    labels = torch.randint(vocabulary, (2, 9), device=device)
    labels[0, 3] = labels[1, 8] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [5, 4096])
def test_equals_transformers_loss(chunk, device, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    monkeypatch.setattr(head, "CHUNK_TOKENS", chunk)
    hidden, weight, labels = problem(torch.float32, device)
    got = causal_lm_loss(hidden, weight, labels)
    want = ForCausalLMLoss(hidden @ weight.T, labels, weight.shape[0])
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(3 * loss, [hidden, weight]) for loss in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [201, 5000], ids=["one block of the kernel", "two"])
def test_in_16_bits_it_is_as_near_as_they_allow(vocabulary, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    hidden, weight, labels = problem(torch.bfloat16, device, vocabulary)
    got = causal_lm_loss(hidden, weight, labels)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = ForCausalLMLoss(wide[0] @ wide[1].T, labels, vocabulary)
    assert got.dtype == torch.float32
    assert float((got - want).detach().abs()) < 1e-2 * float(want.detach())
    for a, b in zip(torch.autograd.grad(got, [hidden, weight]), torch.autograd.grad(want, wide), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 2e-2 * b.norm()


def test_gradients_pass_gradcheck():
    hidden, weight, labels = problem(torch.float64, vocabulary=11)
    assert torch.autograd.gradcheck(lambda h, w: causal_lm_loss(h, w, labels), (hidden, weight))


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, labels = problem(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(causal_lm_loss(hidden, weight, labels), causal_lm_loss(hidden, weight, labels))
    total, dhidden, dweight = head.head_loss(hidden[0], weight, labels[0], False)
    assert total.ndim == 0
    assert dhidden.shape[0] == dweight.shape[0] == 0


def test_a_micro_batch_divides_by_the_targets_of_the_step():
    hidden, weight, labels = problem(torch.float64)
    targets = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(
        causal_lm_loss(hidden, weight, labels, 2 * targets), causal_lm_loss(hidden, weight, labels) / 2
    )


def test_all_ignored_has_no_gradient_but_that_of_its_count():
    hidden, weight, labels = problem(torch.float64)
    loss = causal_lm_loss(hidden, weight, torch.full_like(labels, -100), 1)
    assert loss.item() == 0.0
    assert not any(g.any() for g in torch.autograd.grad(loss, [hidden, weight]))
