"""The benchmark of searches: a repetition that never reached the goal is not one that spent the whole grid."""

from __future__ import annotations

import pytest

from benchmarks.search_efficiency import NEVER, Member, Table, judge, quantile, show, spent_until


def test_quartiles_among_repetitions_that_did_not_reach_the_goal() -> None:
    shares = [0.1, 0.2, 0.3, NEVER, NEVER]
    assert [quantile(shares, q) for q in (0, 25, 50, 75)] == pytest.approx([0.1, 0.2, 0.3, NEVER])
    assert quantile([0.1, 0.2], 50) == pytest.approx(0.15)
    assert quantile([0.1, NEVER], 50) == NEVER


def test_what_was_not_reached_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show("MOASHA", [0.4, NEVER, NEVER, NEVER])
    show("random", [0.5, 0.7, 0.9])
    judge({"random": [0.8], "cost-aware": [0.2], "cost-aware + pareto-asha": [NEVER]})
    said = capsys.readouterr().out.splitlines()
    assert said[0].split(maxsplit=1)[1] == "not reached  (quartiles not reached to not reached, reached in 1 of 4)"
    assert said[1].split(maxsplit=1)[1] == "70.0% of the grid's joules  (quartiles 60.0% to 80.0%)"
    assert said[2].endswith("25% of the best rival, random (bar 60%); 20.0% of the grid (bar 25%): met")
    assert said[3].endswith("not reached of the grid (bar 25%): missed")


def test_a_search_that_runs_out_of_proposals_never_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    members = tuple(Member(trial_id=t, settings={"k": t}, joules=j, loss=loss, curve=()) for t, j, loss in ROWS)
    table = Table(members)
    assert spent_until(table, "random", 0) <= 1
    monkeypatch.setattr(Table, "reached", lambda self, done: False)
    assert spent_until(table, "random", 0) == NEVER


ROWS = (("a", 1.0, 3.0), ("b", 2.0, 2.0), ("c", 4.0, 1.0), ("d", 5.0, 3.5))
