"""Do the trials' ledgers account for what the GPUs' own energy counters saw while a sweep ran?

    python benchmarks/counter_check.py --out results -- joulemoe sweep tune_spaces/distilgpt2.yaml --out results ...

Runs the command, measures every GPU of this host over its whole span, and compares with the joules that the new
trials recorded on each GPU. What no trial recorded must be idle power: the time before, between and after trials.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from hwcost import EnergyMonitor, Measurement
from pipelines.records import Store, TrialRecord

IDLE_W = (60.0, 180.0)  # an H200 draws 80-85 W without a context, 119-130 W with one, more while it cools


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    before = set(Store(options.out).sweep_ids())
    with EnergyMonitor.for_assigned_devices() as monitor:
        with monitor.window("sweep") as window:
            code = subprocess.run(command, check=False).returncode
        whole = window.measurement
    trials = [row for row in Store(options.out).read(TrialRecord).to_pylist() if row["sweep_id"] not in before]
    rows = [compare(device, trials) for device in whole.devices or (whole,)]
    print(json.dumps({"command": command, "returncode": code, "source": whole.source, "gpus": rows}, indent=1))
    return 0 if code == 0 and rows and all(row["accounted"] for row in rows) else 1


def compare(gpu: Measurement, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One GPU's counter over the span against the trials that ran on it."""
    own = [trial for trial in trials if trial["gpu_uuid"] == gpu.device_id]
    recorded_j = sum(trial["total_energy_j"] or 0.0 for trial in own)
    recorded_s = sum(trial["duration_s"] or 0.0 for trial in own)
    rest_j, rest_s = (gpu.energy_j or 0.0) - recorded_j, gpu.duration_s - recorded_s
    rest_w = rest_j / rest_s if rest_s > 0 else None
    return {
        "gpu": gpu.device_id,
        "trials": len(own),
        "counter_j": gpu.energy_j,
        "trials_j": recorded_j,
        "outside_trials_j": rest_j,
        "outside_trials_s": rest_s,
        "outside_trials_w": rest_w,
        "accounted": bool(own) and rest_w is not None and IDLE_W[0] <= rest_w <= IDLE_W[1],
    }


if __name__ == "__main__":
    sys.exit(main())
