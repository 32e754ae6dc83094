"""Heartbeats kept on an object store: shipped in parts, read back as one, and complete after their actor's death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipelines import heartbeat
from pipelines.beats import Beats, Meter
from pipelines.journal import Journal
from pipelines.shipping import PART_BYTES, Place, Shipper
from tests.pipelines.object_store import ObjectStore

NAME = "node.one-17-4711"


@pytest.fixture
def beats(objects: ObjectStore) -> Beats:
    """The heartbeats of a sweep on S3."""
    return Journal(objects.uri("beats"), uuid.uuid4().hex).beats


def wait(condition: Any, seconds: float = 30.0) -> None:
    """Until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_parts_are_read_as_one_file(beats: Beats) -> None:
    place = beats.place(NAME)
    shipper = Shipper(place, retry_s=0.05)
    rows = [{"t": float(n), "j": 2.0 * n} for n in range(16_000)]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    assert len(data) > 3 * PART_BYTES
    for start in range(0, len(data), 80_011):  # not whole lines, and not whole parts
        with open(place.path, "ab") as file:
            file.write(data[start : start + 80_011])
        shipper.wake()
        written = min(len(data), start + 80_011)
        wait(lambda: beats.sizes() == {NAME: written})  # noqa: B023
    for start in (0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES, len(data) - 1, len(data)):
        assert beats.read(NAME, start) == data[start:]
    assert beats.lines(NAME) == rows
    assert beats.read("node.one-17-471") == b""  # another name that this one begins with
    assert shipper.end(30)
    assert not os.path.exists(place.path)


def test_what_is_appended_during_a_put_is_not_lost(beats: Beats, objects: ObjectStore) -> None:
    place = beats.place(NAME)
    Path(place.path).write_bytes(b"1\n")
    more = [b"2" * PART_BYTES + b"\n", b"3\n"]

    def append() -> None:
        if more:
            with open(place.path, "ab") as file:
                file.write(more.pop(0))

    objects.on_put = append
    try:
        shipper = Shipper(place, retry_s=0.05)
        wait(lambda: shipper.wake() or not more)
        assert shipper.end(30)
    finally:
        objects.on_put = lambda: None
    assert beats.read(NAME) == b"1\n" + b"2" * PART_BYTES + b"\n3\n"


def test_a_meter_reads_on(beats: Beats) -> None:
    place, meter = beats.place(NAME), Meter(beats)
    assert meter.read_j() is None
    shipper = Shipper(place, retry_s=0.05)
    known = 0
    for text, joules in (('{"t": 0, "spec": "gpu:x", "session": "s"}\n{"t": 1, "j": 5.0}\n{"t": 2, "j', 0.0),
                         ('": 9.0}\n', 4.0)):  # fmt: skip
        with open(place.path, "a") as file:
            file.write(text)
        known += len(text)
        shipper.wake()
        wait(lambda: beats.sizes()[NAME] == known if beats.sizes() else False)  # noqa: B023
        assert meter.read_j() == joules
    shipper.end(30)


def test_a_last_line_is_waited_for_where_even_the_first_is_on_its_way(beats: Beats) -> None:
    """An actor was killed before its keeper had sent anything."""
    line = {"t": 0, "j": 1.0, "last": True}

    def send() -> None:
        place = beats.place(NAME)
        Path(place.path).write_text(json.dumps(line) + "\n")
        Shipper(place, retry_s=0.05).end(30)

    late = threading.Timer(1.0, send)
    late.start()
    beats.await_last([NAME])
    assert beats.lines(NAME) == [line]
    late.join()


def test_a_store_that_is_away_gets_everything_later(beats: Beats, objects: ObjectStore) -> None:
    place = beats.place(NAME)
    Path(place.path).write_text('{"t": 0, "j": 1.0}\n')
    objects.away = True
    try:
        shipper = Shipper(place, retry_s=0.05)
        shipper.wake()
        assert not shipper.end(1.0)
        assert os.path.exists(place.path)
    finally:
        objects.away = False
    assert shipper.end(60)
    assert beats.lines(NAME) == [{"t": 0, "j": 1.0}]
    assert not os.path.exists(place.path)


def test_the_keeper_of_a_killed_process_sends_its_last_line(beats: Beats) -> None:
    """A process burns CPU inside an attempt and is killed; the store learns of its last second."""
    place = beats.place(NAME)
    code = (
        "import os, sys; from pipelines.heartbeat import Keeper, reader_of\n"
        "from pipelines.shipping import Place\n"
        "k = Keeper(Place(*sys.argv[1:]), 'cpu:6.0', read=reader_of('cpu:6.0', os.getpid()), period_s=0.1)\n"
        "k.edge('a-0', 'begin'); print('on', flush=True)\n"
        "while True: sum(range(10000))"
    )
    assert place.out is not None
    words = [sys.executable, "-c", code, place.path, place.out, place.key]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()})
    wait(lambda: sum("j" in line for line in beats.lines(NAME)) >= 4)
    before_s = time.monotonic()
    assert beats.await_next(NAME)
    assert max(line["t"] for line in beats.lines(NAME)) > before_s  # the driver knows of all that was before it asked
    assert heartbeat.joules_of(beats.lines(NAME), "a-0", alive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: any(line.get("last") for line in beats.lines(NAME)))
    spent = heartbeat.joules_of(beats.lines(NAME), "a-0")
    assert spent is not None
    assert spent.total_j is not None
    assert spent.total_j > 0
    assert spent.flags == ("from_heartbeats",)
    wait(lambda: not os.path.exists(place.path))


def test_a_keeper_that_sends_nothing_is_not_waited_for_long(beats: Beats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.beats._LAST_ARRIVES_S", 0.3)
    assert not beats.await_next(NAME)
    beats.await_last([NAME])
    beats.settle()
    assert beats.lines(NAME) == []


def test_on_a_disk_the_file_itself_is_kept(tmp_path: Path) -> None:
    beats = Journal(str(tmp_path), "s").beats
    place = beats.place(NAME)
    assert place == Place(f"{tmp_path}/sweeps/s/beats/{NAME}.jsonl")
    Path(place.path).write_text('{"t": 2, "j": 3.0}\n{"t": 1, "j": 1.0}\n{"torn')
    assert [line["t"] for line in beats.lines(NAME)] == [1, 2]
    assert Meter(beats).read_j() == 2.0
    assert beats.await_next(NAME)
