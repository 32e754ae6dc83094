"""Profiles: what a file must hold, and which profile a device gets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hwcost import profiles
from hwcost.cost_model import CostModel
from hwcost.fit import fit_profile
from hwcost.judge import judge
from hwcost.points import Calibration
from hwcost.profiles import analytic_profile, load_profile, parse_profile, select_profile, shipped_profiles

POINTS = Path(__file__).parents[2] / "benchmarks" / "points"


def calibrated(limit_w=700.0):
    return dataclasses.replace(
        analytic_profile("NVIDIA H200", limit_w),
        name="h200",
        analytic=False,
        intervals={"energy.gemm_flops": (0.7e-12, 0.9e-12)},
        ranges={"train": {"batch_size": (4.0, 32.0)}},
        errors={"train_time_measured": 0.02},
        provenance={"driver_version": "580", "board": "abc", "date": "2026-11-23"},
    )


def test_a_profile_survives_its_file(tmp_path):
    path = tmp_path / "h200.json"
    path.write_text(calibrated().to_json())
    assert load_profile(path) == calibrated()
    assert CostModel.load(path).profile.name == "h200"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "expected version 1"),
        ({"colour": "green"}, "unknown key 'colour'"),
        ({"energy": {"gemm_flops": 1.0}}, "expected the counters"),
        ({"thermal": {"inlet_c": 3}}, "not a profile"),
    ],
)
def test_other_files_are_refused_by_name(change, message):
    text = json.dumps({**json.loads(calibrated().to_json()), **change})
    with pytest.raises(ValueError, match=rf"some\.json: .*{message}"):
        parse_profile(text, source="some.json")
    with pytest.raises(ValueError, match=r"some\.json: expected a JSON profile"):
        parse_profile("not json", source="some.json")


def test_negative_coefficients_are_refused():
    energy = {**calibrated().energy, "gemm_flops": -1.0}
    with pytest.raises(ValueError, match="gemm_flops"):
        dataclasses.replace(calibrated(), energy=energy)


@pytest.mark.parametrize(
    ("name", "limit_w", "picked"),
    [
        ("NVIDIA H200", 700.0, "h200"),
        ("H200", 690.0, "h200"),
        ("NVIDIA H200", None, "h200"),
        ("NVIDIA H200", 500.0, "analytic"),
        ("NVIDIA H200 NVL", 600.0, "analytic"),
        ("NVIDIA A100-SXM4-80GB", 400.0, "analytic"),
        (None, None, "analytic"),
    ],
)
def test_the_profile_is_picked_by_name_and_power_limit(monkeypatch, name, limit_w, picked):
    monkeypatch.setattr(profiles, "shipped_profiles", lambda: iter([calibrated()]))
    found = select_profile(name, limit_w)
    assert found.name == picked
    assert found.analytic == (picked == "analytic")


def test_every_shipped_profile_can_be_read_and_was_measured():
    for profile in shipped_profiles():
        assert not profile.analytic
        assert profile.errors
        assert {"driver_version", "board", "date"} <= set(profile.provenance)
        assert select_profile(profile.gpu_name, profile.power_limit_w) == profile


@pytest.mark.parametrize("profile", list(shipped_profiles()), ids=lambda profile: profile.name)
def test_every_shipped_profile_is_the_fit_of_the_points_beside_the_benchmarks(profile):
    measured = Calibration.read(POINTS / f"{profile.name}.json")
    fitted = fit_profile(measured, name=profile.name, bootstraps=0)
    assert fitted.gpu_name == profile.gpu_name
    for table in ("energy", "seconds"):
        assert getattr(fitted, table) == pytest.approx(dict(getattr(profile, table)), rel=1e-4, abs=1e-18)
    assert dataclasses.asdict(fitted.thermal) == pytest.approx(dataclasses.asdict(profile.thermal), rel=1e-4)
    assert (fitted.ranges, fitted.kinds) == (profile.ranges, profile.kinds)
    errors = judge(CostModel(fitted), measured)
    assert errors == pytest.approx({name: profile.errors[name] for name in errors}, rel=1e-4)
