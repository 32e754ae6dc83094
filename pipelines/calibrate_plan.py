"""What a calibration measures: kernels, training steps, prefill and decode steps, a ramp, the anchor twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hwcost.ops import ModelShape
from hwcost.points import ProbeSpec, step_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a calibration measures, and how long it may take.

    Attributes:
        specs: measured in random order within a tier. last: measured at the end, whatever the time.
        idle_s: of each of the two idle windows. cool_s: pause before the warm-up ramp and before the last specs.
        prepare_s: longest wait for compilation; what is not ready by then is left out.
    """

    specs: tuple[ProbeSpec, ...]
    first: tuple[ProbeSpec, ...]
    last: tuple[ProbeSpec, ...]
    idle_s: float = 4.0
    cool_s: float = 9.0
    warmup_s: float = 0.7
    prepare_s: float = 165.0
    budget_s: float = 510.0
    seed: int = 0

    @property
    def all_specs(self) -> tuple[ProbeSpec, ...]:
        return (*self.first, *self.specs, *self.last)


def full_plan(budget_s: float = 510.0) -> Plan:
    """The plan for one GPU of the H200's class: kernels, training steps, decode steps, a ramp, the anchor twice."""
    from hwcost.probes import gemm_spec, kernel_specs

    ramp = dataclasses.replace(gemm_spec(8192, 8192, 8192, window_s=20.0), name="ramp")
    return Plan(
        specs=(*kernel_specs(), *_train_specs(), *_prefill_specs(), *_decode_specs()),
        first=(_anchor("anchor-start", 5.0), ramp),
        last=(
            dataclasses.replace(_train(8, 2, 16), name="steady", window_s=22.0, held_out=True),
            _anchor("anchor-end", 5.0),
        ),
        budget_s=budget_s,
    )


def small_plan() -> Plan:
    """A plan for a host without a GPU: tiny shapes, fractions of a second; it shows that the machinery works."""
    from hwcost.probes import kernel_specs

    shape = ModelShape(d_model=32, num_layers=2, num_heads=4, vocab_size=64, expert_widths=(64,) * 4, top_k=1)
    train = [
        _step("train_step", batch, 16, dataclasses.replace(shape, top_k=k), held_out=batch == 2, window_s=0.1)
        for batch, k in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2))
    ]
    decode = [_step("decode_step", batch, 16, shape, window_s=0.1, open=2) for batch in (1, 4)]
    decode += [_step("prefill", 2, 16, shape, window_s=0.1)]
    kernels = [dataclasses.replace(spec, window_s=0.1) for spec in kernel_specs(small=True)]
    return Plan(
        specs=(*kernels, *train, *decode),
        first=(_anchor("anchor-start", 0.1),),
        last=(_anchor("anchor-end", 0.1),),
        idle_s=0.1,
        cool_s=0.0,
        warmup_s=0.0,
        budget_s=120.0,
    )


def smoke_plan() -> Plan:
    """One of each kind for a second: is everything in place on this GPU?"""
    from hwcost.probes import attention_spec, copy_spec, gemm_spec, grouped_spec, launch_spec

    kernels = [
        gemm_spec(8192, 8192, 8192),
        copy_spec(1 << 30),
        grouped_spec(16384, 8),
        attention_spec(16, 1024, train=True),
    ]
    steps = [
        _train(8, 2, 16),
        _train(4, 1, 4),
        *(spec for spec in _decode_specs() if spec.params["batch_size"] in (8, 128)),
    ]
    specs = [dataclasses.replace(spec, window_s=1.0) for spec in (*kernels, launch_spec(graph=True), *steps)]
    return Plan(
        specs=tuple(specs), first=(_anchor("anchor-start", 1.0),), last=(), idle_s=1.0, cool_s=0.0, budget_s=150.0
    )


def _anchor(name: str, seconds: float) -> ProbeSpec:
    return ProbeSpec(name=name, kind="anchor", params={}, window_s=seconds, code="anchor")


def _step(op: str, batch: int, seq_len: int, shape: ModelShape, **more: Any) -> ProbeSpec:
    spec = {key: more.pop(key) for key in ("held_out", "window_s", "tier") if key in more}
    widths = sorted(set(shape.expert_widths))
    width = "" if len(widths) == 1 and widths[0] == 4 * shape.d_model else "-w" + "/".join(map(str, widths))
    experts = f"E{shape.num_experts}K{shape.top_k}{width}" if shape.expert_widths else "dense"
    code = f"{op.split('_')[0]}-{experts}-B{batch}x{seq_len}"
    name = code + (f"-open{more['open']}" if "open" in more else "")
    params = step_params(op, batch_size=batch, seq_len=seq_len, shape=shape, **more)
    return ProbeSpec(name=name, kind=op, params=params, code=code, **spec)


def _train(
    experts: int, top_k: int, batch: int, *, widths: Sequence[int] | None = None, seq_len: int = 1024, **more: Any
) -> ProbeSpec:
    shape = ModelShape(expert_widths=tuple(widths or (3072,) * experts), top_k=top_k)
    return _step("train_step", batch, seq_len, shape, **more)


def _prefill_specs() -> list[ProbeSpec]:
    shapes = ((8, 1, 16, False), (8, 2, 8, False), (4, 2, 16, True))
    return [
        _step("prefill", b, 1024, ModelShape(expert_widths=(3072,) * e, top_k=k), held_out=held, tier=int(held))
        for e, k, b, held in shapes
    ]


# Experts, K, batch. The held-out shapes lie between and beside the fitted ones; extra ones come if time is left.
_FITTED = ((4, 1, 4), (4, 1, 16), (4, 2, 8), (4, 4, 32), (8, 1, 8), (8, 1, 32), (8, 2, 4), (8, 2, 16), (8, 4, 4),
           (8, 4, 16), (16, 1, 16), (16, 2, 4), (16, 2, 32), (16, 4, 8))  # fmt: skip
_CARRYING = {(4, 1, 4), (4, 4, 32), (8, 4, 16), (16, 1, 16), (16, 2, 32)}  # the ends of the range: longer windows
_HELD_OUT = ((4, 2, 32), (4, 4, 8), (8, 1, 4), (8, 2, 8), (8, 2, 32), (8, 1, 16), (16, 1, 4), (16, 4, 16), (16, 2, 8))
_EXTRA = ((4, 1, 8), (4, 2, 16), (16, 4, 4), (16, 1, 32))
_HALVES = (1536,) * 8
_MIXED = (3072, 3072, 1536, 1536, 1536, 768, 768, 768)


def _train_specs() -> list[ProbeSpec]:
    fitted = [_train(e, k, b, window_s=10.0 if (e, k, b) in _CARRYING else 3.5) for e, k, b in _FITTED]
    fitted += [_train(8, 2, 32, seq_len=256)]
    held = [_train(e, k, b, held_out=True) for e, k, b in _HELD_OUT]
    widths = [_train(8, 2, 16, widths=_HALVES, held_out=True), _train(8, 1, 8, widths=_HALVES, held_out=True)]
    widths += [_train(8, 2, 8, widths=_MIXED, held_out=True)]
    extra = [_train(e, k, b, held_out=True, tier=1) for e, k, b in _EXTRA]
    extra += [_train(8, 1, 16, seq_len=512, held_out=True, tier=1)]
    extra += [_train(8, 1, 16, widths=_MIXED, held_out=True, tier=1)]
    dense = dataclasses.replace(ModelShape(), expert_widths=())
    return [*fitted, *held, *widths, *extra, _step("train_step", 16, 1024, dense, tier=1)]


# K, batch, context, then numbers of open experts: in the fit, held out.
_DECODE = ((1, 1, 256, (1,), ()), (2, 1, 256, (), (2,)), (1, 8, 256, (1, 8), (3,)), (2, 16, 512, (2, 8), (4,)),
           (2, 32, 256, (4, 8), (2,)), (1, 64, 256, (1, 8), (2,)), (2, 128, 256, (2, 8), (5,)),
           (1, 256, 256, (1, 8), (4,)), (2, 256, 128, (2,), (8,)))  # fmt: skip


def _decode_specs() -> list[ProbeSpec]:
    return [
        _step("decode_step", batch, context, ModelShape(top_k=k), open=n, held_out=n in held_out)
        for k, batch, context, fitted, held_out in _DECODE
        for n in (*fitted, *held_out)
    ]
