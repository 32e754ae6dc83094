"""Calibration workloads: kernels whose counts are known exactly, run long enough to be measured.

A probe is described by a `ProbeSpec` (a value that can be sent to another process) and run as a
`Workload`. Tensors hold realistic numbers: zeros switch fewer transistors and draw less power.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from hwcost.points import ProbeSpec

_AHEAD = 4  # runs queued beyond the one that the device works on
_ROTATED_BYTES = 256 << 20  # small operands are rotated through this much memory: beyond any L2 cache


class Workload(Protocol):
    """Something that can be repeated on a device, and leave it in between."""

    def configure(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Take the spec's values that need no new code; returns what turned out (open experts)."""

    def run(self) -> int:
        """Queue work; returns how many calls of the spec that was."""

    def park(self) -> None:
        """Give the device's memory back."""

    def unpark(self) -> None:
        """Be ready to run again."""


Builder = Callable[[Mapping[str, Any], torch.device], Workload]


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeat_for(run: Callable[[], int], seconds: float, device: torch.device) -> tuple[int, float]:
    """Repeat `run` for about `seconds` and wait for the end; returns (calls, seconds taken).

    On a GPU the queue is kept a little ahead of the device, so that it neither idles nor runs far past the end.
    """
    start = time.monotonic()
    calls, pending = 0, collections.deque[Any]()
    while calls == 0 or time.monotonic() - start < seconds:
        calls += run()
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            pending.append(event)
            if len(pending) > _AHEAD:
                pending.popleft().synchronize()
    synchronize(device)
    return calls, time.monotonic() - start


class Kernels:
    """A workload of plain kernels: built when it is unparked, dropped when it is parked."""

    def __init__(self, build: Callable[[], Callable[[], int]]) -> None:
        self._build = build
        self._run: Callable[[], int] | None = None

    def configure(self, params: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def run(self) -> int:
        assert self._run is not None
        return self._run()

    def park(self) -> None:
        self._run = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def unpark(self) -> None:
        self._run = self._build()


def dtype_of(device: torch.device) -> torch.dtype:
    """What the model computes in: bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _counting(step: Callable[[], object], calls: int) -> Callable[[], int]:
    """`step`, saying how many calls it was."""

    def once() -> int:
        step()
        return calls

    return once


def graphed(step: Callable[[int], object], repeats: int, device: torch.device) -> Callable[[], int]:
    """`repeats` calls of `step(i)` as one CUDA graph, so that launches cost nothing; a plain loop on a CPU."""

    def loop() -> None:
        for i in range(repeats):
            step(i)

    if device.type != "cuda":
        return _counting(loop, repeats)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        loop()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return _counting(graph.replay, repeats)


def _gemm(params: Mapping[str, Any], device: torch.device) -> Workload:
    rows, inner, columns = int(params["m"]), int(params["k"]), int(params["n"])

    def build() -> Callable[[], int]:
        dtype = dtype_of(device)
        size = (rows * inner + inner * columns) * dtype.itemsize
        copies = max(1, min(64, _ROTATED_BYTES // size)) if device.type == "cuda" else 1
        a = [torch.randn(rows, inner, device=device, dtype=dtype) for _ in range(copies)]
        b = [torch.randn(inner, columns, device=device, dtype=dtype) * 0.02 for _ in range(copies)]
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        return graphed(lambda i: torch.mm(a[i % copies], b[i % copies], out=out), max(4, copies), device)

    return Kernels(build)


def _copy(params: Mapping[str, Any], device: torch.device) -> Workload:
    def build() -> Callable[[], int]:
        source = torch.randn(int(params["bytes"]) // 4, device=device)
        target = torch.empty_like(source)
        return graphed(lambda i: target.copy_(source), 8, device)

    return Kernels(build)


def _grouped(params: Mapping[str, Any], device: torch.device) -> Workload:
    """x [slots, D] by [E, D, W] and back, rows sorted by expert, all experts equally full."""
    slots, experts, width, d_model = (int(params[key]) for key in ("slots", "experts", "width", "d_model"))

    def build() -> Callable[[], int]:
        dtype = dtype_of(device)
        x = torch.randn(slots, d_model, device=device, dtype=dtype)
        up = torch.randn(experts, d_model, width, device=device, dtype=dtype) * 0.02
        down = torch.randn(experts, width, d_model, device=device, dtype=dtype) * 0.02
        if device.type != "cuda":
            each = x.view(experts, slots // experts, d_model)
            return _counting(lambda: torch.bmm(torch.bmm(each, up), down), 1)
        ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (slots // experts)
        return _counting(lambda: F.grouped_mm(F.grouped_mm(x, up, offs=ends), down, offs=ends), 1)

    return Kernels(build)


def _attention(params: Mapping[str, Any], device: torch.device) -> Workload:
    batch, length, heads = int(params["batch"]), int(params["seq_len"]), int(params["heads"])
    train = bool(params["train"])

    def build() -> Callable[[], int]:
        shape = (batch, heads, length, 64)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype_of(device), requires_grad=train) for _ in range(3))
        grad = torch.randn(shape, device=device, dtype=dtype_of(device))

        def once() -> int:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if train:
                torch.autograd.grad(y, (q, k, v), grad)
            return 1

        return once

    return Kernels(build)


def _launch(params: Mapping[str, Any], device: torch.device) -> Workload:
    """Kernels of one block each: launched one by one from the host, or as a graph."""

    def build() -> Callable[[], int]:
        x = torch.randn(int(params["elements"]), device=device)
        if params["graph"]:
            return graphed(lambda i: x.mul_(1.0), 200, device)

        def once() -> int:
            for _ in range(20):
                x.mul_(1.0)
            return 20

        return once

    return Kernels(build)


def _adamw(params: Mapping[str, Any], device: torch.device) -> Workload:
    def build() -> Callable[[], int]:
        weight = torch.nn.Parameter(torch.randn(int(params["parameters"]), device=device) * 0.02)
        weight.grad = torch.randn_like(weight) * 1e-3
        optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=device.type == "cuda")
        return _counting(optimizer.step, 1)

    return Kernels(build)


def _idle(params: Mapping[str, Any], device: torch.device) -> Workload:
    def once() -> int:
        synchronize(device)
        time.sleep(0.02)
        return 1

    return Kernels(lambda: once)


BUILDERS: dict[str, Builder] = {
    "gemm": _gemm,
    "copy": _copy,
    "grouped": _grouped,
    "attention": _attention,
    "launch": _launch,
    "adamw": _adamw,
    "idle": _idle,
}


def gemm_spec(m: int, k: int, n: int, *, window_s: float = 3.0, held_out: bool = False) -> ProbeSpec:
    """A bf16 GEMM [m, k] × [k, n]."""
    params = {"m": m, "k": k, "n": n}
    return ProbeSpec(name=f"gemm-{m}x{k}x{n}", kind="gemm", params=params, window_s=window_s, held_out=held_out)


def copy_spec(size: int, *, window_s: float = 3.0, held_out: bool = False) -> ProbeSpec:
    """A device copy of `size` bytes: as many read as written."""
    name = f"copy-{size >> 20}MiB"
    return ProbeSpec(name=name, kind="copy", params={"bytes": size}, window_s=window_s, held_out=held_out)


def grouped_spec(
    slots: int, experts: int, *, width: int = 3072, d_model: int = 768, held_out: bool = False
) -> ProbeSpec:
    """Two grouped GEMMs: every expert on its share of `slots` rows."""
    params = {"slots": slots, "experts": experts, "width": width, "d_model": d_model}
    return ProbeSpec(name=f"grouped-{slots}-{experts}x{width}", kind="grouped", params=params, held_out=held_out)


def attention_spec(batch: int, seq_len: int, *, train: bool, heads: int = 12, held_out: bool = False) -> ProbeSpec:
    """Causal attention alone, forward, or forward and backward."""
    params = {"batch": batch, "seq_len": seq_len, "heads": heads, "train": train}
    name = f"attention-{batch}x{seq_len}-{'train' if train else 'forward'}"
    return ProbeSpec(name=name, kind="attention", params=params, held_out=held_out)


def launch_spec(*, graph: bool) -> ProbeSpec:
    """Tiny kernels, from the host or as a graph."""
    name = "launch-graph" if graph else "launch-host"
    return ProbeSpec(name=name, kind="launch", params={"elements": 1024, "graph": graph})


def adamw_spec(parameters: int) -> ProbeSpec:
    """Fused AdamW over fp32 parameters."""
    return ProbeSpec(name=f"adamw-{parameters / 1e6:g}M", kind="adamw", params={"parameters": parameters})


def idle_spec(name: str, seconds: float) -> ProbeSpec:
    """Nothing at all, for a while; a call is 20 ms of it."""
    return ProbeSpec(name=name, kind="idle", params={}, window_s=seconds)


def kernel_specs(*, small: bool = False) -> list[ProbeSpec]:
    """The kernels of a calibration: GEMMs of the model's shapes, copies, grouped GEMMs, attention, launches, AdamW.

    `small`: a few tiny ones, for hosts without a GPU.
    """
    if small:
        return [
            gemm_spec(128, 64, 256),
            copy_spec(1 << 20),
            grouped_spec(128, 4, width=64, d_model=32),
            launch_spec(graph=False),
        ]
    return [
        gemm_spec(8192, 8192, 8192, window_s=10.0),
        gemm_spec(16384, 768, 3072, window_s=5.0),
        gemm_spec(16384, 3072, 768, held_out=True),
        gemm_spec(4096, 768, 2304),
        gemm_spec(8192, 768, 50304),
        gemm_spec(64, 768, 3072),
        copy_spec(2 << 30, window_s=5.0),
        copy_spec(256 << 20, held_out=True),
        grouped_spec(16384, 8),
        grouped_spec(4096, 16),
        attention_spec(16, 1024, train=True),
        attention_spec(16, 1024, train=False, held_out=True),
        launch_spec(graph=True),
        launch_spec(graph=False),
        adamw_spec(300_000_000),
    ]
