"""Rows for attempts that could not write their own: the process died, or somebody stopped it from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import platform
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import heartbeat
from pipelines.config import TrialConfig
from pipelines.journal import Journal, points_document, process_start
from pipelines.records import TABLES, EpochRecord, PointRecord, Store, TrialRecord
from pipelines.trial_rows import config_columns, perplexity, point_of

_ORPHANS_END_S = 15.0
_ROW_COMES_S = 15.0


def rows_of(store: Store, sweep_id: str, trial_ids: Sequence[str] | None = None) -> dict[str, TrialRecord]:
    """The last row of every trial."""
    found: dict[str, TrialRecord] = {}
    for values in store.read(TrialRecord, sweep_id, trial_ids=trial_ids).to_pylist():
        row = TrialRecord(**values)
        if row.trial_id not in found or found[row.trial_id].attempt < row.attempt:
            found[row.trial_id] = row
    return found


def row_before(store: Store, journal: Journal, trial_id: str) -> TrialRecord | None:
    """The row of a trial's last attempt. For one that died the driver writes it: wait for that a while."""
    last = journal.attempts(trial_id) - 1
    deadline = time.monotonic() + _ROW_COMES_S
    while last >= 0:
        row = rows_of(store, journal.sweep_id, [trial_id]).get(trial_id)
        if row is not None and row.attempt == last:
            return row
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return None


def spent_j(before: TrialRecord | None, attempts: int) -> float | None:
    """Joules of the attempts so far, from the row of the last one; None where they are not known."""
    if attempts == 0:
        return 0.0
    return None if before is None else before.total_energy_j


def write_missing(
    store: Store, journal: Journal, *, ended_by: str, trial_id: str | None = None, alive: bool = False
) -> list[TrialRecord]:
    """Give every claimed attempt without a row its row (of one trial, or of all); returns them.

    The points that an anytime attempt had reached get theirs too: each is a whole run of its number of epochs.

    Args:
        ended_by: died or timeout make FAILED rows; scheduler, budget and interrupt make STOPPED ones.
        alive: the attempts' actors still run.
    """
    have = {
        (row["trial_id"], row["attempt"])
        for row in store.read(TrialRecord, journal.sweep_id, columns=["trial_id", "attempt"]).to_pylist()
    }
    claims = journal.claims() if trial_id is None else journal.claims_of(trial_id)
    missing = [claim for claim in claims if (claim["trial_id"], claim["attempt"]) not in have]
    names = [claim["beats"] for claim in missing if claim["beats"]]
    late = {name for name in names if not journal.beats.await_next(name)} if alive else set()
    if not alive:
        journal.beats.await_last(names)
    written = []
    for claim in missing:
        row = row_of(store, journal, claim, ended_by=ended_by, alive=alive)
        if claim["beats"] in late:
            row = dataclasses.replace(row, energy_flags=[*(row.energy_flags or ()), "heartbeat_late"])
        where: dict[str, Any] = {"sweep_id": row.sweep_id, "trial_id": row.trial_id, "attempt": row.attempt}
        if points := [point_of(row, **values) for values in _reached(journal, claim).get("points", ())]:
            store.write(PointRecord, points, **where)
        store.write(TrialRecord, [row], **where)  # last: a trial's row says that the others are whole
        written.append(row)
    return written


def _reached(journal: Journal, claim: Mapping[str, Any]) -> dict[str, Any]:
    """The points that an anytime attempt put down, with the text that it read."""
    return journal.get(points_document(f"{claim['trial_id']}-{claim['attempt']}")) or {}


def row_of(store: Store, journal: Journal, claim: Mapping[str, Any], *, ended_by: str, alive: bool) -> TrialRecord:
    """The row of an attempt from what it left: its claim, its epochs, its points, its heartbeats."""
    trial_id, attempt = claim["trial_id"], claim["attempt"]
    lines = journal.beats.lines(claim["beats"]) if claim["beats"] else []
    spent = heartbeat.joules_of(lines, f"{trial_id}-{attempt}", alive=alive)
    failed = ended_by in ("died", "timeout")
    return TrialRecord(
        sweep_id=journal.sweep_id,
        trial_id=trial_id,
        attempt=attempt,
        state="FAILED" if failed else "STOPPED",
        censored=not failed,
        error=_REASONS.get(ended_by),
        corpus_fingerprint=_reached(journal, claim).get("corpus"),
        ended_by=ended_by,
        started_at=dt.datetime.fromisoformat(claim["started_at"]),
        **config_columns(TrialConfig.parse(claim["config"])),
        **claim["host_columns"],
        **claim["device_columns"],
        **_outcome(store, journal.sweep_id, trial_id, attempt),
        **energy_columns(spent, claim["spent_j"], claim["source"]),
    )


def empty_claim(config: TrialConfig) -> dict[str, Any]:
    """The claim of an attempt whose process never came up."""
    return {
        "config": config.model_dump(mode="json"),
        "node": "",
        "pid": 0,
        "start": None,
        "beats": None,
        "spent_j": 0.0,
        "source": None,
        "started_at": dt.datetime.now(dt.UTC).isoformat(),
        "host_columns": {},
        "device_columns": {},
    }


_REASONS = {"died": "the trial's process died", "timeout": "the trial gave no sign of life and was ended"}


def energy_columns(spent: heartbeat.Spent | None, before_j: float | None, source: str | None) -> dict[str, Any]:
    """Energy of an attempt that was ended from outside; all that came before it stands under `lost_energy_j`."""
    if spent is None or spent.total_j is None:
        flags = ["heartbeat_lost"] if spent is None else list(spent.flags)
        return {"energy_source": source, "energy_flags": flags, "duration_s": spent.duration_s if spent else None}
    phases = spent.phases_j
    known = before_j is not None
    return {
        "energy_source": source,
        **{f"{name}_energy_j": phases.get(name) for name in ("setup", "train", "eval")},
        "branches_energy_j": phases.get("branch"),
        "idle_energy_j": spent.total_j - sum(phases.values()),
        "lost_energy_j": before_j,
        "total_energy_j": before_j + spent.total_j if before_j is not None else None,
        "energy_flags": [*spent.flags, *([] if known else ["earlier_attempt_unknown"])],
        "duration_s": spent.duration_s,
    }


def _outcome(store: Store, sweep_id: str, trial_id: str, attempt: int) -> dict[str, Any]:
    rows = [r for r in store.read(EpochRecord, sweep_id, trial_ids=[trial_id]).to_pylist() if r["attempt"] == attempt]
    if not rows:
        return {}
    last = max(rows, key=lambda row: row["epoch"])
    loss = last["eval_loss_nats"]
    names = ("routing_diversity", "effective_experts", "load_cv", "logit_std", "eval_bits_per_byte", "tokens_trained")
    return {
        "eval_loss_nats": loss,
        "eval_perplexity": None if loss is None else perplexity(loss),
        **{name: last[name] for name in names},
    }


def end_orphans(journal: Journal, have: set[tuple[str, int]], *, patience_s: float = _ORPHANS_END_S) -> None:
    """Wait for actors of a driver that is gone (they end with it), and end those on this host that do not."""
    deadline = time.monotonic() + patience_s
    mine = [c for c in journal.claims() if (c["trial_id"], c["attempt"]) not in have and c["node"] == platform.node()]
    while alive := [c for c in mine if c["start"] and process_start(c["pid"]) == c["start"]]:
        late_s = time.monotonic() - deadline
        for claim in alive if late_s > 0 else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(claim["pid"], signal.SIGKILL)
        if late_s > _ORPHANS_END_S:  # not even SIGKILL ends a process that hangs in the kernel
            return
        time.sleep(0.2)


def remove_leftovers(store: Store, journal: Journal) -> None:
    """Delete what killed writes left under temporary names. No actor may be at work."""
    if store.local:
        for folder in (journal.root, *(f"{store.root}/{table}/sweep_id={journal.sweep_id}" for table in TABLES)):
            for path in Path(folder).rglob("*.tmp"):
                path.unlink(missing_ok=True)
