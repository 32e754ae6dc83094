"""A sweep: Ray Tune runs the trials of a plan, one actor each; Parquet is the truth, MLflow its mirror."""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray import tune

from hwcost import EnergyMonitor
from pipelines.config import ConfigError, TrialConfig
from pipelines.data import load_corpus
from pipelines.model import Hardware, dense_model
from pipelines.plan import SweepPlan
from pipelines.progress import Progress
from pipelines.records import EpochRecord, PowerRecord, Store, TrialRecord
from pipelines.tracking import Tracker
from pipelines.trial import Trial, TrialKey, config_columns

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial gets, and how many run at once."""

    cpus: float
    gpus: int
    parallel: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep left behind: its id and one record per trial."""

    sweep_id: str
    records: tuple[TrialRecord, ...]

    @property
    def completed(self) -> int:
        """Trials that ran to their end."""
        return sum(record.state == "COMPLETED" for record in self.records)


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Ray Tune's side of a trial: one `step` is one `Trial.advance`. Reused for the next trial where Tune can."""

    def setup(self, config: dict[str, Any]) -> None:
        """Make the trial; its work begins with the first step."""
        quiet_libraries()
        key = TrialKey(sweep_id=config["sweep_id"], trial_id=config["trial"]["trial_id"])
        values = {k: v for k, v in config["trial"].items() if k != "trial_id"}
        monitor = EnergyMonitor.for_assigned_devices(cpu_parallel=config["parallel"])
        self.trial = Trial(TrialConfig.parse(values), key, Store(config["out"]), monitor)

    def step(self) -> dict[str, Any]:
        """Advance the trial; the result carries the row that was made."""
        record = self.trial.advance()
        if isinstance(record, EpochRecord):
            return {"epoch": record.epoch, "row": dataclasses.asdict(record)}
        self._let_go()
        return {"epoch": self.trial.epoch, "trial_row": dataclasses.asdict(record), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial into this process: its imports and CUDA context are warm already."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Tune ended the trial early: keep what was measured."""
        if self.trial.record is None and self.trial.epochs:
            self.trial.stop()
        self._let_go()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: a trial that lost its actor is not continued."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""

    def _let_go(self) -> None:
        self.trial.release()
        self.trial.monitor.close()


class SweepCallback(tune.Callback):  # type: ignore[misc]
    """Follows the trials in the driver: the terminal, MLflow, and a FAILED row where an actor died."""

    def __init__(self, plan: SweepPlan, out: str, tracking_uri: str | None) -> None:
        self.plan, self.out, self.tracking_uri = plan, out, tracking_uri

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """Build clients here: Tune pickles callbacks before."""
        self.store = Store(self.out)
        self.tracker = Tracker.open(self.out, self.tracking_uri)
        self.tracker.start_sweep(self.plan.sweep_id, self.plan.space, question=self.plan.question)
        self.progress = Progress(self.plan.trials)
        self.epochs: dict[str, list[EpochRecord]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial began."""
        self.progress.started(trial.config["trial"]["trial_id"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Show and mirror an epoch, or the whole trial."""
        if "trial_row" in result:
            self._finished(TrialRecord(**result["trial_row"]))
        elif "row" in result:
            record = EpochRecord(**result["row"])
            self.epochs.setdefault(record.trial_id, []).append(record)
            self.progress.epoch(record)
            self.tracker.log_epoch(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The actor itself died, so nobody else can write the trial's row."""
        values = dict(trial.config["trial"])
        key = TrialKey(sweep_id=self.plan.sweep_id, trial_id=values.pop("trial_id"))
        record = lost_trial(TrialConfig.parse(values), key, reason="the trial's process died")
        self.store.write(TrialRecord, [record], **dataclasses.asdict(key))
        self._finished(record)

    def _finished(self, record: TrialRecord) -> None:
        self.progress.finished(record)
        where = self.store.path(PowerRecord, record.sweep_id, record.trial_id, record.attempt)
        self.tracker.log_trial(record, self.epochs.pop(record.trial_id, []), where)


def lost_trial(config: TrialConfig, key: TrialKey, *, reason: str) -> TrialRecord:
    """The FAILED row of a trial whose process is gone: nothing measured is known."""
    import datetime as dt

    return TrialRecord(
        **dataclasses.asdict(key),
        state="FAILED",
        censored=False,
        error=reason,
        started_at=dt.datetime.now(dt.UTC),
        **config_columns(config),
    )


def run_sweep(
    plan: SweepPlan,
    *,
    out: str | os.PathLike[str],
    parallel: int | None = None,
    address: str = "local",
    tracking_uri: str | None = None,
) -> SweepResult:
    """Run every trial of a plan and write its tables under `out`.

    Raises:
        ConfigError: the data, the base model, the devices or `out` cannot be had; nothing was written then.
    """
    out = os.fspath(out) if "://" in os.fspath(out) else os.path.abspath(out)
    preflight(plan.trials)
    started_here = _connect(address)
    try:
        resources = _resources(plan.trials, parallel)
        check_writable(out)
        _tuner(plan, out, resources, tracking_uri).fit()
    finally:
        if started_here:
            ray.shutdown()
    rows = Store(out).read(TrialRecord, plan.sweep_id).to_pylist()
    return SweepResult(sweep_id=plan.sweep_id, records=tuple(TrialRecord(**row) for row in rows))


def preflight(trials: Sequence[TrialConfig]) -> None:
    """Load what the trials need once, so that bad input ends before anything is written (and caches are warm)."""
    checked: set[tuple[Any, ...]] = set()
    for config in trials:
        key = (config.data, config.tokenizer, config.base, config.seq_len, config.n_embd, config.n_layer)
        if key not in checked:
            checked.add(key)
            corpus = load_corpus(config)
            if config.base != "random":
                dense_model(config, corpus)


def _connect(address: str) -> bool:
    os.environ.update({key: os.environ.get(key, value) for key, value in _QUIET.items()})
    if ray.is_initialized():
        return False
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address == "local":
        ray.init(address="local", include_dashboard=False, **options)
    else:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"address: expected a Ray cluster at {address!r}, got {str(error).splitlines()[0]}"
            ) from None
    return True


def _resources(trials: Sequence[TrialConfig], parallel: int | None) -> Resources:
    cluster: Mapping[str, float] = ray.cluster_resources()
    cpus, gpus = int(cluster.get("CPU", 1)), int(cluster.get("GPU", 0))
    if any(config.device == "cuda" for config in trials) and not gpus:
        raise ConfigError("device: expected a CUDA GPU, got a cluster without one; use device: auto or cpu")
    wants_gpu = gpus > 0 and any(config.device != "cpu" for config in trials)
    slots = min(gpus if wants_gpu else cpus, len(trials))
    parallel = max(1, min(parallel or slots, slots))
    return Resources(cpus=max(1, cpus // parallel), gpus=1 if wants_gpu else 0, parallel=parallel)


def check_writable(out: str) -> None:
    """Raises ConfigError where `out` cannot be written."""
    if "://" in out:
        return
    probe = os.path.join(out, f".write-test-{uuid.uuid4().hex}")
    try:
        os.makedirs(out, exist_ok=True)
        with open(probe, "wb"):
            pass
        os.unlink(probe)
    except OSError as error:
        raise ConfigError(f"out: expected a folder that can be written, got {out}: {error.strerror or error}") from None


def _tuner(plan: SweepPlan, out: str, resources: Resources, tracking_uri: str | None) -> Any:
    entries = [{"trial_id": c.trial_id, **_with_threads(c, resources).model_dump(mode="json")} for c in plan.trials]
    common = {"sweep_id": plan.sweep_id, "out": out, "parallel": resources.parallel}
    return tune.Tuner(
        tune.with_resources(TrialActor, {"cpu": resources.cpus, "gpu": resources.gpus}),
        param_space={**common, "trial": tune.grid_search(entries)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=resources.parallel,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.config["trial"]["trial_id"],
            trial_name_creator=lambda trial: trial.config["trial"]["trial_id"],
        ),
        run_config=tune.RunConfig(
            name=plan.sweep_id,
            storage_path=f"{out}/ray",
            verbose=0,
            callbacks=[SweepCallback(plan, out, tracking_uri)],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )


def _with_threads(config: TrialConfig, resources: Resources) -> TrialConfig:
    threads = config.threads or (None if resources.gpus else int(resources.cpus))
    return config.model_copy(update={"threads": threads})


def quiet_libraries() -> None:
    """Keep third-party chatter out of a trial's output; errors still show."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_float32_matmul_precision("high")


__all__ = ["Hardware", "Resources", "SweepResult", "TrialActor", "run_sweep"]
