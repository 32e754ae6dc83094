"""The C functions equal PyTorch's operators, and their absence changes nothing but speed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import native
from moe.head import IGNORE, causal_lm_loss
from moe.native_ops import Dropout, _CausalAttention, head_loss

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler on this machine")


@pytest.fixture
def rebuilt(monkeypatch, tmp_path):
    """The library is looked for anew, in an empty cache, and what was found is forgotten afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield monkeypatch
    native.library.cache_clear()


def reference_attention(qkv_BSC, heads, scale, drop_BHSS=None):
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv_BSC.chunk(3, dim=2))
    score = (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf)
    p = score.softmax(-1) * (1.0 if drop_BHSS is None else drop_BHSS)
    return (p @ v).transpose(1, 2).flatten(2)


@given(
    batch=st.integers(1, 3), length=st.integers(1, 37), heads=st.integers(1, 3), width=st.sampled_from([8, 16, 40]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_attention_equals_the_reference(batch, length, heads, width, seed):
    torch.manual_seed(seed)
    qkv = torch.randn(batch, length, 3 * heads * width, requires_grad=True)
    probe = torch.randn(batch, length, heads * width)
    got = _CausalAttention.apply(qkv, heads, width**-0.5, 0.0)
    exact = qkv.detach().double().requires_grad_()
    want = reference_attention(exact, heads, width**-0.5)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    (gradient,) = torch.autograd.grad((got * probe).sum(), qkv)
    (expected,) = torch.autograd.grad((want * probe).sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, atol=5e-5, rtol=5e-5)


def attention_mask(qkv_BSC, heads, scale, p, seed):
    """What attention keeps under a seed, scaled: with v = 1 its output is the attention weights themselves."""
    B, S, C = qkv_BSC.shape
    probe = qkv_BSC.detach().clone().view(B, S, 3, heads, -1)
    probe[:, :, 2] = torch.eye(S, C // 3 // heads)[None, :, None]
    weights = []
    for share in (p, 0.0):
        torch.manual_seed(seed)
        out = _CausalAttention.apply(probe.flatten(2), heads, scale, share)
        weights.append(out.view(B, S, heads, -1).transpose(1, 2)[..., :S])
    return torch.where(weights[1] > 0, weights[0] / weights[1].clamp_min(1e-30), 0.0)


def test_attention_dropout_keeps_its_share_and_its_gradient_is_that_of_the_mask():
    B, S, H, d, p = 4, 24, 2, 24, 0.3
    torch.manual_seed(0)
    qkv = torch.randn(B, S, 3 * H * d, requires_grad=True)
    mask = attention_mask(qkv, H, 0.1, p, seed=5)
    seen = mask[..., torch.ones(S, S).tril().bool()]
    torch.testing.assert_close(seen, (seen > 0) / (1 - p), atol=1e-4, rtol=0)  # 0 or 1 / (1 - p), nothing else
    assert abs((seen > 0).float().mean().item() - (1 - p)) < 0.03
    torch.manual_seed(5)
    got = _CausalAttention.apply(qkv, H, 0.1, p)
    exact = qkv.detach().double().requires_grad_()
    want = reference_attention(exact, H, 0.1, (mask > 0).double() / (1 - p))
    probe = torch.randn_like(got)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    (gradient,) = torch.autograd.grad((got * probe).sum(), qkv)
    (expected,) = torch.autograd.grad((want * probe).sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("shape", [(1000, 1), (7, 13), (50, 64)])
def test_gelu_and_its_slope(shape):
    pre, bias = torch.randn(shape) * 4, torch.randn(shape[1])
    exact = (pre.double() + bias).requires_grad_()
    want = F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(want.sum(), exact)
    hidden = torch.empty_like(pre)
    native.gelu(pre, bias, hidden)
    torch.testing.assert_close(hidden.double(), want, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(pre.double(), slope, atol=5e-6, rtol=5e-6)


def test_gelu_far_out_and_not_a_number():
    pre = torch.tensor([[-1e4, -60.0, 60.0, 1e4, math.nan]])
    hidden = torch.empty_like(pre)
    native.gelu(pre, torch.zeros(5), hidden)
    torch.testing.assert_close(hidden, torch.tensor([[0.0, 0.0, 60.0, 1e4, math.nan]]), equal_nan=True)
    torch.testing.assert_close(pre, torch.tensor([[0.0, 0.0, 1.0, 1.0, math.nan]]), equal_nan=True)


def test_dropout_keeps_its_share_obeys_the_seed_and_its_gradient_has_its_mask():
    layer, x = Dropout(0.25), torch.ones(400, 64, requires_grad=True)
    torch.manual_seed(1)
    y = layer(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    for dim in (0, 1):  # no row and no column is kept more often than another
        assert (y > 0).float().mean(dim).sub(0.75).abs().max() < 0.25
    assert abs((y > 0).float().mean().item() - 0.75) < 0.01
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())
    assert not torch.equal(layer(x), y)
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("tokens", [0, 1, 5, 1500])
def test_head_loss_equals_pytorch(tokens):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, tokens + 1, 16), torch.randn(37, 16)
    labels = torch.randint(37, (1, tokens + 1))
    labels[:, 1::3] = IGNORE
    results = []
    for loss, dtype in ((head_loss, torch.float32), (causal_lm_loss, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        value = loss(*leaves, labels, 11)
        results.append([value, *torch.autograd.grad(value * 3, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)


def test_a_head_that_is_not_a_number_says_so():
    assert head_loss(torch.full((1, 4, 8), math.nan), torch.randn(9, 8), torch.zeros(1, 4, dtype=torch.long)).isnan()


def test_rows_are_sorted_as_a_stable_sort_does():
    slot_R = torch.randint(-1, 5, (200,))
    order_R, count_N = native.sort_rows(slot_R, 5)
    assert order_R.tolist() == torch.where(slot_R < 0, 5, slot_R).argsort(stable=True).tolist()
    assert count_N.tolist() == [(slot_R == n).sum().item() for n in range(5)]


def loss_and_gradients(model, ids):
    loss = model.train()(input_ids=ids, labels=ids).loss
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("k", [1, 2])
def test_a_model_without_the_library_trains_alike(tiny, ids, rebuilt, k):
    model = tiny(num_experts_per_tok=k, expert_widths=[64, 32, 0, 64])
    fast = loss_and_gradients(model, ids)
    rebuilt.setenv("JOULEMOE_NATIVE", "0")
    native.library.cache_clear()
    assert native.library() is None
    for got, want in zip(fast, loss_and_gradients(model, ids), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)


def test_the_library_is_built_once_and_kept(rebuilt, tmp_path):
    assert native.library() is not None
    (built,) = (tmp_path / "joulemoe").iterdir()
    before = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert built.stat().st_mtime_ns == before


@pytest.mark.parametrize("compiler", ["missing", "false"])
def test_without_a_working_compiler_there_is_none(rebuilt, compiler):
    rebuilt.setattr(native.shutil, "which", lambda name: {"missing": None, "false": "/bin/false"}[compiler])
    assert native.library() is None


def test_a_home_that_cannot_be_written_does_not_matter(rebuilt, tmp_path):
    (tmp_path / "file").touch()
    rebuilt.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.library() is not None
