"""A sweep: Ray Tune runs the trials of a plan, one actor each; Parquet is the truth, MLflow its mirror."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import tune

from hwcost.cpu import watts_per_core
from pipelines import anchors, recover
from pipelines.actor import TrialActor, quiet_libraries
from pipelines.beats import Meter
from pipelines.budget import Budget, ends_at_sigint
from pipelines.checkpoints import prune_finals
from pipelines.config import ConfigError, StorageError, TrialConfig
from pipelines.data import load_corpus
from pipelines.epoch_ends import Ends, front_table
from pipelines.estimate import code_of
from pipelines.follow import STOP_S, SweepCallback
from pipelines.journal import Journal
from pipelines.lanes import LaneSearch, cards
from pipelines.model import Hardware, dense_model
from pipelines.pareto import pareto_fronts
from pipelines.plan import SweepPlan
from pipelines.records import EpochRecord, Store, TrialRecord
from pipelines.resources import Resources, resources_of
from pipelines.scheduler import ParetoASHA, rungs_of
from pipelines.search import StudySearch, study_of
from pipelines.trial_rows import is_final
from pipelines.warm import MOST_SHAPES

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep left behind: its id and the last record of every trial; `ended` says why it ended early."""

    sweep_id: str
    records: tuple[TrialRecord, ...]
    ended: str | None = None

    @property
    def completed(self) -> int:
        """Trials that ran to their end."""
        return sum(record.state == "COMPLETED" for record in self.records)


def run_sweep(
    plan: SweepPlan,
    *,
    out: str | os.PathLike[str],
    parallel: int | None = None,
    address: str = "local",
    tracking_uri: str | None = None,
    retries: int = 2,
    timeout_s: float | None = None,
    actor: type[TrialActor] = TrialActor,
) -> SweepResult:
    """Run every trial of a plan that has no final row yet and write its tables under `out`.

    Args:
        plan: what to run; a plan that was stored under `out` before goes on where it ended.
        out: folder or URI of the results.
        parallel: trials at once; on a cluster that can grow it may be more than there are GPUs.
        address: `local`, `auto` or `ray://...`.
        tracking_uri: MLflow's address; beside the results where None.
        retries: further attempts of a trial whose process died.
        timeout_s: seconds without a report after which a trial counts as hung; None: 20 times the longest
            stretch between two reports so far, at least 15 minutes.
        actor: what runs the trials.

    Raises:
        ConfigError: the data, the base model, the devices or `out` cannot be had (nothing was written then), or
            another driver is alive.
        StorageError: `out` cannot be written any more, or (on an object store) another driver took the sweep over; a
            later session goes on from what is there.
    """
    out = os.fspath(out) if "://" in os.fspath(out) else os.path.abspath(out)
    journal = Journal(out, plan.sweep_id)
    ended = None
    with contextlib.ExitStack() as stack:
        begun = journal.has("plan.json")
        if begun:
            stack.enter_context(journal.driving())
        if not begun or not _is_done(plan, Store(out)):
            preflight(plan.trials or plan.examples())
            check_storage(out, tracking_uri)
            own_ray = stack.enter_context(_connected(address))
            resources = resources_of(plan, parallel, local=address == "local")
            if resources.waits:
                print("The cluster has no GPU yet: trials (device: cuda) wait for a node with one.", flush=True)
            check_writable(out)
            if not begun:
                stack.enter_context(journal.driving())
            ended = _drive(plan, journal, _Run(out, resources, tracking_uri, retries, timeout_s, actor, own_ray))
    rows = recover.rows_of(Store(out), plan.sweep_id)
    return SweepResult(sweep_id=plan.sweep_id, records=tuple(rows.values()), ended=ended)


@dataclasses.dataclass(frozen=True)
class _Run:
    """How this session runs."""

    out: str
    resources: Resources
    tracking_uri: str | None
    retries: int
    timeout_s: float | None
    actor: type[TrialActor]
    own_ray: bool


def stored_plan(out: str | os.PathLike[str], sweep_id: str) -> SweepPlan:
    """The plan of a sweep that was begun before.

    Raises:
        ConfigError: there is none.
    """
    text = os.fspath(out)
    document = Journal(text, sweep_id).get("plan.json")
    if document is None:
        raise ConfigError(f"resume: expected a sweep under {text}/sweeps, got {sweep_id!r}")
    return SweepPlan.from_document(document)


def _drive(plan: SweepPlan, journal: Journal, run: _Run) -> str | None:
    """One session of a sweep: book what earlier ones left, run what is missing. Returns why it ended early."""
    store = Store(run.out)
    stored = journal.get("plan.json")
    if stored != json.loads(json.dumps(plan.to_document())):
        journal.put("plan.json", plan.to_document())
    if stored is not None:
        recover.end_orphans(journal, _with_rows(store, plan))
        recover.write_missing(store, journal, ended_by="died")
    known = recover.rows_of(store, plan.sweep_id)
    final = {trial_id for trial_id, row in known.items() if is_final(row)}
    meter, session = Meter(journal.beats), uuid.uuid4().hex
    reserve = anchors.Reserve(store, plan.sweep_id, session)
    how: dict[str, Any] = {"before_s": journal.seconds(), "reserve_j": reserve.read_j, "holds": journal.holds}
    if plan.stall is not None:
        how["ends_of"] = Ends(store, plan.sweep_id, plan.objectives).of
    budget = Budget(plan, meter.read_j, list(known.values()), **how)
    work = _work(plan, journal, run, session, list(known.values()), final)
    if work is None:
        return None
    began_s = time.monotonic()

    def book(joules: float | None = None) -> None:
        if journal.holds():
            journal.book_session(session, time.monotonic() - began_s, joules)

    follower = SweepCallback(plan, run.out, run.tracking_uri, budget, run.timeout_s, book)
    try:
        book()
        _fit(_tuner(plan, run, work, store, follower), budget, run)
        if not journal.holds():
            raise journal.taken_over()
        if isinstance(work.searcher, StudySearch) and work.searcher.exhausted is not None:
            plan = dataclasses.replace(plan, samples=work.searcher.exhausted)
            journal.put("plan.json", plan.to_document())
            print(f"The space has no more experiments: {plan.samples} were drawn.", flush=True)
        if budget.broken is not None:
            raise budget.broken
        recover.end_orphans(journal, _with_rows(store, plan), patience_s=STOP_S)
        left = recover.write_missing(store, journal, ended_by="budget" if budget.reason else "interrupt")
        ended = budget.reason or ("interrupted" if left or _missing(plan, store) else None)
        if ended != "interrupted" and ray.is_initialized():
            anchors.at_end(run.out, plan.sweep_id, session, actor=run.actor.anchor_actor)
        return ended
    except OSError as error:
        raise StorageError(
            f"out: expected a folder that can be written, got {run.out}: {error.strerror or error}; what was written "
            f"is kept, go on with --resume {plan.sweep_id} --out {run.out}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            journal.beats.settle()
        with contextlib.suppress(OSError):
            book(meter.read_j())
        follower.close()
        with contextlib.suppress(OSError):
            if journal.holds():
                prune_finals(journal, _front_members(store, plan))
                recover.remove_leftovers(store, journal)


def _fit(tuner: Any, budget: Budget, run: _Run) -> None:
    """Run the trials. A first SIGINT ends them in order, a second one at once."""
    try:
        with ends_at_sigint(budget):
            tuner.fit()
    except KeyboardInterrupt:
        if run.own_ray:
            ray.shutdown()


def _with_rows(store: Store, plan: SweepPlan) -> set[tuple[str, int]]:
    """Attempts that have their row."""
    rows = store.read(TrialRecord, plan.sweep_id, columns=["trial_id", "attempt"]).to_pylist()
    return {(row["trial_id"], row["attempt"]) for row in rows}


def _front_members(store: Store, plan: SweepPlan) -> set[str]:
    """Trials whose configuration is on a front of the sweep's objectives; of anytime trials any point of it."""
    table = front_table(store, plan.sweep_id, plan.objectives)
    fronts = pareto_fronts(store, *plan.objectives, sweep_id=plan.sweep_id, table=table)
    return {trial for front in fronts for row in front.rows() for trial in str(row["trial_id"]).split()}


def _is_done(plan: SweepPlan, store: Store) -> bool:
    """Whether every trial of a plan has its final row."""
    rows = recover.rows_of(store, plan.sweep_id)
    return not plan.left(trial_id for trial_id, row in rows.items() if is_final(row))


def _missing(plan: SweepPlan, store: Store) -> bool:
    """Whether planned trials have no row (one that died for good has had its attempts)."""
    return plan.left(recover.rows_of(store, plan.sweep_id)) > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """What is left to run: a searcher for Ray Tune, and how many trials it has."""

    searcher: StudySearch | LaneSearch
    samples: int


def _work(
    plan: SweepPlan, journal: Journal, run: _Run, session: str, known: Sequence[TrialRecord], final: set[str]
) -> _Work | None:
    common = {
        "sweep_id": plan.sweep_id,
        "out": run.out,
        "parallel": run.resources.parallel,
        "session": session,
        "anchor": plan.anchor,
    }
    if not plan.is_adaptive:
        codes = {t.trial_id: code_of(t) for t in plan.trials if t.compile or (run.resources.gpus and t.compile is None)}
        waiting = [card for card in cards(plan.trials, codes) if card.trial_id not in final]
        entries = {trial.trial_id: {**common, "trial": _entry(trial, run.resources)} for trial in plan.trials}
        return _Work(searcher=LaneSearch(entries, waiting, MOST_SHAPES), samples=len(waiting)) if waiting else None
    unfinished = {c["trial_id"]: TrialConfig.parse(c["config"]) for c in journal.claims() if c["trial_id"] not in final}
    count = plan.left(final)
    if not count:
        return None
    ended = sorted((row for row in known if row.trial_id in final), key=lambda row: row.started_at)
    study = study_of(plan, ended)
    study.threads = None if run.resources.gpus else int(run.resources.cpus)
    searcher = StudySearch(
        study,
        common,
        samples=plan.samples or 0,
        count=count,
        seeds=plan.seeds,
        ended=[TrialConfig.parse(json.loads(row.config_json)) for row in ended],
        unfinished=unfinished.values(),
    )
    return _Work(searcher=searcher, samples=count)


def preflight(trials: Sequence[TrialConfig]) -> None:
    """Load what the trials need once, so that bad input ends before anything is written (and caches are warm)."""
    watts_per_core()  # a word in its place would end every trial
    checked: set[tuple[Any, ...]] = set()
    for config in trials:
        key = (config.data, config.tokenizer, config.base, config.seq_len, config.n_embd, config.n_layer)
        if key not in checked:
            checked.add(key)
            corpus = load_corpus(config)
            if config.base != "random":
                dense_model(config, corpus)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[bool]:
    """A connection to Ray, closed again where it was made here; says whether it was."""
    made_here = _connect(address)
    try:
        yield made_here
    finally:
        if made_here:
            ray.shutdown()


def _connect(address: str) -> bool:
    for name in ("ray.tune.execution.tune_controller", "ray.tune.analysis.experiment_analysis", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # rows say what failed, and how to go on
    os.environ.update({key: os.environ.get(key, value) for key, value in _QUIET.items()})
    if ray.is_initialized():
        return False
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, **own, **options)
    except Exception as error:  # Ray raises plain Exception where its processes do not start in time
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"address: expected Ray at {address!r}, got {reason}") from None
    return True


def check_storage(out: str, tracking_uri: str | None) -> None:
    """Raises ConfigError where MLflow has no place: beside results on an object store there is none."""
    remote = "://" in out and not out.startswith("file://")
    if remote and not (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise ConfigError(f"tracking-uri: expected the address of an MLflow server where OUT is {out}, got none")


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


def _tuner(plan: SweepPlan, run: _Run, work: _Work, store: Store, follower: SweepCallback) -> Any:
    return tune.Tuner(
        tune.with_resources(run.actor, {"cpu": run.resources.cpus, "gpu": run.resources.gpus}),
        tune_config=tune.TuneConfig(
            max_concurrent_trials=run.resources.parallel,
            num_samples=work.samples,
            reuse_actors=True,
            search_alg=work.searcher,
            scheduler=_scheduler(plan, store),
            trial_dirname_creator=lambda trial: trial.config["trial"]["trial_id"],
            trial_name_creator=lambda trial: trial.config["trial"]["trial_id"],
        ),
        run_config=tune.RunConfig(
            name=plan.sweep_id,
            # Tune's own state is never read: the tables and the journal say what is left to do.
            storage_path=tempfile.mkdtemp(prefix="joulemoe-tune-"),
            verbose=0,
            stop=follower.budget,
            callbacks=[follower],
            failure_config=tune.FailureConfig(max_failures=run.retries),
        ),
    )


def _scheduler(plan: SweepPlan, store: Store) -> Any:
    if plan.scheduler != "pareto-asha":
        return None
    columns = ["trial_id", "epoch", "attempt", "eval_loss_nats", "train_energy_j"]
    epochs = store.read(EpochRecord, plan.sweep_id, columns=columns).to_pylist()
    rows = store.read(TrialRecord, plan.sweep_id, columns=["trial_id", "config_json"]).to_pylist()
    return ParetoASHA(rungs_of(epochs, {row["trial_id"]: row["config_json"] for row in rows}))


def _entry(config: TrialConfig, resources: Resources) -> dict[str, Any]:
    """A trial as an actor takes it; on a CPU it gets its share of the cores."""
    threads = config.threads or (None if resources.gpus else int(resources.cpus))
    return {"trial_id": config.trial_id, **config.model_copy(update={"threads": threads}).model_dump(mode="json")}


__all__ = ["Hardware", "Resources", "SweepResult", "TrialActor", "quiet_libraries", "run_sweep", "stored_plan"]
