"""Prices and their conversions; the wrong ones of the past, by name."""

from __future__ import annotations

import contextlib
import itertools
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwcost import CostModel, Measurement, share_energy
from hwcost.ops import ModelShape
from moe import ROUTERS, MoEGPT2Config, Tokens
from pipelines.prices import PHASES, PRICE_KINDS, OperatingPoint, Prices, expert_prices, phase_prices

WIDTHS = (3072, 1536, 768, 0)


def prices(kind: str = "joules", **changes: Any) -> Prices:
    values: dict[str, Any] = {"d_model": 768, "widths": WIDTHS, "top_k": 2, "tokens": 16384, "dtype": "bf16"}
    return expert_prices(CostModel.for_device("NVIDIA H200", 700.0), kind=kind, **(values | changes))


@given(
    batch_j=st.floats(0, 1e9), batch_size=st.integers(1, 512), seq_len=st.integers(1, 4096), top_k=st.integers(1, 64)
)
def test_the_shares_of_a_batch_add_up_to_it(batch_j: float, batch_size: int, seq_len: int, top_k: int) -> None:
    shares = share_energy(batch_j, batch_size=batch_size, seq_len=seq_len, top_k=top_k)
    assert shares.sequence_j * batch_size == pytest.approx(batch_j)
    assert shares.token_j * seq_len == pytest.approx(shares.sequence_j)
    assert shares.slot_j * top_k == pytest.approx(shares.token_j)


def test_a_worked_example() -> None:
    shares = share_energy(163.84, batch_size=16, seq_len=1024, top_k=2)
    assert (shares.sequence_j, shares.token_j, shares.slot_j) == pytest.approx((10.24, 0.01, 0.005))


def test_batch_size_is_not_a_number_of_tokens() -> None:
    """Past error: joules per token as batch joules / batch_size, too large by seq_len."""
    shares = share_energy(163.84, batch_size=16, seq_len=1024)
    assert shares.token_j == pytest.approx(163.84 / 16 / 1024)
    assert shares.token_j != pytest.approx(163.84 / 16)
    model = CostModel.for_device("NVIDIA H200", 700.0)
    cost = model.get_cost("train_step", batch_size=16, seq_len=1024, extrapolate=True)
    chain = share_energy(cost.energy_j, batch_size=16, seq_len=1024, top_k=ModelShape().top_k)
    assert (cost.j_per_sequence, cost.j_per_token, cost.j_per_expert_slot) == pytest.approx(
        (chain.sequence_j, chain.token_j, chain.slot_j)
    )


def test_per_token_joules_are_divided_by_top_k_not_multiplied() -> None:
    """Past error: joules per expert slot as joules per token · K."""
    one, four = (share_energy(8.0, batch_size=1, seq_len=1, top_k=k).slot_j for k in (1, 4))
    assert four == one / 4


@pytest.mark.parametrize("name", ["energy", "opening", "piggyback"])
def test_a_batch_total_taken_off_every_expert_is_a_no_op(name: str) -> None:
    """Past error: the joules of the batch subtracted from all logits alike. Softmax and top-k do not see it; the
    marginal prices of experts of unequal widths change what is chosen."""
    torch.manual_seed(0)
    config = MoEGPT2Config(n_embd=16, n_head=2, n_layer=1, expert_widths=list(WIDTHS), router=name)
    router = ROUTERS[name](config, 0).eval()
    x_TD, tokens = 3 * torch.randn(64, 16), Tokens(batch_size=64, position_T=torch.zeros(64, dtype=torch.int64))
    router.open_E.zero_()
    free_TK = router(x_TD, tokens).expert_TK
    router.energy_lambda.fill_(1.0)
    router.join_E.fill_(163.84)
    assert torch.equal(router(x_TD, tokens).expert_TK, free_TK)
    router.join_E.copy_(torch.tensor(prices().join))
    assert not torch.equal(router(x_TD, tokens).expert_TK, free_TK)


def test_join_does_not_depend_on_how_many_share_an_expert() -> None:
    """Past error: average pricing. The weights' joules divided by an expert's tokens make popular experts cheap."""
    assert prices(tokens=32).join == prices(tokens=16384).join
    assert prices(top_k=1).join == prices(top_k=4).join


def test_prices_are_normalised_and_lambda_converts() -> None:
    found = prices()
    assert found.join[0] == pytest.approx(1.0)  # an expert of the dense width costs one c_ref
    assert found.join[-1] == found.open[-1] == 0.0
    assert list(found.join) == sorted(found.join, reverse=True)
    assert found.lambda_per_j(0.5) * found.join[1] * found.c_ref_j == pytest.approx(0.5 * found.join[1])
    assert found.lambda_per_c_ref(found.lambda_per_j(0.37)) == pytest.approx(0.37)


def test_each_phase_has_prices_of_its_own() -> None:
    tokens = {"train": 16384, "prefill": 16384, "decode": 8}
    point = OperatingPoint(d_model=768, widths=WIDTHS, top_k=2, dtype="bf16", tokens=tokens)
    model = CostModel.for_device("NVIDIA H200", 700.0)
    found = phase_prices(model, point, kind="joules")
    assert tuple(found) == PHASES
    assert found["train"].c_ref_j > 2 * found["prefill"].c_ref_j  # backward costs twice the forward
    opening = phase_prices(model, point, kind="joules", opens=True)
    assert {p.open for p in opening.values()} == {found["decode"].open}


@pytest.mark.parametrize("kind", sorted(PRICE_KINDS))
def test_controls_keep_the_scale_and_change_the_order(kind: str) -> None:
    found, joules = prices(kind), prices()
    assert found.c_ref_j == joules.c_ref_j
    if kind == "zero":
        assert set(found.join + found.open) == {0.0}
        return
    assert max(found.join) == pytest.approx(1.0, rel=0.01)
    if kind == "shuffled":
        assert found.join != joules.join
        assert sorted(found.join) == sorted(joules.join)
        assert [joules.open[joules.join.index(price)] for price in found.join] == list(found.open)
    if kind in ("params", "uniform", "shuffled"):
        assert sum(found.open) == pytest.approx(sum(joules.open))


def test_shuffled_prices_follow_the_seed() -> None:
    found = {prices("shuffled", seed=seed).join for seed in range(20)}
    assert 3 < len(found) <= len(list(itertools.permutations(WIDTHS)))
    assert prices("shuffled", seed=3) == prices("shuffled", seed=3)
    assert prices("shuffled", widths=(3072,) * 4).join == (1.0,) * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch_size": 0}, "batch_size"), ({"top_k": 0}, "top_k"), ({"batch_j": float("nan")}, "batch_j")],
)
def test_counts_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"batch_j": 1.0, "batch_size": 1, "seq_len": 1, "top_k": 1}
    with pytest.raises(ValueError, match=message):
        share_energy(**(values | changes))


def test_a_decode_steps_joules_are_shared_by_its_sequences_not_by_its_cache() -> None:
    model = CostModel.for_device("NVIDIA H200", 700.0)
    cost = model.get_cost("decode_step", batch_size=32, seq_len=96, extrapolate=True)
    chain = share_energy(cost.energy_j, batch_size=32, seq_len=1, top_k=2)
    assert (cost.j_per_sequence, cost.j_per_token, cost.j_per_expert_slot) == pytest.approx(
        (cost.energy_j / 32, chain.token_j, cost.energy_j / 64)
    )


def test_measured_joules_of_a_phase_go_through_the_same_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats, sequences and tokens each divide once."""
    from pipelines import evaluation
    from pipelines.config import TrialConfig
    from pipelines.model import Hardware

    class Monitor:
        def window(self, name: str, **_: Any) -> Any:
            return contextlib.nullcontext(types.SimpleNamespace(measurement=Measurement(name=name, energy_j=96.0)))

    monkeypatch.setattr(evaluation, "_for_seconds", lambda *_: 3)
    hardware = Hardware(device=torch.device("cpu"), dtype="fp32", compile=False)
    found = evaluation._repeat(lambda: None, (2, 4), "prefill", TrialConfig(), hardware, Monitor(), None)  # type: ignore[arg-type]
    assert (found.tokens, found.j_per_token) == (24, 4.0)
