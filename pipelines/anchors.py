"""Measuring the anchor workload on the boards of a sweep: as each board's first trial begins, and when all have ended.

The first reading is taken by the actor that will train there, in its warm process, before it claims a trial. The last
readings are taken by the driver's own actors once no trial is left. Their joules pass through the same heartbeats as
those of trials, so that the sweep's budget counts them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hwcost import EnergyMonitor
from hwcost.anchor import AnchorReading, measure_anchor
from hwcost.devices import assigned
from hwcost.nvml import Nvml
from pipelines.boards import END, START
from pipelines.heartbeat import keeper_of
from pipelines.journal import Journal
from pipelines.ledger import trial_monitor
from pipelines.provenance import device_columns
from pipelines.records import AnchorRecord, Store
from pipelines.trial_rows import one_line

Measure = Callable[[EnergyMonitor], AnchorReading]
MEASURED_SOURCES = ("counter", "integrated")
#: Seconds that boards have to answer at the end, and then to measure.
_ANSWER_S, _MEASURE_S = 60.0, 180.0


def measure(monitor: EnergyMonitor) -> AnchorReading:
    """The anchor on this process's first GPU; memory and compiled code are given back.

    Raises:
        RuntimeError: torch has no GPU here.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("torch has no GPU here")
    try:
        return measure_anchor(monitor, torch.device("cuda", 0))
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def at_start(
    store: Store, monitor: EnergyMonitor, config: Mapping[str, Any], *, measure: Measure = measure
) -> AnchorRecord:
    """The reading of this board as its session began: taken now where this is the board's first trial of the session.

    Args:
        config: of the actor: `sweep_id`, `session`, and `anchor` (False: it was turned off).
    """
    board = _board(monitor)
    rows = store.read(AnchorRecord, config["sweep_id"], trial_ids=[board]).to_pylist()
    known = [row for row in rows if row["session"] == config["session"] and row["position"] == START]
    if known:
        return AnchorRecord(**known[0])
    return _take(store, monitor, {**config, "position": START, "attempt": len(rows)}, measure)


def _take(store: Store, monitor: EnergyMonitor, key: Mapping[str, Any], measure: Measure) -> AnchorRecord:
    """Measure, or say why not, and write the row. A failure never stops a sweep."""
    started_at = dt.datetime.now(dt.UTC)
    reading, skipped = None, _reason(monitor, wanted=key["anchor"])
    if skipped is None:
        try:
            reading = measure(monitor)
        except Exception as error:
            skipped = f"failed: {one_line(error)}"
    device = device_columns(monitor, None)
    record = AnchorRecord(
        sweep_id=key["sweep_id"],
        trial_id=_board(monitor),
        attempt=key["attempt"],
        session=key["session"],
        position=key["position"],
        skipped=skipped,
        host=platform.node(),
        started_at=started_at,
        **{name: device[name] for name in ("gpu_uuid", "gpu_name", "power_limit_w")},
        **({} if reading is None else {"energy_source": monitor.source, **_columns(reading)}),
    )
    store.write(AnchorRecord, [record], sweep_id=record.sweep_id, trial_id=record.trial_id, attempt=record.attempt)
    return record


def _columns(reading: AnchorReading) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(AnchorRecord)}
    values = {name: value for name, value in dataclasses.asdict(reading).items() if name in names}
    return values | {"flags": list(reading.flags)}


def _reason(monitor: EnergyMonitor, *, wanted: bool) -> str | None:
    """Why the anchor is not measured here; None where it is."""
    if not wanted:
        return "turned off"
    if monitor.source is None:
        return "no joules can be read here"
    if monitor.source not in MEASURED_SOURCES:
        return f"the joules are {monitor.source}: a board's drift cannot show in them"
    return None


def _board(monitor: EnergyMonitor) -> str:
    return next((device.uuid for device in monitor.devices if device.uuid), None) or platform.node()


# -- the end of a sweep ---------------------------------------------------------------------------------------------


class AnchorActor:
    """Holds one GPU: says which it is, and measures the anchor on it if asked to."""

    measure = staticmethod(measure)

    def __init__(self, out: str, key: Mapping[str, Any]) -> None:
        self.out, self.key = out, key

    def board(self) -> str | None:
        """UUID of the GPU that Ray gave this actor, found without touching it."""
        with contextlib.suppress(Exception):
            return next(iter(assigned(Nvml()).uuids), None)
        return None

    def take(self, attempt: int) -> float | None:
        """Measure and write the row. Returns the joules it took."""
        journal = Journal(self.out, self.key["sweep_id"])
        with trial_monitor() as monitor:
            name = f"{platform.node()}-{os.getpid()}-anchor-{uuid.uuid4().hex[:8]}"
            keeper = keeper_of(monitor, lambda: journal.beats.place(name), self.key["session"])
            try:
                record = _take(Store(self.out), monitor, {**self.key, "attempt": attempt}, self.measure)
            finally:
                if keeper is not None:
                    keeper.close()
        return record.energy_j


def at_end(out: str, sweep_id: str, session: str, *, actor: type[AnchorActor] = AnchorActor) -> None:
    """Measure the anchor once more on every board that was measured as this session began.

    Boards that do not answer within a minute (another job took them) are left without an end reading.
    """
    rows = Store(out).read(AnchorRecord, sweep_id).to_pylist()
    begun = {row["gpu_uuid"]: row for row in rows if row["session"] == session and row["skipped"] is None}
    if not begun:
        return
    key = {"sweep_id": sweep_id, "session": session, "anchor": True, "position": END}
    actors = _actors(actor, out, key, {row["host"] for row in begun.values()})
    try:
        held = _hold(actors, set(begun))
        count = {board: sum(row["gpu_uuid"] == board for row in rows) for board in held}
        tasks = [held[board].take.remote(count[board]) for board in held]
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get(tasks, timeout=_MEASURE_S)
    finally:
        for each in actors:
            ray.kill(each)


def _actors(actor: type[AnchorActor], out: str, key: Mapping[str, Any], hosts: set[str]) -> list[Any]:
    """An actor for every GPU of these hosts: Ray does not let one choose the GPU."""
    found = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerHostname"] in hosts:
            where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            maker = ray.remote(actor).options(num_gpus=1, num_cpus=0, scheduling_strategy=where)
            found += [maker.remote(out, key) for _ in range(int(node["Resources"].get("GPU", 0)))]
    return found


def _hold(actors: Sequence[Any], wanted: set[str]) -> dict[str, Any]:
    """Actors by the board they hold, as far as it is wanted; the others let their board go."""
    asked = {each.board.remote(): each for each in actors}
    held: dict[str, Any] = {}
    waiting, end_s = list(asked), time.monotonic() + _ANSWER_S
    while waiting and set(held) != wanted and time.monotonic() < end_s:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, end_s - time.monotonic()))
        for ref in ready:
            board = None
            with contextlib.suppress(ray.exceptions.RayError):
                board = ray.get(ref)
            if board in wanted and board not in held:
                held[board] = asked[ref]
            else:
                ray.kill(asked[ref])
    for ref in waiting:
        ray.kill(asked[ref])
    return held


class Reserve:
    """Joules that the readings at the end will take: as many as those at the start of this session took."""

    def __init__(self, store: Store, sweep_id: str, session: str) -> None:
        self.store, self.sweep_id, self.session = store, sweep_id, session
        self._files: list[str] | None = None
        self._joules = 0.0

    def read_j(self) -> float:
        """Read again only where a reading came in."""
        files = self.store.files(AnchorRecord, self.sweep_id)
        if files != self._files:
            rows = self.store.read(AnchorRecord, self.sweep_id, columns=["session", "position", "energy_j"]).to_pylist()
            mine = [row for row in rows if row["session"] == self.session]
            self._joules = sum((row["energy_j"] or 0.0) * (1 if row["position"] == START else -1) for row in mine)
            self._files = files
        return max(0.0, self._joules)


__all__ = ["AnchorActor", "Reserve", "at_end", "at_start", "measure"]
