"""How long sweeps on several GPUs of one host take, by the order in which their trials are dealt: a model of events.

    python benchmarks/lanes.py [SPACE.yaml ...] [--workers 4]

A worker trains for `TRAIN_S`. A shape that it keeps costs nothing, one in the host's cache `LOAD_S`, a new one
`COMPILE_S` under a lock: others that want it wait, then load it. Before: trials in the plan's order to whoever is free,
six shapes kept. After: `pipelines.lanes`.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from pipelines.estimate import code_of
from pipelines.lanes import Card, Lanes, Worker, cards
from pipelines.plan import plan_sweep
from pipelines.warm import MOST_SHAPES
from tune_spaces import load_space

COMPILE_S, LOAD_S, TRAIN_S = 25.0, 4.0, 8.0
_SHAPES_BEFORE = 6
SPACES = Path(__file__).parent.parent / "tune_spaces" / "study"


class Host:
    """Workers that run cards, and what they keep; `log` has (start, worker, card, seconds before it trains)."""

    def __init__(self, workers: int, most: int) -> None:
        self.most = most
        self.workers = [Worker("host", pid) for pid in range(workers)]
        self.kept: dict[Worker, set[Hashable]] = {worker: set() for worker in self.workers}
        self.built_s: dict[Hashable, float] = {}
        self.log: list[tuple[float, Worker, Card, float]] = []

    def wait_s(self, worker: Worker, card: Card, now_s: float) -> float:
        """Seconds until the card trains on this worker."""
        kept = self.kept[worker]
        if card.code in kept:
            return 0.0
        if len(kept) >= self.most:
            kept.clear()
        kept.add(card.code)
        if card.code not in self.built_s:
            self.built_s[card.code] = now_s + COMPILE_S
            return COMPILE_S
        return max(0.0, self.built_s[card.code] - now_s) + LOAD_S

    def run(
        self,
        deal: Callable[[Worker], Card | None],
        built: Callable[[Card, Worker], None] = lambda card, worker: None,
        ran: Callable[[Card, Worker], None] = lambda card, worker: None,
    ) -> float:
        """Seconds until all is done."""
        events: list[tuple[float, int, str, Worker, Card | None]] = []
        for number, worker in enumerate(self.workers):
            heapq.heappush(events, (0.0, number, "free", worker, None))
        end_s, count = 0.0, len(self.workers)
        while events:
            now_s, _, what, worker, card = heapq.heappop(events)
            if what == "train" and card is not None:
                built(card, worker)
                heapq.heappush(events, (now_s + TRAIN_S, count, "free", worker, card))
            else:
                if card is not None:
                    ran(card, worker)
                    end_s = max(end_s, now_s)
                if (new := deal(worker)) is not None:
                    seconds = self.wait_s(worker, new, now_s)
                    self.log.append((now_s, worker, new, seconds))
                    heapq.heappush(events, (now_s + seconds, count, "train", worker, new))
            count += 1
        return end_s


def before_s(waiting: Sequence[Card], workers: int, most: int = _SHAPES_BEFORE) -> float:
    """In the plan's order."""
    rest = list(waiting)
    return Host(workers, most).run(lambda worker: rest.pop(0) if rest else None)


def after(waiting: Sequence[Card], workers: int, most: int = MOST_SHAPES) -> tuple[float, Host]:
    """As lanes deal. A worker is known from its first trial on."""
    lanes, host, known = Lanes(waiting, most), Host(workers, most), set[Worker]()

    def deal(worker: Worker) -> Card | None:
        new = None if worker not in known else worker
        known.add(worker)
        return lanes.deal(new)

    return host.run(deal, lanes.built, lanes.ran), host


def cards_of(path: Path) -> list[Card]:
    """The trials of a space."""
    trials = plan_sweep(load_space(path)).trials
    return cards(trials, {trial.trial_id: code_of(trial) for trial in trials})


def main() -> None:
    """Print a row per space."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spaces", nargs="*", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{'space':<18} trials shapes   plan's order  lanes  no compiling")
    for path in arguments.spaces or sorted(SPACES.glob("*.yaml")):
        waiting = cards_of(path)
        shapes = len({card.code for card in waiting})
        seconds, _ = after(waiting, arguments.workers)
        least = -(-len(waiting) // arguments.workers) * TRAIN_S
        print(
            f"{path.stem:<18} {len(waiting):6d} {shapes:6d} {before_s(waiting, arguments.workers):12.0f} s"
            f" {seconds:5.0f} s {least:9.0f} s"
        )


if __name__ == "__main__":
    main()
