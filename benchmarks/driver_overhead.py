"""What the driver itself costs: a sweep of tabulated trials (no training), then its resumption.

python benchmarks/driver_overhead.py [--trials 1000] [--out FOLDER]

Every trial claims its attempt, writes its rows, is shown, mirrored to MLflow and booked as a real one; only the
training is left out. Prints seconds per trial (of wall time, and of the driver's CPU time, which a loaded machine does
not stretch), the driver's resident memory, and the seconds of a resume that finds everything done and of one that finds
half of the rows missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import io
import json
import os
import shutil
import tempfile
import time
from typing import Any

import ray

from pipelines import recover
from pipelines.actor import TrialActor
from pipelines.config import TrialConfig
from pipelines.follow import SweepCallback
from pipelines.journal import Journal
from pipelines.plan import plan_sweep
from pipelines.records import EpochRecord, Store, TrialRecord
from pipelines.sweep import run_sweep
from pipelines.trial_rows import config_columns
from tune_spaces import Grid, Space


class TabulatedActor(TrialActor):
    """Writes the rows that a trial would write."""

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing to warm up."""

    def step(self) -> dict[str, Any]:
        """The whole trial at once: its rows are made, not measured."""
        return self.end(self.epochs())

    def epochs(self) -> list[EpochRecord]:
        """Claim the trial and write its epochs."""
        config, trial = self.config, self.config_of_trial()
        attempt = Journal(config["out"], config["sweep_id"]).claim(trial.trial_id, recover.empty_claim(trial))
        key = {"sweep_id": config["sweep_id"], "trial_id": trial.trial_id, "attempt": attempt}
        loss, joules = self.outcome(trial)
        epoch = {"train_energy_j": joules, "eval_loss_nats": loss, "tokens_trained": 1000, "energy_source": "modelled"}
        epochs = [EpochRecord(**key, epoch=n, **epoch) for n in range(trial.epochs + 1)]
        Store(config["out"]).write(EpochRecord, epochs, **key)
        return epochs

    def config_of_trial(self) -> TrialConfig:
        """The trial's configuration."""
        return TrialConfig.parse({k: v for k, v in self.config["trial"].items() if k != "trial_id"})

    def outcome(self, trial: TrialConfig) -> tuple[float, float]:
        """Loss and joules of a trial."""
        return 3.0 + 0.1 * trial.energy_lambda, 100.0 / (1 + trial.energy_lambda)

    def end(self, epochs: list[EpochRecord]) -> dict[str, Any]:
        """Write the trial's row."""
        last = epochs[-1]
        key = {"sweep_id": last.sweep_id, "trial_id": last.trial_id, "attempt": last.attempt}
        row = TrialRecord(
            **key,
            state="COMPLETED",
            censored=False,
            ended_by="itself",
            started_at=dt.datetime.now(dt.UTC),
            train_energy_j=last.train_energy_j,
            eval_loss_nats=last.eval_loss_nats,
            energy_source="modelled",
            **config_columns(self.config_of_trial()),
        )
        Store(self.config["out"]).write(TrialRecord, [row], **key)
        text = json.dumps(dataclasses.asdict(row), default=lambda value: value.isoformat())
        return {"epoch": last.epoch, "trial_row": text, "done": True}


class Memory:
    """Resident memory of this process by finished trials."""

    def __init__(self) -> None:
        self.mb: list[float] = []

    def look(self) -> None:
        with open("/proc/self/statm", encoding="utf-8") as file:
            self.mb.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)


def main() -> None:
    """Run, resume, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    out = arguments.out or tempfile.mkdtemp(prefix="joulemoe-overhead-")
    lambdas = Grid(tuple(round(0.001 * (n + 1), 6) for n in range(arguments.trials)))
    fixed = {"base": "random", "data": "embedded", "n_layer": 1, "n_head": 2, "n_embd": 32, "seq_len": 128}
    fixed |= {"router": "energy", "expert_width_factors": [1.0, 0.5, 0.0], "epochs": 2}
    space = Space(
        name="overhead", question="", fixed=fixed, domains={"energy_lambda": lambdas}, conditions={}, sweep={}
    )
    plan = plan_sweep(space)
    memory, original = Memory(), SweepCallback._finished

    def finished(self: SweepCallback, record: TrialRecord) -> None:
        original(self, record)
        memory.look()

    SweepCallback._finished = finished  # type: ignore[method-assign]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    before_s = time.process_time()
    seconds = [timed(plan, out)]
    cpu_s = time.process_time() - before_s
    seconds.append(timed(plan, out))
    for trial in plan.trials[::2]:
        for table in (TrialRecord, EpochRecord):
            os.unlink(Store(out).path(table, plan.sweep_id, trial.trial_id, 0))
        os.unlink(f"{out}/sweeps/{plan.sweep_id}/attempts/{trial.trial_id}-0.json")
    seconds.append(timed(plan, out))
    ray.shutdown()
    count = len(plan.trials)
    growth = max(memory.mb[100:count]) - memory.mb[min(100, count - 1)] if count > 100 else float("nan")
    print(f"{count} tabulated trials: {seconds[0] / count:.3f} s a trial ({seconds[0]:.1f} s)")
    load = os.getloadavg()[1]
    print(f"the driver computed for {cpu_s / count:.3f} s a trial, MLflow's thread included; load average {load:.1f}")
    print(f"driver's resident memory: {memory.mb[0]:.0f} MB at the first trial, +{growth:.1f} MB after the first 100")
    print(
        f"resume of the whole: {seconds[1]:.2f} s where all is done; {seconds[2]:.1f} s with every second trial missing"
    )
    if arguments.out is None:
        shutil.rmtree(out)


def timed(plan: Any, out: str) -> float:
    """Seconds of one session."""
    start_s = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        run_sweep(plan, out=out, parallel=2, actor=TabulatedActor)
    return time.monotonic() - start_s


if __name__ == "__main__":
    main()
