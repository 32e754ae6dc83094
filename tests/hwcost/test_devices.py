"""Which devices a process was given: from the environment, from Ray, from CUDA."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwcost.devices import assigned, gpu_host, parse_visible_devices
from hwcost.nvml import Nvml
from tests.hwcost.conftest import Bench

BOARDS = ("GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3", "GPU-dddd-4")
MIGS = ("MIG-1111", "MIG-2222")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, BOARDS),
        ("", ()),
        (" ", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0", BOARDS[:1]),
        ("2,0", (BOARDS[2], BOARDS[0])),
        (" 1 , 3 ", (BOARDS[1], BOARDS[3])),
        ("1,1,0,1", (BOARDS[1], BOARDS[0])),
        ("0,-1,1", BOARDS[:1]),  # CUDA stops at the first entry that names nothing
        ("0,9,1", BOARDS[:1]),
        ("GPU-cccc-3", (BOARDS[2],)),
        ("GPU-cc,GPU-dddd", BOARDS[2:]),
        ("GPU-aa", ()),  # two boards begin so
        ("GPU-zzzz", ()),
        ("GPU-dddd-4,0", (BOARDS[3], BOARDS[0])),
        ("MIG-2222", ("MIG-2222",)),
        ("MIG-1111,GPU-cccc-3", ("MIG-1111", BOARDS[2])),
    ],
)
def test_cuda_visible_devices(text: str | None, expected: tuple[str, ...]) -> None:
    assert parse_visible_devices(text, BOARDS, MIGS) == expected


@given(st.text(alphabet="0123456789-, GPUMIGabcd", max_size=20))
def test_any_text_names_known_devices_once(text: str) -> None:
    found = parse_visible_devices(text, BOARDS, MIGS)
    assert len(set(found)) == len(found)
    assert set(found) <= {*BOARDS, *MIGS}


@pytest.mark.parametrize(
    ("text", "nodes", "expected"),
    [
        (None, ["/dev/nvidia0"], True),
        ("", ["/dev/nvidia0"], False),
        ("-1", ["/dev/nvidia0"], False),
        ("1", ["/dev/nvidia0"], True),
        (None, [], False),
    ],
)
def test_gpu_host(monkeypatch: pytest.MonkeyPatch, text: str | None, nodes: list[str], expected: bool) -> None:
    monkeypatch.setattr("glob.glob", lambda _: nodes)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert gpu_host() is expected


def test_no_gpu_assigned_while_nvml_sees_eight_measures_none(bench: Bench) -> None:
    for _ in range(8):
        bench.board()
    monitor = bench.monitor("")
    assert [device.kind for device in monitor.devices] == ["cpu"]
    bench.install("")
    assert assigned(Nvml()).uuids == ()


def test_a_reordered_list_is_measured_in_its_order(bench: Bench) -> None:
    for _ in range(3):
        bench.board()
    assert [device.uuid for device in bench.monitor("2, 0,2").devices] == ["GPU-0002", "GPU-0000"]


def test_the_order_of_unlike_boards_is_an_assumption(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.board(name="NVIDIA H200")
    bench.board(name="NVIDIA L4")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert "device_order_assumed" in bench.monitor("1").flags
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert "device_order_assumed" not in bench.monitor("1").flags


def fake_ray(ids: list[Any], share: float, *, worker: bool = True) -> types.ModuleType:
    ray: Any = types.ModuleType("ray")
    ray.WORKER_MODE, ray.is_initialized = 1, lambda: True
    context = types.SimpleNamespace(
        worker=types.SimpleNamespace(mode=1 if worker else 0),
        get_accelerator_ids=lambda: {"GPU": ids},
        get_assigned_resources=lambda: {"GPU": share} if share else {},
    )
    ray.get_runtime_context = lambda: context
    return ray


@pytest.mark.parametrize(
    ("ids", "share", "worker", "expected", "shared"),
    [
        (["1"], 1.0, True, ["GPU-0001"], None),
        ([0], 0.5, True, ["GPU-0000"], True),
        ([], 0.0, True, ["cpu"], None),  # an actor without a GPU inherits CUDA_VISIBLE_DEVICES
        (["GPU-0001"], 1.0, True, ["GPU-0001"], None),
        ([], 0.0, False, ["GPU-0000", "GPU-0001"], None),  # the driver is not an actor
    ],
)
def test_rays_word_counts_first(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    ids: list[Any],
    share: float,
    worker: bool,
    expected: list[str],
    shared: bool | None,
) -> None:
    bench.board()
    bench.board()
    monkeypatch.setitem(sys.modules, "ray", fake_ray(ids, share, worker=worker))
    monitor = bench.monitor("0,1")
    assert [device.device_id for device in monitor.devices] == expected
    result = bench.measure(monitor, 2.0)[0].measurement
    assert ("gpu_fraction" in result.flags) is bool(shared)
    assert result.shared is True if shared else not result.shared


def test_a_ray_that_breaks_is_not_asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.board()
    ray = fake_ray([], 0.0)
    ray.get_runtime_context = lambda: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert [device.uuid for device in bench.monitor("0").devices] == ["GPU-0000"]


def test_cuda_itself_knows_best(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.board()
    bench.board()
    torch: Any = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda index: None,
        get_device_properties=lambda i: types.SimpleNamespace(uuid="0001"),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monitor = bench.monitor("0")
    assert [device.uuid for device in monitor.devices] == ["GPU-0001"]
    assert bench.measure(monitor, 2.0)[0].measurement.flags == ()


def test_one_torch_device_of_several(bench: Bench) -> None:
    from hwcost.devices import find_readers

    bench.board()
    bench.board()
    bench.install("1,0")
    assert [r.info.uuid for r in find_readers(torch_device="cuda:1").readers] == ["GPU-0000"]
    assert [r.info.uuid for r in find_readers(torch_device="cuda").readers] == ["GPU-0001"]
    assert [r.info.kind for r in find_readers(torch_device="cpu").readers] == ["cpu"]
    found = find_readers(torch_device="cuda:5")
    assert (found.readers, found.flags) == ((), ("no_device",))
    assert find_readers(torch_device="cpu", allow_cpu=False).flags == ("no_device",)
