"""Fronts against the definition, on small sets and on large ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines import fronts

GRID = st.integers(0, 6).map(float)


def by_definition(cost_NM: np.ndarray) -> np.ndarray:
    """Nobody is at least as good everywhere and better somewhere."""
    worse = (cost_NM[:, None] >= cost_NM[None]).all(-1) & (cost_NM[:, None] > cost_NM[None]).any(-1)
    return ~worse.any(axis=1)


@given(st.integers(2, 4).flatmap(lambda m: hnp.arrays(float, st.tuples(st.integers(1, 30), st.just(m)), elements=GRID)))
def test_front_and_dominators_follow_the_definition(cost_NM: np.ndarray) -> None:
    front_N = fronts.nondominated(cost_NM)
    assert (front_N == by_definition(cost_NM)).all()
    by_N = fronts.dominators(cost_NM, front_N)
    assert ((by_N == -1) == front_N).all()
    for i in np.flatnonzero(~front_N):
        assert front_N[by_N[i]]
        assert (cost_NM[by_N[i]] <= cost_NM[i]).all()
        assert (cost_NM[by_N[i]] < cost_NM[i]).any()


def test_the_short_cut_for_large_sets_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cost_NM = rng.integers(0, 60, (4000, 2)).astype(float)
    whole = fronts.nondominated(cost_NM)
    monkeypatch.setattr(fronts, "SAMPLE", 50)
    assert (fronts.nondominated(cost_NM) == whole).all()


def test_no_points() -> None:
    assert fronts.nondominated(np.zeros((0, 2))).shape == (0,)


def test_hypervolume_of_known_boxes() -> None:
    cost_NM = np.array([[1.0, 3.0], [2.0, 1.0]])
    assert fronts.hypervolume(cost_NM, np.array([4.0, 4.0])) == pytest.approx(3 * 1 + 2 * 2)
    assert fronts.hypervolume(cost_NM, np.array([1.0, 1.0])) == 0.0


@given(hnp.arrays(float, st.tuples(st.integers(1, 15), st.just(2)), elements=GRID))
def test_a_further_point_never_shrinks_the_volume(cost_NM: np.ndarray) -> None:
    reference = np.array([7.0, 7.0])
    volumes = [fronts.hypervolume(cost_NM[:n], reference) for n in range(1, len(cost_NM) + 1)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(volumes))


def test_the_knee_is_the_corner() -> None:
    cost = np.array([[0.0, 10.0], [1.0, 1.0], [10.0, 0.0]])
    assert fronts.knee(cost) == 1
    assert set(fronts.knees_by_scaling(cost, np.array([False, False])).values()) == {1, None}


@pytest.mark.parametrize("cost", [[[0.0, 1.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]], [[0.0, 0.0]] * 4])
def test_no_knee_on_a_straight_or_short_front(cost: list[list[float]]) -> None:
    assert fronts.knee(np.array(cost)) is None


def test_scaling_can_move_the_knee() -> None:
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    cost = np.stack([x, np.array([3.0, 1.4, 0.5, 0.0])], axis=1)
    found = fronts.knees_by_scaling(cost, np.array([True, False]))
    assert found["linear"] == 2
    assert found["log"] != found["linear"]


def test_the_reference_lies_beyond_the_worst() -> None:
    reference = fronts.reference_point(np.array([[0.0, 5.0], [10.0, 5.0]]))
    assert reference == pytest.approx([11.0, 5.5])
