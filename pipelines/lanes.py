"""Which trial a worker takes next, where all trials are known beforehand.

A process keeps compiled code by shape, and of the processes of a host that want a new shape one compiles while the
others wait. So a worker that is free goes on with a shape that it has, else takes one that nobody has begun, else helps
where most is left. Replicates stay interleaved: no experiment's second seed starts before every first one has, and a
replicate goes to a board that has not run its experiment, if it can, so that boards do not hide in the differences.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

from pipelines.config import TrialConfig
from pipelines.searcher import Stateless

#: A shape: what compiled code depends on; None where nothing is compiled.
Code = Hashable


class Worker(NamedTuple):
    """A process that runs one trial after the other."""

    host: str
    pid: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """A trial that waits: its experiment, which replicate of it this is, and its shape."""

    trial_id: str
    experiment: str
    round: int
    code: Code


def cards(trials: Iterable[TrialConfig], codes: Mapping[str, Code]) -> list[Card]:
    """The trials of a plan in its order, with their shapes by trial."""
    seen: Counter[str] = Counter()
    found = []
    for trial in trials:
        experiment = trial.fingerprint
        card = Card(
            trial_id=trial.trial_id, experiment=experiment, round=seen[experiment], code=codes.get(trial.trial_id)
        )
        seen[experiment] += 1
        found.append(card)
    return found


class Lanes:
    """Deals cards. Deterministic in the order of the calls; in the plan's order where nothing is compiled.

    Args:
        most: shapes that a process keeps (`warm.MOST_SHAPES`); at one more it drops all.
    """

    def __init__(self, waiting: Iterable[Card], most: int) -> None:
        self.waiting = list(waiting)
        self.most = most
        self._has: dict[Worker, set[Code]] = {}
        self._ran: Counter[tuple[Worker | None, str]] = Counter()
        self._begun: set[Code] = set()
        self._built: set[tuple[str | None, Code]] = set()

    def deal(self, worker: Worker | None) -> Card | None:
        """The next trial of a worker (None: a new process); None where none is left."""
        if not self.waiting:
            return None
        first = min(card.round for card in self.waiting)
        left = Counter(card.code for card in self.waiting)
        card = min(
            (card for card in self.waiting if card.round == first), key=lambda card: self._rank(card, worker, left)
        )
        self.waiting.remove(card)
        self._begun.add(card.code)
        return card

    def built(self, card: Card, worker: Worker) -> None:
        """A trial trains: its code is compiled, for its process and for the cache of its host."""
        has = self._has.setdefault(worker, set())
        if card.code not in has and len(has) >= self.most:
            has.clear()
        has.add(card.code)
        self._built.add((worker.host, card.code))

    def ran(self, card: Card, worker: Worker) -> None:
        """A trial ended."""
        self._ran[worker, card.experiment] += 1

    def _rank(self, card: Card, worker: Worker | None, left: Counter[Code]) -> tuple[int, ...]:
        """Lower is sooner; equal ranks keep the plan's order."""
        again = 0 if card.code is None else self._ran[worker, card.experiment]
        if card.code not in self._begun:  # of later rounds (a router's seed is in its code): soon, it takes longest
            return (0, -1) if card.round else (again, 1)
        if worker is not None and card.code in self._has.get(worker, ()):
            return (again, 0)
        waits = worker is not None and (worker.host, card.code) not in self._built
        return (again, 2 + waits, -left[card.code])


class LaneSearch(Stateless):
    """The trials of a plan as a Ray Tune searcher, which is asked for one whenever a process is free.

    Args:
        entries: configurations of actors, by trial.
        waiting: the trials to run.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any]], waiting: Iterable[Card], most: int) -> None:
        super().__init__()
        self.entries, self.lanes = entries, Lanes(waiting, most)
        self._running: dict[str, Card] = {}
        self._workers: dict[str, Worker] = {}
        self._free: list[Worker] = []

    def suggest(self, trial_id: str) -> Any:
        """The configuration of Ray's next trial: it goes to the process that became free first."""
        card = self.lanes.deal(self._free.pop(0) if self._free else None)
        if card is None:
            return self.FINISHED
        self._running[trial_id] = card
        return dict(self.entries[card.trial_id])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The first report comes when the code is compiled, and says which process runs the trial."""
        if trial_id in self._running and "pid" in result:
            worker = self._workers[trial_id] = Worker(result["hostname"], result["pid"])
            self.lanes.built(self._running[trial_id], worker)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Its process is free, unless it died. Of its last result only this word comes."""
        if result and not error:
            self.on_trial_result(trial_id, result)
        card, worker = self._running.pop(trial_id, None), self._workers.pop(trial_id, None)
        if card is not None and worker is not None and not error:
            self.lanes.ran(card, worker)
            self._free.append(worker)
