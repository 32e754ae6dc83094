"""One conformance suite that every regularizer passes: values in closed form, gradients, padding, micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe import REGULARIZERS, Routing
from moe.regularizers import kl_gibbs

E, N, LARGE = 4, 12, 60.0
PRICES = [0.5, 1.0, 1.5, 3.0]
# Sums over tokens, so that micro-batches add up to the full batch; the others are not linear in the tokens.
PER_TOKEN = {"token_entropy", "z_loss"}
LINEAR = PER_TOKEN | {"expected_energy"}

Z = 1.7  # every token's logits when balanced: all experts Z, so logsumexp is Z + log E
BALANCED = {
    "load_balance": 1.0,
    "cv2": 0.0,
    "kl_uniform": 0.0,
    "entropy": -math.log(E),
    "token_entropy": math.log(E),
    "z_loss": (Z + math.log(E)) ** 2,
    "expected_energy": sum(PRICES) / E,
}
COLLAPSED = {  # every token certain of expert 3: logits 0, 0, 0, LARGE
    "load_balance": float(E),
    "cv2": E - 1.0,
    "kl_uniform": math.log(E),
    "entropy": 0.0,
    "token_entropy": 0.0,
    "z_loss": LARGE**2,
    "expected_energy": PRICES[3],
}
_GIBBS = [math.exp(-c) / sum(math.exp(-b) for b in PRICES) for c in PRICES]
BALANCED["kl_gibbs"] = sum(q * (math.log(q) + math.log(E)) for q in _GIBBS)
# log P_e is −LARGE for the three dead experts and 0 for the last
COLLAPSED["kl_gibbs"] = sum(q * math.log(q) for q in _GIBBS) + LARGE * sum(_GIBBS[:3])

Route = Callable[..., Routing]


def prices() -> Tensor:
    return torch.tensor(PRICES, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_value_at_perfect_balance(name: str, route: Route) -> None:
    """Equal logits, and choices dealt out evenly (top-k would give them all to the first expert)."""
    dealt_TK = (torch.arange(N) % E)[:, None]
    routing = route(torch.full((N, E), Z, dtype=torch.float64), join_E=prices(), unpriced_TK=dealt_TK)
    assert float(REGULARIZERS[name](routing)) == pytest.approx(BALANCED[name], abs=1e-12)


@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_value_at_full_collapse(name: str, route: Route) -> None:
    logits_TE = torch.zeros(N, E)
    logits_TE[:, 3] = LARGE
    assert float(REGULARIZERS[name](route(logits_TE, join_E=prices()))) == pytest.approx(COLLAPSED[name], abs=1e-9)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_gradient(name: str, padded: bool, tau: float, route: Route) -> None:
    torch.manual_seed(0)
    valid_T = torch.rand(N) > 0.3 if padded else None
    choice_TK = torch.randint(0, E, (N, 1))

    def value(logits_TE: Tensor) -> Tensor:
        return REGULARIZERS[name](route(logits_TE, tau=tau, join_E=prices(), valid_T=valid_T, unpriced_TK=choice_TK))

    logits_TE = torch.randn(N, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (logits_TE,))
    gradient_TE = torch.autograd.grad(value(logits_TE), logits_TE)[0]
    assert gradient_TE.abs().max() > 0
    if valid_T is not None:
        assert (gradient_TE[~valid_T] == 0).all()


@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_padding_is_as_if_it_were_not_there(name: str, route: Route) -> None:
    torch.manual_seed(0)
    logits_TE, valid_T = torch.randn(N, E), torch.rand(N) > 0.4
    garbage_TE = torch.where(valid_T[:, None], logits_TE, 1e4 * torch.randn(N, E))
    kept_TK = valid_T[:, None]
    padded = REGULARIZERS[name](route(garbage_TE, join_E=prices(), valid_T=valid_T, kept_TK=kept_TK))
    torch.testing.assert_close(padded, REGULARIZERS[name](route(logits_TE[valid_T], join_E=prices())))


@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_only_padding_is_finite(name: str, route: Route) -> None:
    none_T = torch.zeros(N, dtype=torch.bool)
    logits_TE = torch.randn(N, E, requires_grad=True)
    value = REGULARIZERS[name](route(logits_TE, join_E=prices(), valid_T=none_T, kept_TK=none_T[:, None]))
    value.backward()
    assert torch.isfinite(value)
    assert logits_TE.grad is not None
    assert torch.isfinite(logits_TE.grad).all()


@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_order_of_tokens_does_not_matter(name: str, route: Route) -> None:
    torch.manual_seed(0)
    logits_TE, order_T = torch.randn(N, E), torch.randperm(N)
    value = REGULARIZERS[name](route(logits_TE, join_E=prices()))
    torch.testing.assert_close(value, REGULARIZERS[name](route(logits_TE[order_T], join_E=prices())))


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_micro_batches_add_up(name: str, route: Route) -> None:
    """Weighted by their tokens, values and gradients of unequal micro-batches equal those of the full batch."""
    torch.manual_seed(0)
    whole = torch.randn(N, E, dtype=torch.float64, requires_grad=True)
    full = REGULARIZERS[name](route(whole, join_E=prices()))
    parts = sum(len(part) / N * REGULARIZERS[name](route(part, join_E=prices())) for part in whole.split([5, 3, 4]))
    assert isinstance(parts, Tensor)
    torch.testing.assert_close(parts, full)
    torch.testing.assert_close(*(torch.autograd.grad(value, whole)[0] for value in (parts, full)))


@pytest.mark.parametrize("name", sorted(set(REGULARIZERS) - LINEAR))
def test_the_others_do_not_add_up(name: str, route: Route) -> None:
    """They are functions of a batch's mean: documented, so that nobody relies on the contrary."""
    torch.manual_seed(0)
    whole = torch.randn(N, E) * 2
    parts = sum(6 / N * REGULARIZERS[name](route(part, join_E=prices())) for part in whole.split(6))
    assert abs(float(parts) - float(REGULARIZERS[name](route(whole, join_E=prices())))) > 1e-3


@pytest.mark.parametrize("name", sorted(REGULARIZERS))
def test_minimising_alone_moves_where_the_name_says(name: str, route: Route) -> None:
    """From a skewed start, 400 steps of gradient descent reach the regularizer's own optimum."""
    torch.manual_seed(0)
    logits_TE = (torch.randn(64, E, dtype=torch.float64) + torch.tensor([0.0, 0.0, 1.0, 3.0])).requires_grad_()
    optimizer = torch.optim.Adam([logits_TE], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        REGULARIZERS[name](route(logits_TE, join_E=prices())).backward()
        optimizer.step()
    routing = route(logits_TE.detach(), join_E=prices())
    mean_P_E = routing.probs_TE.mean(0)
    uniform_E, gibbs_E = torch.full((E,), 1 / E).double(), torch.tensor(_GIBBS).double()
    target = {"cv2": uniform_E, "kl_uniform": uniform_E, "entropy": uniform_E, "kl_gibbs": gibbs_E}
    if name in target:
        torch.testing.assert_close(mean_P_E, target[name], atol=5e-3, rtol=0)
    elif name == "load_balance":
        assert float(REGULARIZERS[name](routing)) < 1.1
    elif name == "token_entropy":
        assert routing.probs_TE.amax(1).min() > 0.97
    elif name == "z_loss":
        assert routing.logits_TE.logsumexp(1).abs().max() < 0.05
    else:
        assert mean_P_E[0] > 0.97  # expected_energy: all to the cheapest


def test_kl_gibbs_revives_a_dead_expert(route: Route) -> None:
    """At P_e = e^−200 the gradient of KL(q‖P) still pulls with q_e; that of KL(P‖q) is gone."""
    logits_TE = torch.zeros(N, E, dtype=torch.float64)
    logits_TE[:, 0] = -200.0
    logits_TE.requires_grad_()
    kl_gibbs(route(logits_TE, join_E=prices())).backward()
    assert logits_TE.grad is not None
    assert float(logits_TE.grad[:, 0].sum()) == pytest.approx(-_GIBBS[0], rel=1e-6)


def test_kl_gibbs_without_price_is_the_other_kl_to_uniform(route: Route) -> None:
    torch.manual_seed(0)
    routing = route(torch.randn(N, E), join_E=prices())
    expected = -math.log(E) - routing.probs_TE.mean(0).log().mean()
    torch.testing.assert_close(kl_gibbs(routing, beta=0.0), expected)


def test_kl_uniform_and_entropy_have_one_gradient(route: Route) -> None:
    logits_TE = torch.randn(N, E, dtype=torch.float64, requires_grad=True)
    gradients = []
    for name in ("kl_uniform", "entropy"):
        gradients.append(torch.autograd.grad(REGULARIZERS[name](route(logits_TE)), logits_TE)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["load_balance", "cv2", "kl_uniform", "entropy", "kl_gibbs"])
def test_pooled_layers_would_hide_collapse(name: str, route: Route) -> None:
    """Two collapsed layers on opposite experts: each is at its worst, their pool looks perfectly balanced."""
    first, second = torch.zeros(N, 2), torch.zeros(N, 2)
    first[:, 0], second[:, 1] = LARGE, LARGE
    layers = [float(REGULARIZERS[name](route(z, join_E=torch.ones(2)))) for z in (first, second)]
    pooled = float(REGULARIZERS[name](route(torch.cat([first, second]), join_E=torch.ones(2))))
    assert pooled < min(layers) - 0.5


def test_balancing_does_not_count_the_price_or_the_capacity(route: Route) -> None:
    logits_TE = torch.randn(N, E)
    plain = REGULARIZERS["load_balance"](route(logits_TE))
    choice_TK = logits_TE.argmax(1, keepdim=True)
    priced = route(logits_TE, unpriced_TK=choice_TK)
    object.__setattr__(priced, "expert_TK", torch.zeros_like(choice_TK))
    torch.testing.assert_close(REGULARIZERS["load_balance"](priced), plain)
    kept_TK = torch.arange(N)[:, None] < 3
    torch.testing.assert_close(
        REGULARIZERS["load_balance"](route(logits_TE, kept_TK=kept_TK, dropped_TK=~kept_TK)), plain
    )
