"""Savings at equal loss: evidence where there is some, and *no evidence* where there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.compare import NO_EVIDENCE, Comparison, compare, holm
from pipelines.records import PointRecord, TrialRecord, to_table
from pipelines.sections_savings import questions, verdict
from tests.pipelines import synthetic
from tests.pipelines.synthetic import trial


def side(
    name: str, joules: float, loss: float, *, seeds: int = 4, noise: float = 1.0, rng: int = 0
) -> list[TrialRecord]:
    """Replicates of one configuration with joules noise of 0.5 % and loss noise of 0.001 nat, times `noise`."""
    draw = np.random.default_rng([rng, sum(map(ord, name))])
    return [
        trial(
            f"{name}-{s}",
            config_fingerprint=name,
            router=name.split("-", maxsplit=1)[0],
            seed=s,
            train_energy_j=joules * (1 + 0.005 * noise * draw.standard_normal()),
            train_energy_uncertainty_j=0.002 * joules,
            eval_loss_nats=loss + 0.001 * noise * draw.standard_normal(),
        )
        for s in range(seeds)
    ]


def run(*rows: list[TrialRecord], **options: float) -> Comparison:
    table = to_table(TrialRecord, [row for group in rows for row in group])
    return compare(table, "router=topk", "router=energy", **options)


def test_a_saving_at_equal_loss_is_found() -> None:
    found = run(side("topk", 100, 3.5), side("energy", 80, 3.5))
    (pair,) = found.pairs
    assert pair.verdict == "saves"
    assert pair.paired
    assert pair.p_claim is not None
    assert pair.p_claim < 0.05
    assert pair.saving.low is not None
    assert pair.saving.low < 0.2 < pair.saving.high
    assert found.best is pair
    assert "saves" in verdict(found)


def test_equal_loss_but_equal_joules_is_no_evidence() -> None:
    (pair,) = run(side("topk", 100, 3.5), side("energy", 100, 3.5)).pairs
    assert pair.verdict == NO_EVIDENCE
    assert pair.reason == "the joules are not shown to differ"


def test_a_difference_that_is_not_shown_is_not_equality() -> None:
    """Noisy losses with equal means: a difference test would accept them, the equivalence test does not."""
    found = run(side("topk", 100, 3.5, noise=20.0), side("energy", 60, 3.5, noise=20.0))
    (pair,) = found.pairs
    assert pair.verdict == NO_EVIDENCE
    assert "not shown to be equal" in pair.reason
    assert NO_EVIDENCE in verdict(found)


def test_a_wider_margin_can_make_them_equal() -> None:
    rows = side("topk", 100, 3.5), side("energy", 80, 3.515)
    assert run(*rows).pairs[0].verdict == NO_EVIDENCE
    assert run(*rows, margin=0.05).pairs[0].verdict == "saves"


def test_one_seed_is_no_evidence() -> None:
    found = run(side("topk", 100, 3.5, seeds=1), side("energy", 50, 3.5, seeds=1))
    (pair,) = found.pairs
    assert pair.verdict == NO_EVIDENCE
    assert "one seed" in pair.reason
    assert pair.saving.low is None
    assert pair.saving.mean == pytest.approx(0.5, abs=0.05)
    assert found.best is None


@pytest.mark.parametrize(
    ("joules", "loss", "expected"), [(130, 3.5, "costs more"), (80, 3.3, "better"), (130, 3.7, "worse")]
)
def test_the_other_verdicts(joules: float, loss: float, expected: str) -> None:
    assert run(side("topk", 100, 3.5), side("energy", joules, loss)).pairs[0].verdict == expected


def test_different_seeds_are_compared_unpaired() -> None:
    shifted = [trial(r.trial_id, **{**_values(r), "seed": r.seed + 10}) for r in side("energy", 80, 3.5)]
    (pair,) = run(side("topk", 100, 3.5), shifted).pairs
    assert not pair.paired
    assert pair.verdict == "saves"


def _values(row: TrialRecord) -> dict:
    names = ("config_fingerprint", "router", "train_energy_j", "train_energy_uncertainty_j", "eval_loss_nats", "seed")
    return {name: getattr(row, name) for name in names}


def test_false_claims_stay_rare() -> None:
    """Ten candidates that save nothing and are equal in loss, fifty times: at most 5 % of the runs may claim one."""
    claims = 0
    for i in range(50):
        candidates = [row for c in range(10) for row in side(f"energy-{c}", 100, 3.5, seeds=3, rng=1000 + i)]
        found = run(side("topk", 100, 3.5, seeds=3, rng=1000 + i), candidates)
        claims += any(pair.verdict in ("saves", "costs more") for pair in found.pairs)
    assert claims <= 6  # 2.5 are expected at the level; 6 or fewer has a chance of 98.8 %


def front(name: str, factor: float, seeds: int = 3) -> list[TrialRecord]:
    """Four configurations along a curve; `factor` times the joules."""
    groups = [side(f"{name}-{i}", factor * j, 3.8 - 0.1 * i, seeds=seeds) for i, j in enumerate((50, 80, 130, 210))]
    return [row for group in groups for row in group]


def test_the_mean_saving_between_two_fronts() -> None:
    found = run(front("topk", 1.0), front("energy", 0.75))
    saving, loss = found.saving_at_equal_loss, found.loss_at_equal_joules
    assert saving is not None
    assert loss is not None
    assert saving.mean == pytest.approx(0.25, abs=0.01)
    assert saving.excludes_zero
    assert loss.mean < 0
    assert "saves 2" in verdict(found)


def test_fronts_that_do_not_meet_have_no_mean_saving() -> None:
    found = run(side("topk", 100, 3.5), side("energy", 50, 3.0))
    assert found.saving_at_equal_loss is None
    assert found.why_no_means == "the two sides reach no loss in common"


@pytest.mark.parametrize(
    ("baseline", "candidate", "message"),
    [
        ("router=none_such", "router=energy", "baseline: expected an expression that selects a completed trial"),
        ("router=topk", "router!=energy", "candidate: expected trials that the baseline lacks, got 4 on both sides"),
        ("router", "router=energy", "expected COLUMN=VALUE"),
        ("colour=red", "router=energy", "got 'colour'"),
        ("top_k=two", "router=energy", "top_k: expected a number, got 'two'"),
        ("router<3", "router=energy", "expected a numeric column before <"),
    ],
)
def test_bad_expressions_speak(baseline: str, candidate: str, message: str) -> None:
    table = to_table(TrialRecord, [*side("topk", 100, 3.5), *side("energy", 80, 3.5)])
    with pytest.raises(ValueError, match="expected") as error:
        compare(table, baseline, candidate)
    assert message in str(error.value)


def test_expressions_with_alternatives_numbers_and_none(tmp_path: Path) -> None:
    rows = [
        *side("topk", 100, 3.5),
        *side("energy", 80, 3.5),
        trial("plain", config_fingerprint="plain", router="dense", top_k=None, energy_lambda=None),
    ]
    store = synthetic.write(tmp_path, rows)
    found = compare(store, "top_k=none", "router=energy|topk, top_k>=2, energy_lambda<=0.5")
    assert {pair.candidate["router"] for pair in found.pairs} == {"energy", "topk"}


def test_points_can_be_compared_too(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [*side("topk", 100, 3.5), *side("energy", 80, 3.5)])
    assert len(compare(store, "router=topk", "router=energy", table="points").pairs) == 4


def test_anytime_trials_are_compared_by_their_points(tmp_path: Path) -> None:
    """Unless an expression asks for what points do not have; and texts do not mix."""
    store = synthetic.write(tmp_path, synthetic.anytime((1, 2, 3)))
    found = compare(store, "energy_lambda=0", "energy_lambda>0")
    assert (found.table, len(found.pairs)) == ("points", 4)  # one and two epochs on either side
    assert {pair.candidate["epochs"] for pair in found.pairs} == {1, 2}
    assert all(pair.paired and pair.saving.seeds == 3 for pair in found.pairs)
    assert found.context.corpus_fingerprint == "corpus-a"
    whole = compare(store, "energy_lambda=0,batch_size=8", "energy_lambda>0")
    assert (whole.table, len(whole.pairs)) == ("trials", 1)
    assert compare(store, "energy_lambda=0", "energy_lambda>0", table="trials").table == "trials"
    assert compare(store.read(PointRecord), "energy_lambda=0", "energy_lambda>0").table == "points"
    other = tmp_path / "other"
    rows = [
        dataclasses.replace(r, corpus_fingerprint=f"corpus-{r.energy_lambda}") for r in synthetic.anytime((1, 2, 3))
    ]
    with pytest.raises(ValueError, match="selects a completed trial"):
        compare(synthetic.write(other, rows), "energy_lambda=0", "energy_lambda>0")


def test_what_is_left_out_is_counted() -> None:
    found = run(side("topk", 100, 3.5), side("energy", 80, 3.5), [trial("bad", state="FAILED", router="energy")])
    assert [(left.reason, left.count) for left in found.left_out] == [("FAILED", 1)]


def test_questions_that_a_sweep_can_answer() -> None:
    def row(router: str, price: float | None) -> dict:
        return {"router": router, "energy_lambda": price, "state": "COMPLETED", "censored": False}

    assert questions([row("topk", 0.0)]) == []
    assert [q[1] for q in questions([row("dense", None), row("topk", 0.0)])] == ["router=dense"]
    assert [q[1] for q in questions([row("topk", 0.0), row("topk", 0.1)])] == ["energy_lambda=0"]
    both = questions([row("topk", 0.0), row("energy", 0.1)])
    assert [q[1:] for q in both] == [("energy_lambda=0", "energy_lambda>0")]
    assert len(questions([row("topk", 0.0), row("random", None)])) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_and_never_reorders(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
    assert max(adjusted) <= 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
