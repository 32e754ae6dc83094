"""The bounded power trace."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hwcost import GpuSystemMonitor, PowerSample


@given(count=st.integers(1, 500), bound=st.integers(2, 40))
def test_history_is_bounded_and_covers_the_whole_span(count: int, bound: int) -> None:
    system = GpuSystemMonitor(max_samples=bound)
    for i in range(count):
        system.add(PowerSample(time_s=float(i), device_id="GPU-0", power_w=float(i)))
    times = [sample.time_s for sample in system.history]
    assert len(times) < bound or len(times) <= 2
    assert times[0] == 0.0
    steps = {b - a for a, b in itertools.pairwise(times)}
    assert len(steps) <= 1
    assert count - times[-1] <= 2 * max(steps, default=count)


def test_devices_are_bounded_apart_and_merged_by_time() -> None:
    system = GpuSystemMonitor(max_samples=10)
    for i in range(6):
        system.add(PowerSample(time_s=float(i), device_id="a"))
        system.add(PowerSample(time_s=i + 0.5, device_id="b"))
    assert [sample.device_id for sample in system.history] == ["a", "b"] * 6
    system.clear()
    assert system.history == ()


def test_samples_go_to_a_file_as_they_come(tmp_path: Path) -> None:
    system = GpuSystemMonitor(path=tmp_path / "history.jsonl")
    system.add(PowerSample(time_s=1.0, device_id="a", power_w=300.0))
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["sample"]["power_w"] == 300.0
    system.close()
    system.add(PowerSample(time_s=2.0, device_id="a"))
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1
    assert system.flags == {}
