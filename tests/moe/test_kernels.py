"""The Triton paths equal the float64 loop.

On a GPU they run as they are; elsewhere where Triton can be imported under its interpreter:
`TRITON_INTERPRET=1 pytest tests/moe/test_kernels.py`.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import MoEGPT2Config, MoEGPT2LMHeadModel, decoding, fused, gate, generation, opening_kernels
from moe.dispatch import Weights, loop
from moe.opening import every_set, first_choices

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs an NVIDIA GPU or TRITON_INTERPRET=1"),
]

CASES = {
    "uniform": (20, 2, [64, 64, 64], 0.0),
    "dropped": (20, 1, [64, 128, 64], 0.3),
    "an expert without tokens": (4, 1, [64] * 8, 0.0),
    "one expert": (150, 1, [64], 0.0),
    "mixed widths": (33, 3, [64, 192, 128], 0.5),
    "every expert chosen": (9, 3, [64] * 3, 0.0),
    "nothing kept": (9, 2, [64] * 3, 1.0),
}


def problem(tokens, k, widths, drop, dtype=torch.float32, width=64):
    torch.manual_seed(0)
    make = lambda *shape: (torch.randn(*shape, device=DEVICE) * 0.2).to(dtype).requires_grad_()
    weights = Weights(make(sum(widths), width), make(sum(widths)), make(sum(widths), width), make(len(widths), width))
    slot_TK = torch.rand(tokens, len(widths), device=DEVICE).argsort(1)[:, :k]
    slot_TK = torch.where(torch.rand(tokens, k, device=DEVICE) < drop, -1, slot_TK)
    weight_TK = torch.rand(tokens, k, device=DEVICE, requires_grad=True)
    return make(tokens, width), slot_TK, weight_TK, weights


def loop_in_double(x_TD, slot_TK, weight_TK, weights, widths, dy_TD):
    wide = [t.detach().double().requires_grad_() for t in (x_TD, weight_TK, *weights[:4])]
    y_TD = loop(wide[0], slot_TK, wide[1], Weights(*wide[2:]), widths)
    return [y_TD, *torch.autograd.grad(y_TD, wide, dy_TD.double())]


def assert_near(got, want, limit, scales=None):
    for a, b, scale in zip(got, want, scales or [b.norm() for b in want], strict=True):
        assert (a.double() - b).norm() <= limit * scale.clamp_min(1e-12)


DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


def assert_fused_equals_loop(x_TD, slot_TK, weight_TK, weights, widths):
    """Output and all gradients, and the output of the decoding kernels; returns the gradients of the parameters."""
    dy_TD = torch.randn_like(x_TD)
    inputs = [x_TD, weight_TK, *weights[:4]]
    y_TD = fused.fused_experts(x_TD, slot_TK, weight_TK, *weights[:4], widths)[0]
    got = [y_TD, *torch.autograd.grad(y_TD, inputs, dy_TD)]
    want = loop_in_double(x_TD, slot_TK, weight_TK, weights, widths, dy_TD)
    limit = 1.5e-2 if x_TD.dtype == torch.bfloat16 else 2e-5
    scales = [b.norm() for b in want]
    # A mixing weight's gradient is a product of two vectors, which may cancel: its rounding goes with their lengths.
    scales[2] = torch.maximum(scales[2], (want[0].norm(dim=-1) * dy_TD.double().norm(dim=-1)).norm())
    assert_near(got, want, limit, scales)
    with torch.no_grad():
        assert_near([fused.fused(x_TD, slot_TK, weight_TK, weights, widths)], want[:1], limit)
    return got[3:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_fused_equals_loop(case, dtype):
    tokens, k, widths, drop = CASES[case]
    assert_fused_equals_loop(*problem(tokens, k, widths, drop, dtype), widths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("only", [0, 2, 3])
def test_all_tokens_to_one_of_four(only, dtype):
    x_TD, slot_TK, weight_TK, weights = problem(150, 1, [64] * 4, 0.0, dtype)
    gradients = assert_fused_equals_loop(x_TD, torch.full_like(slot_TK, only), weight_TK, weights, [64] * 4)
    for gradient in gradients:  # rows, or neurons, of the experts that nobody chose
        of_expert = gradient.view(4, -1).abs().sum(1)
        assert (of_expert > 0).tolist() == [e == only for e in range(4)]


@settings(deadline=None, max_examples=8 if INTERPRETED else 25)
@given(data=st.data())
def test_fused_equals_loop_on_generated_shapes(data):
    widths = data.draw(st.lists(st.sampled_from([64, 128, 192]), min_size=1, max_size=5))
    tokens, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, len(widths)))
    drop, dtype = data.draw(st.sampled_from([0.0, 0.2, 1.0])), data.draw(st.sampled_from(DTYPES))
    assert_fused_equals_loop(*problem(tokens, k, widths, drop, dtype), widths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_is_the_dense_network(dtype):
    x_TD, slot_TK, weight_TK, weights = problem(40, 1, [128], 0.0, dtype)
    y_TD = fused.fused(x_TD, slot_TK, torch.ones_like(weight_TK), weights, [128])
    up_PD, up_bias_P, down_PD, down_bias_ND = (w.double() for w in weights[:4])
    hidden = torch.nn.functional.gelu(x_TD.double() @ up_PD.T + up_bias_P, approximate="tanh")
    assert_near([y_TD], [hidden @ down_PD + down_bias_ND[0]], 1.5e-2 if dtype == torch.bfloat16 else 2e-5)


def test_no_token():
    x_TD, slot_TK, weight_TK, weights = problem(0, 2, [64] * 3, 0.0)
    y_TD = fused.fused(x_TD, slot_TK, weight_TK, weights, [64] * 3)
    assert y_TD.shape == (0, 64)
    inputs = [x_TD, weight_TK, *weights[:4]]
    for gradient, of in zip(torch.autograd.grad(y_TD.sum(), inputs), inputs, strict=True):
        assert gradient.shape == of.shape
        assert not gradient.any()


def test_same_input_same_bits():
    widths = [64, 128]
    x_TD, slot_TK, weight_TK, weights = problem(40, 2, widths, 0.2)
    runs = []
    for _ in range(2):
        y_TD = fused.fused_experts(x_TD, slot_TK, weight_TK, *weights[:4], widths)[0]
        runs.append([y_TD, *torch.autograd.grad(y_TD, [x_TD, weight_TK, *weights[:4]], torch.ones_like(y_TD))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


DECODING = {
    "topk": {"expert_widths": [64, 64, 128]},
    "energy and a null expert": {"router": "energy", "energy_lambda": 0.5, "expert_widths": [64, 0, 128]},
    "K = 1": {"num_experts_per_tok": 1, "expert_widths": [64, 64]},
    "three of five by probability": {"num_experts_per_tok": 3, "expert_widths": [64] * 5, "mixing": "probability"},
    "open sets at a price": {"router": "opening", "energy_lambda": 0.4, "expert_widths": [64, 0, 128, 64, 64]},
    "open sets of one": {
        "router": "opening",
        "energy_lambda": 0.4,
        "num_experts_per_tok": 1,
        "expert_widths": [64] * 3,
    },
    "first choices": {"router": "piggyback", "energy_lambda": 0.2, "expert_widths": [64] * 6},
    "open sets beyond those all tried": {"router": "opening", "energy_lambda": 0.4, "expert_widths": [64] * 9},
    "capacity, which drops nothing here": {"router": "capacity", "capacity_factor": 0.1, "expert_widths": [64] * 4},
    "a router without kernel": {"router": "hash", "expert_widths": [64] * 3},
    "experts drawn at random": {"router": "random", "expert_widths": [64] * 5},
    "as many experts as pass a threshold": {"router": "topp", "router_top_p": 0.6, "expert_widths": [64, 64, 0, 128]},
    "a dense block and a shared expert": {"moe_layers": [1], "shared_expert_width": 32, "expert_widths": [64] * 3},
}


@pytest.mark.parametrize(("name", "batch"), [*((name, 3) for name in DECODING), ("topk", 70)])
def test_decode_step_equals_transformers_loop(name, batch, monkeypatch):
    torch.manual_seed(0)
    config = MoEGPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=200, n_positions=64, eos_token_id=None, bos_token_id=None,
        initializer_range=0.3, **DECODING[name],
    )  # fmt: skip
    model = MoEGPT2LMHeadModel(config).to(DEVICE).eval()
    ids_BS = torch.randint(200, (batch, 5), device=DEVICE)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :2] = mask_BS[2, :1] = 0
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_serves", lambda *_: False)
        want = model.generate(ids_BS, attention_mask=mask_BS, max_new_tokens=6, do_sample=False, pad_token_id=7)
    with torch.no_grad():
        position_BS = (mask_BS.cumsum(1) - 1).clamp_min(0)
        output = model(ids_BS, attention_mask=mask_BS, position_ids=position_BS, use_cache=True)
        decoder = decoding.Decoder(model, batch, 64, (), torch.float32, graph=DEVICE == "cuda")
        decoder.prepare(False)
        decoder.start(output.past_key_values, ids_BS, mask_BS, 7)
        decoder.append(output.logits[:, -1].argmax(-1))
        assert torch.equal(generation._run(decoder, None, 6, 11), want)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # of transformers' own loop over a static cache
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"min_new_tokens": 5}], ids=str)
def test_generate_uses_the_graph_and_agrees(options, monkeypatch):
    torch.manual_seed(0)
    config = MoEGPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=200, n_positions=64, expert_widths=[64] * 4)
    model = MoEGPT2LMHeadModel(config).to("cuda", torch.bfloat16).eval()
    ids_BS = torch.randint(200, (4, 6), device="cuda")
    common = {"attention_mask": torch.ones_like(ids_BS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    graphed = model.generate(ids_BS, **common, **options)
    assert [list(held.graphs) for held in generation._decoders[model].values()] == [[True, False]]  # greedy ran
    monkeypatch.setattr(generation, "_serves", lambda *_: False)
    plain = model.generate(ids_BS, **common, **options)
    assert graphed.shape == plain.shape
    assert (graphed == plain).float().mean() > 0.9  # bfloat16: ties may fall either way


@torch.no_grad()
@pytest.mark.parametrize("moe_layers", [[0, 1], []], ids=["experts", "dense"])
def test_decode_step_in_16_bits_over_float32_weights(moe_layers):
    """As under autocast: products from a 16-bit copy, the residual in float32; and the check that guards it bites."""
    torch.manual_seed(0)
    config = MoEGPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=200, n_positions=64, expert_widths=[64, 0, 128], router="energy",
        energy_lambda=0.3, initializer_range=0.3, moe_layers=moe_layers,
    )  # fmt: skip
    model = MoEGPT2LMHeadModel(config).to(DEVICE).eval()
    ids_BS = torch.randint(200, (3, 5), device=DEVICE)
    output = model(ids_BS, use_cache=True)
    decoder = decoding.Decoder(model, 3, 64, (), torch.float16, graph=DEVICE == "cuda")
    decoder.prepare(True)
    decoder.start(output.past_key_values, ids_BS, torch.ones_like(ids_BS), 7)
    decoder.append(output.logits[:, -1].argmax(-1))
    decoder.step(sampled=True)
    want_BV = model(decoder.token_T[:, None], past_key_values=output.past_key_values, use_cache=True).logits[:, -1]
    assert generation._distance(decoder.logits_TV.float(), want_BV) < generation.TOLERANCE
    assert generation._distance(decoder.logits_TV.float(), want_BV.roll(1, 0)) > 10 * generation.TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "width"), [(1, 1, 64), (70, 8, 64), (600, 11, 192), (33, 64, 130)])
def test_gate_equals_a_product_in_double(tokens, experts, width, dtype):
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, width, device=DEVICE).to(dtype).requires_grad_()
    weight_ED = torch.randn(experts, width, device=DEVICE, requires_grad=True)
    dlogits_TE = torch.randn(tokens, experts, device=DEVICE)
    logits_TE = gate._gate(x_TD, weight_ED)
    got = [logits_TE, *torch.autograd.grad(logits_TE, (x_TD, weight_ED), dlogits_TE)]
    wide = [t.detach().double().requires_grad_() for t in (x_TD, weight_ED)]
    want_TE = wide[0] @ wide[1].T
    want = [want_TE, *torch.autograd.grad(want_TE, wide, dlogits_TE.double())]
    assert got[0].dtype == torch.float32
    assert_near(got, want, 4e-3 if dtype == torch.bfloat16 else 5e-6)
    assert_near([got[0], got[2]], [want[0], want[2]], 5e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, [gate._gate(x_TD, weight_ED), *got[1:]], strict=True))


def test_written_out_sum_equals_the_product(monkeypatch):
    dlogits_TE, weight_ED = torch.randn(9, 5), torch.randn(5, 64)
    want_TD = gate._by_tokens(dlogits_TE, weight_ED)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gate._by_tokens(dlogits_TE, weight_ED), want_TD)


@pytest.mark.parametrize(("batch", "experts", "k"), [(1, 3, 2), (7, 8, 2), (40, 8, 1), (40, 5, 3)])
def test_the_sets_are_those_of_the_router(batch, experts, k):
    """Gains in float64, the best set, and `piggyback`'s: random scores, prices from nothing to half the spread."""
    generator = torch.Generator().manual_seed(batch)
    select_TE = torch.randn(batch, experts, generator=generator).to(DEVICE)
    open_E = (0.2 * batch**0.5 * torch.rand(experts, generator=generator)).to(DEVICE)
    gain_G = torch.zeros(2**experts, device=DEVICE)
    set_1, one = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.ones((), device=DEVICE)
    BE, sets = triton.next_power_of_2(experts), min(16, 2**experts)
    opening_kernels.set_gains[(2**experts // sets,)](
        select_TE, open_E, one, gain_G, batch, experts, K=k, BE=BE, BG=sets, BT=16
    )
    opening_kernels.first_set[(1,)](
        select_TE, set_1, batch, experts, K=k, BE=BE, BT=max(16, triton.next_power_of_2(batch))
    )
    bits_E = 2 ** torch.arange(experts, device=DEVICE)
    want_E = every_set(select_TE.double()[:, None], open_E.double(), k)[0]
    assert int(gain_G.argmax()) == int((want_E * bits_E).sum())
    value = select_TE.double().masked_fill(~want_E, -torch.inf).topk(k).values.sum() - open_E.double()[want_E].sum()
    assert float(gain_G.max()) == pytest.approx(float(value), rel=1e-5, abs=1e-5)
    assert int(set_1) == int((first_choices(select_TE[:, None], k)[0] * bits_E).sum())
