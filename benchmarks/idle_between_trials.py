"""How long a GPU stands idle between two trials, from the power traces of a sweep.

    python benchmarks/idle_between_trials.py OUT [--sweep ID]

A sample is work where the device draws more than its idle power in that sweep (the 2nd percentile of all its samples)
plus a quarter of the way to what it draws in training (the median there). The gap between two trials on a device is
the time from the last sample of work of one to the first of the next; the trace has a sample about every 0.25 s, which
bounds the error on both sides. The first trial of a shape in a process compiles; such gaps stand on lines of their own,
and of the rest the median is judged: at most 1 s.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.records import PowerRecord, Store, TrialRecord

BAR_S = 1.0
WORK_SHARE = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """Idle seconds before a trial on a device; `same_shape` where the device ran its shape before."""

    device_id: str
    trial_id: str
    top_k: int | None
    seconds: float
    same_shape: bool


def gaps(trials: Sequence[Mapping[str, Any]], power: Sequence[Mapping[str, Any]]) -> list[Gap]:
    """Gaps between consecutive trials of each device, in order of time."""
    started = {(t["trial_id"], t["attempt"]): t for t in trials}
    samples: dict[str, dict[tuple[str, int], list[tuple[float, float, str | None]]]] = {}
    for row in power:
        key = (row["trial_id"], row["attempt"])
        if row["power_w"] is not None and key in started:
            at_s = started[key]["started_at"].timestamp() + row["time_s"]
            samples.setdefault(row["device_id"], {}).setdefault(key, []).append((at_s, row["power_w"], row["phase"]))
    found: list[Gap] = []
    for device_id, by_trial in samples.items():
        level_w = threshold(list(by_trial.values()))
        busy = {key: [s for s, watts, _ in rows if watts > level_w] for key, rows in by_trial.items()}
        order = sorted((key for key in busy if busy[key]), key=lambda key: min(busy[key]))
        seen: set[str] = {shape(started[order[0]])} if order else set()
        for before, after in itertools.pairwise(order):
            same = shape(started[after]) in seen
            seen.add(shape(started[after]))
            seconds = max(0.0, min(busy[after]) - max(busy[before]))
            found.append(
                Gap(
                    device_id=device_id,
                    trial_id=after[0],
                    top_k=started[after]["top_k"],
                    seconds=seconds,
                    same_shape=same,
                )
            )
    return found


def threshold(trials: Sequence[Sequence[tuple[float, float, str | None]]]) -> float:
    """Watts above which a device works."""
    every_w = [watts for rows in trials for _, watts, _ in rows]
    train_w = [watts for rows in trials for _, watts, phase in rows if phase == "train"]
    idle_w = float(np.percentile(every_w, 2))
    return idle_w + WORK_SHARE * (float(np.median(train_w or every_w)) - idle_w)


def shape(trial: Mapping[str, Any]) -> str:
    """What compiled code depends on, as far as the table says."""
    keys = ("router", "top_k", "expert_widths", "regularizer", "regularizer_weight", "batch_size", "seq_len", "dtype")
    return json.dumps([trial[key] for key in keys])


def main() -> int:
    """Print the gaps of each kind; exit code 0 where the median of one shape's is within the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--sweep")
    arguments = parser.parse_args()
    store = Store(arguments.out)
    sweep = arguments.sweep or store.sweep_ids()[-1]
    found = gaps(store.read(TrialRecord, sweep).to_pylist(), store.read(PowerRecord, sweep).to_pylist())
    for gap in (gap for gap in found if not gap.same_shape):
        print(f"{gap.device_id}  {gap.trial_id}  first of its shape on this device: {gap.seconds:.1f} s (compilation)")
    same = [gap.seconds for gap in found if gap.same_shape]
    if not same:
        print("no two trials of one shape on one device", file=sys.stderr)
        return 1
    low, middle, high, worst = np.percentile(same, [25, 50, 75, 100])
    print(
        f"{len(same)} gaps between trials of a shape that the device ran before: median {middle:.2f} s"
        f" (quartiles {low:.2f} to {high:.2f}, longest {worst:.2f});"
        f" bar {BAR_S:g} s: {'met' if middle <= BAR_S else 'missed'}"
    )
    return 0 if middle <= BAR_S else 1


if __name__ == "__main__":
    sys.exit(main())
