"""Break-even between training and decoding joules."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.lifetime import bill, envelope, lifetime
from pipelines.records import TrialRecord, to_table
from tests.pipelines.synthetic import trial


def run(*rows: TrialRecord, **options: float):
    return lifetime(to_table(TrialRecord, rows), **options)


def test_the_break_even_of_two() -> None:
    found = run(
        trial("quick", train_energy_j=100.0, decode_j_per_token=2e-3),
        trial("lean", train_energy_j=300.0, decode_j_per_token=1e-3),
        trial("bad", train_energy_j=10.0, decode_j_per_token=1e-4, eval_loss_nats=9.0),
    )
    assert found is not None
    assert [s.labels["trial_id"] for s in found.segments] == ["quick", "lean"]
    assert found.segments[1].from_tokens == pytest.approx(200 / 1e-3)
    assert found.segments[1].joules(1e6) == pytest.approx(1300.0)
    assert found.segments[1].from_range is None  # one seed: the spread of decode joules is not known


def test_intervals_of_the_break_even_come_from_the_seeds() -> None:
    rows = [
        trial(
            f"{name}{s}",
            config_fingerprint=name,
            seed=s,
            train_energy_j=j * (1 + 0.01 * s),
            decode_j_per_token=d * (1 + 0.01 * s),
        )
        for name, j, d in (("quick", 100.0, 2e-3), ("lean", 300.0, 1e-3))
        for s in range(3)
    ]
    found = run(*rows)
    assert found is not None
    low, high = found.segments[1].from_range or (0.0, 0.0)
    assert low < found.segments[1].from_tokens < high


def test_a_loss_limit_and_its_default() -> None:
    rows = [
        trial("a", eval_loss_nats=3.5),
        trial("b", eval_loss_nats=3.505, train_energy_j=50.0),
        trial("c", eval_loss_nats=3.6),
    ]
    found = run(*rows)
    assert found is not None
    assert found.max_loss == pytest.approx(3.51)
    assert found.segments[0].labels["trial_id"] == "b"
    assert run(*rows, max_loss=1.0) is None
    assert run(trial(decode_j_per_token=None)) is None


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 10)), min_size=1, max_size=12))
def test_the_envelope_is_the_minimum(lines: list[tuple[float, float]]) -> None:
    start, slope = (np.array(part) for part in zip(*lines, strict=True))
    found = envelope(start, slope)
    starts = [at for _, at in found]
    assert starts == sorted(starts)
    for t in (0.0, 0.5, 3.0, 50.0, 1e4):
        line = [i for i, at in found if at <= t][-1]
        assert start[line] + slope[line] * t == pytest.approx((start + slope * t).min(), rel=1e-9, abs=1e-9)


def test_the_bill() -> None:
    due = bill(7.2e6, price_per_kwh=0.3, co2_g_per_kwh=400.0)
    assert (due.kwh, due.price, due.co2_kg) == pytest.approx((2.0, 0.6, 0.8))
    assert bill(1.0).price is None
    assert math.isclose(bill(3.6e6).kwh, 1.0)
