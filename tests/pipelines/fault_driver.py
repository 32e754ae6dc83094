"""The driver of a sweep in a process of its own, which tests may kill: two fake GPUs, a tiny trainer.

python fault_driver.py OUT SPACE.yaml SWEEP_ID [OPTION=JSON ...]
"""

from __future__ import annotations

import json
import sys

import ray
import torch

from hwcost.anchor import measure_anchor
from pipelines.actor import TrialActor
from pipelines.anchors import AnchorActor
from pipelines.journal import Journal
from pipelines.plan import plan_sweep
from pipelines.records import Store
from pipelines.sweep import run_sweep, stored_plan
from pipelines.tracking import Tracker
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
    """Begin or resume the sweep, bring MLflow up to date, print what happened as the last line."""
    out, space, sweep_id, *options = sys.argv[1:]
    settings = {key: json.loads(value) for key, _, value in (option.partition("=") for option in options)}
    # Ray would start without GPUs of its own accord: this host has none.
    ray_init = ray.init
    ray.init = lambda **options: ray_init(**(options | {"num_cpus": 2, "num_gpus": 2}))
    rules = {
        key: settings.pop(key) for key in ("scheduler", "search", "samples", "max_joules", "anchor") if key in settings
    }
    if Journal(out, sweep_id).has("plan.json"):
        plan = stored_plan(out, sweep_id)
    else:
        plan = plan_sweep(load_space(space), sweep_id=sweep_id, **rules)
    actor = CpuTrialActor if settings.pop("cpu_anchor", False) else TrialActor
    result = run_sweep(plan, out=out, actor=actor, **settings)
    tracker = Tracker.open(out)
    if settings.get("tracking_uri") is None:
        tracker.mirror(Store(out), sweep_id)
    print(json.dumps({"ended": result.ended, "states": [record.state for record in result.records]}), flush=True)


if __name__ == "__main__":
    main()
