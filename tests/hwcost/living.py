"""A process that measures, for tests that stop, kill or fork it: simulated boards on the machine's real clock.

    python tests/hwcost/living.py SECONDS [HISTORY_PATH]

Prints `open` when its window is open, and after SECONDS of its own sleep one JSON line with what it measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from tests.hwcost.fake_nvml import Board, RealTime, fake_pynvml


def main() -> None:
    world = RealTime()
    board = Board(world, uuid="GPU-living")
    board.true_energy(world.now + 60)  # draw the curve before the clock matters
    sys.modules["pynvml"] = fake_pynvml([board])
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    from hwcost import EnergyMonitor

    path = sys.argv[2] if len(sys.argv) > 2 else None
    with EnergyMonitor.for_assigned_devices(history_path=path) as monitor:
        with monitor.window("train") as window:
            print("open", flush=True)
            time.sleep(float(sys.argv[1]))
        result = dataclasses.asdict(window.measurement)
        assert window.start_s is not None
        assert window.end_s is not None
        result["true_j"] = board.true_energy(window.end_s) - board.true_energy(window.start_s)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
