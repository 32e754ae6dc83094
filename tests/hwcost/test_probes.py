"""Calibration workloads on the CPU: every kind builds, runs, parks and comes back; the anchor never changes."""

from __future__ import annotations

import contextlib
import dataclasses
import types

import pytest
import torch

from hwcost.anchor import AnchorStep, measure_anchor
from hwcost.points import COUNTS
from hwcost.probes import BUILDERS, adamw_spec, attention_spec, idle_spec, kernel_specs, repeat_for

CPU = torch.device("cpu")
SMALL = [*kernel_specs(small=True), attention_spec(1, 8, train=True), attention_spec(1, 8, train=False)]
SMALL += [adamw_spec(1000), idle_spec("idle", 0.01)]


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_every_kind_runs_parks_and_comes_back(spec):
    workload = BUILDERS[spec.kind](spec.params, CPU)
    for _ in range(2):
        workload.unpark()
        assert workload.configure(spec.params) == {}
        assert workload.run() >= 1
        workload.park()


def test_every_kind_is_counted():
    specs = [*kernel_specs(), *SMALL]
    assert {spec.kind for spec in specs} == set(BUILDERS)
    for spec in specs:
        total = COUNTS[spec.kind](spec.params, {}).vector().sum()
        assert (total > 0) == (spec.kind != "idle")
    assert len({spec.name for spec in kernel_specs()}) == len(kernel_specs())


def test_gemm_counts_are_those_of_the_multiplication():
    counts = COUNTS["gemm"]({"m": 10, "k": 20, "n": 30}, {})
    assert counts.gemm_flops == 2 * 10 * 20 * 30
    assert counts.weight_bytes == 2 * 20 * 30
    assert counts.activation_bytes == 2 * (10 * 20 + 10 * 30)


def test_repeating_counts_calls_until_the_time_is_up(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("hwcost.probes.time.monotonic", lambda: next(clock))
    calls, seconds = repeat_for(lambda: 3, 4.5, CPU)
    assert (calls, seconds) == (15, 6)
    assert repeat_for(lambda: 1, 0.0, CPU)[0] == 1


@dataclasses.dataclass
class FakeMonitor:
    energy_j: float | None

    @contextlib.contextmanager
    def window(self, name):
        more = {"anchor": 0.0, "anchor_whole": 3.0}[name]
        got = types.SimpleNamespace(
            energy_j=None if self.energy_j is None else self.energy_j + more,
            uncertainty_j=0.6,
            mean_power_w=600.0,
            mean_temperature_c=None,
            shared=False,
            flags=("throttled:power_cap",),
        )
        yield types.SimpleNamespace(measurement=got)


def test_the_anchor_is_measured_per_step_and_per_token():
    reading = measure_anchor(FakeMonitor(12.0), CPU, seconds=0.01, warmup_s=0.0)
    assert reading.j_per_step == pytest.approx(12.0 / reading.steps)
    assert reading.j_per_token == pytest.approx(reading.j_per_step / AnchorStep({}, CPU).tokens)
    assert reading.j_per_token_uncertainty == pytest.approx(reading.j_per_token / 20)
    assert (reading.energy_j, reading.flags) == (15.0, ("throttled:power_cap",))  # build and warm-up are paid too
    assert reading.workload == f"anchor {reading.version}, torch {torch.__version__.partition('+')[0]}, cpu"
    unknown = measure_anchor(FakeMonitor(None), CPU, seconds=0.01, warmup_s=0.0)
    assert unknown.j_per_step is unknown.j_per_token is unknown.energy_j is unknown.mean_temperature_c is None


def test_the_anchor_is_the_same_every_time_and_leaves_the_random_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = AnchorStep({}, CPU), AnchorStep({}, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.x_BSD, second.x_BSD)
    assert torch.equal(first.block.qkv.weight, second.block.qkv.weight)
