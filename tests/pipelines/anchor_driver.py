"""The driver of a sweep on two fake GPUs whose anchor runs on the CPU.

python anchor_driver.py OUT SPACE.yaml SWEEP_ID
"""

from __future__ import annotations

import json
import sys

import ray
import torch

from hwcost.anchor import measure_anchor
from pipelines.actor import TrialActor
from pipelines.anchors import AnchorActor
from pipelines.plan import plan_sweep
from pipelines.sweep import run_sweep
from tune_spaces import load_space


def short(monitor):
    """The anchor on the CPU beside a fake board: its joules are the board's, its work is small."""
    return measure_anchor(monitor, torch.device("cpu"), seconds=0.5, warmup_s=0.1)


class CpuAnchorActor(AnchorActor):
    measure = staticmethod(short)


class CpuTrialActor(TrialActor):
    measure_anchor = staticmethod(short)
    anchor_actor = CpuAnchorActor


def main() -> None:
    """Run the sweep, print what happened as the last line."""
    out, space, sweep_id = sys.argv[1:]
    # Ray would start without GPUs of its own accord: this host has none.
    ray_init = ray.init
    ray.init = lambda **options: ray_init(**(options | {"num_cpus": 2, "num_gpus": 2}))
    result = run_sweep(plan_sweep(load_space(space), sweep_id=sweep_id), out=out, actor=CpuTrialActor)
    print(json.dumps({"ended": result.ended, "states": [record.state for record in result.records]}), flush=True)


if __name__ == "__main__":
    main()
