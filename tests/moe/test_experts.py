"""Every dispatch path equals the float64 loop: outputs and all gradients, on generated shapes and on the edge cases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import experts as experts_module
from moe.experts import DISPATCHES, Experts
from moe.plain import PlainExperts


class Choice(NamedTuple):
    """What experts look at of a routing; a type that torch.compile traces."""

    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    kept_TK: torch.Tensor | None


CPU_DISPATCHES = sorted(set(DISPATCHES) - {"loop", "triton"})
D_MODEL = 16
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
# On a GPU the kernels of moe.fused serve multiples of 64 (tests/moe/test_kernels.py); all else falls to grouped_mm.
PATHS = [pytest.param(name, "cpu", id=name) for name in CPU_DISPATCHES]
PATHS += [pytest.param(name, "cuda", id=f"{name}-cuda", marks=GPU) for name in ("grouped_mm", "auto")]


def make_experts(widths, *, activation="gelu", dispatch="auto", dtype=torch.float64):
    config = SimpleNamespace(expert_widths=widths, n_embd=D_MODEL, dispatch=dispatch, expert_activation=activation)
    experts = Experts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    return experts.to(dtype)


def make_routing(expert_TK, kept_TK=None, dtype=torch.float64):
    weight_TK = torch.rand(expert_TK.shape, dtype=dtype) + 0.1
    kept_TK = torch.ones_like(expert_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    return SimpleNamespace(expert_TK=expert_TK, weight_TK=weight_TK.requires_grad_(), kept_TK=kept_TK)


def results(experts, x_TD, routing, dispatch, probe_TD):
    """The output, then the gradients of input, mixing weights and parameters under a random linear loss."""
    experts.dispatch = dispatch
    inputs = [x_TD, routing.weight_TK, *experts.parameters()]
    y_TD = experts(x_TD, routing)
    grads = torch.autograd.grad((y_TD * probe_TD).sum(), inputs, allow_unused=True)
    zeros = (torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True))
    return [y_TD.detach(), *zeros]


def against_loop(experts, x_TD, routing, dispatch, dtype, device="cpu"):
    """Results of the dispatch in this type on this device, and those of the float64 loop on the CPU."""
    probe_TD = torch.randn_like(x_TD)
    expected = results(experts, x_TD, routing, "loop", probe_TD)
    experts = experts.to(device, dtype)
    x_TD = x_TD.detach().to(device, dtype).requires_grad_()
    moved = {name: value.detach().to(device) for name, value in vars(routing).items()}
    moved["weight_TK"] = moved["weight_TK"].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    got = results(experts, x_TD, SimpleNamespace(**moved), dispatch, probe_TD.to(device, dtype))
    return [g.double().cpu() for g in got], expected


def assert_matches_loop(experts, x_TD, routing, dispatch, device="cpu"):
    dtype = torch.float32 if device == "cuda" or dispatch in ("grouped_mm", "native") else torch.float64
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4}[dtype]
    for got, want in zip(*against_loop(experts, x_TD, routing, dispatch, dtype, device), strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def tokens(count):
    return torch.randn(count, D_MODEL, dtype=torch.float64, requires_grad=True)


CASES = {
    "uniform": ([8] * 4, torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1], [0, 2]])),
    "an expert without tokens": ([8] * 4, torch.tensor([[0, 1], [3, 1], [1, 0]])),
    "all to one": ([8] * 3, torch.full((7, 1), 2)),
    "no tokens": ([8] * 3, torch.empty((0, 2), dtype=torch.long)),
    "every expert chosen": ([8] * 3, torch.tensor([[0, 1, 2]] * 4)),
    "one expert": ([8], torch.zeros((5, 1), dtype=torch.long)),
    "mixed widths": ([4, 8, 16, 8], torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1]])),
    "a null expert": ([8, 0, 16, 0], torch.tensor([[0, 1], [2, 3], [1, 3], [3, 0]])),
    "only nulls chosen": ([0, 8, 0], torch.tensor([[0, 2], [2, 0]])),
    "the same expert twice": ([8, 8], torch.tensor([[1, 1], [0, 1]])),
}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dispatch", "device"), PATHS)
def test_dispatch_equals_loop(dispatch, device, case, activation):
    torch.manual_seed(0)
    widths, expert_TK = CASES[case]
    experts = make_experts(widths, activation=activation)
    assert_matches_loop(experts, tokens(len(expert_TK)), make_routing(expert_TK), dispatch, device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("widths", [[24, 0, 40, 104], [64] * 4], ids=str)
def test_grouped_mm_in_16_bits_is_as_near_as_they_allow(widths, activation, device):
    """Widths in multiples of 8: rows of 16 bytes, which `F.grouped_mm` asks for on a GPU."""
    torch.manual_seed(0)
    experts, expert_TK = make_experts(widths, activation=activation), torch.rand(50, 4).argsort(1)[:, :2]
    routing = make_routing(expert_TK, torch.rand(50, 2) < 0.8)
    x_TD = tokens(50)
    with torch.no_grad():  # the loop reads what 16 bits hold
        for tensor in (x_TD, *experts.parameters()):
            tensor.copy_(tensor.bfloat16())
    for got, want in zip(*against_loop(experts, x_TD, routing, "grouped_mm", torch.bfloat16, device), strict=True):
        assert (got - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_without_triton_pytorch_serves(device, monkeypatch):
    """A shape that the kernels would take."""
    monkeypatch.setattr(experts_module, "fused", None)
    monkeypatch.setattr(f"{__name__}.D_MODEL", 64)
    torch.manual_seed(0)
    experts, routing = make_experts([64] * 4), make_routing(torch.rand(30, 4).argsort(1)[:, :2])
    chosen = experts_module._automatic(torch.ones(1, 64, device=device), experts._weights(), experts.widths)
    assert chosen == {"cpu": "native", "cuda": "grouped_mm"}[device]
    assert_matches_loop(experts, tokens(30), routing, "auto", device)


def drawn(data):
    """Widths, and a routing of a few tokens to these experts; some choices are dropped."""
    widths = data.draw(st.lists(st.sampled_from([0, 4, 8, 12]), min_size=1, max_size=5).filter(any))
    T = data.draw(st.integers(0, 12))
    K = data.draw(st.integers(1, len(widths)))
    torch.manual_seed(data.draw(st.integers(0, 100)))
    expert_TK = torch.rand(T, len(widths)).argsort(1)[:, :K]
    return widths, make_routing(expert_TK, torch.rand(T, K) < 0.8)


@pytest.mark.parametrize(("dispatch", "device"), PATHS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_dispatch_equals_loop_on_generated_shapes(dispatch, device, data):
    widths, routing = drawn(data)
    activation = data.draw(st.sampled_from(["gelu", "swiglu"]))
    x_TD = tokens(len(routing.expert_TK))
    assert_matches_loop(make_experts(widths, activation=activation), x_TD, routing, dispatch, device)


def assert_plain_matches_loop(widths, routing):
    """gelu_new is the tanh form of GELU, which the loop computes."""
    experts = make_experts(widths, activation="gelu")
    plain = PlainExperts(SimpleNamespace(expert_widths=widths, n_embd=D_MODEL, activation_function="gelu_new")).double()
    plain.load_state_dict(experts.state_dict())
    routing.kept = lambda: routing.kept_TK
    x_TD = tokens(len(routing.expert_TK))
    probe_TD = torch.randn_like(x_TD)
    expected = results(experts, x_TD, routing, "loop", probe_TD)
    for got, want in zip(results(plain, x_TD, routing, "loop", probe_TD), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_plain_experts_equal_loop(case):
    torch.manual_seed(0)
    widths, expert_TK = CASES[case]
    assert_plain_matches_loop(widths, make_routing(expert_TK))


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_plain_experts_equal_loop_on_generated_shapes(data):
    assert_plain_matches_loop(*drawn(data))


def test_one_expert_is_the_dense_network():
    experts, x_TD = make_experts([32]), tokens(6)
    routing = make_routing(torch.zeros(6, 1, dtype=torch.long))
    hidden = torch.nn.functional.gelu(x_TD @ experts.up_PD.T + experts.up_bias_P, approximate="tanh")
    expected = routing.weight_TK * (hidden @ experts.down_PD + experts.down_bias_ND[0])
    torch.testing.assert_close(experts(x_TD, routing), expected, atol=1e-12, rtol=0)


def test_only_null_experts_have_no_parameters_and_return_zero():
    experts = make_experts([0, 0])
    assert list(experts.parameters()) == [] or all(p.numel() == 0 for p in experts.parameters())
    x_TD = tokens(3)
    assert torch.equal(experts(x_TD, make_routing(torch.tensor([[0], [1], [0]]))), torch.zeros_like(x_TD))


def test_dropped_choices_contribute_nothing():
    experts, x_TD = make_experts([8, 8]), tokens(4)
    routing = make_routing(torch.tensor([[0, 1]] * 4), torch.tensor([[True, False]] * 3 + [[False, False]]))
    y_TD = experts(x_TD, routing)
    assert torch.equal(y_TD[3], torch.zeros(D_MODEL, dtype=torch.float64))
    experts.dispatch = "loop"
    torch.testing.assert_close(y_TD, experts(x_TD, routing))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_experts_round_trip_in_conv1d_layout(activation):
    source, target = make_experts([8, 0, 16], activation=activation), make_experts([8, 0, 16], activation=activation)
    for e in (0, 2):
        target.load_expert(e, **source.expert_state(e))
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert source.expert_state(1) == {}
    assert source.expert_state(2)["up_DF"].shape == (D_MODEL, 16)


def test_bad_arguments_speak():
    experts = make_experts([8, 0])
    state = experts.expert_state(0)
    with pytest.raises(ValueError, match="null expert"):
        experts.load_expert(1, **state)
    with pytest.raises(ValueError, match="expected 0 to 1, got 2"):
        experts.load_expert(2, **state)
    with pytest.raises(ValueError, match="expert 0: expected"):
        experts.load_expert(0, **state | {"up_DF": torch.zeros(3, 8)})
    with pytest.raises(ValueError, match="gate_DF"):
        experts.load_expert(0, **state, gate_DF=state["up_DF"])
    with pytest.raises(ValueError, match="dispatch"):
        make_experts([8], dispatch="telepathy")


@pytest.mark.parametrize("dispatch", CPU_DISPATCHES)
def test_same_input_same_gradients(dispatch):
    torch.manual_seed(0)
    experts, x_TD = make_experts([8, 16], dtype=torch.float32), tokens(64).float().detach().requires_grad_()
    routing = make_routing(torch.randint(2, (64, 2)), dtype=torch.float32)
    probe_TD = torch.randn_like(x_TD)
    first, second = (results(experts, x_TD, routing, dispatch, probe_TD) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sorted_gradients_pass_gradcheck():
    torch.manual_seed(0)
    experts = make_experts([4, 6], dispatch="sorted")
    routing = make_routing(torch.tensor([[0, 1], [1, 0], [1, 1]]))

    def forward(x_TD, weight_TK):
        return experts(x_TD, SimpleNamespace(**vars(routing) | {"weight_TK": weight_TK}))

    assert torch.autograd.gradcheck(forward, (tokens(3), routing.weight_TK))


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters():
    experts, x_TD = make_experts([8, 8], dtype=torch.float32), tokens(8).float()
    routing = make_routing(torch.randint(2, (8, 2)), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = experts(x_TD, routing)
    assert y_TD.dtype == torch.bfloat16
    y_TD.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())


@pytest.mark.slow
def test_layer_compiles_whole():
    experts, x_TD = make_experts([8, 0, 16], dtype=torch.float32), tokens(8).float().detach()
    routing = make_routing(torch.randint(3, (8, 2)), dtype=torch.float32)

    def run(x_TD, expert_TK, weight_TK, kept_TK):
        return experts(x_TD, Choice(expert_TK, weight_TK, kept_TK))

    arguments = (x_TD, routing.expert_TK, routing.weight_TK, routing.kept_TK)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))
