"""Walk λ upwards on a checkpoint, without training: where does the price begin to act, and where does it break?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from hwcost import EnergyMonitor, share_energy
from pipelines.checkpoint import Loaded
from pipelines.config import ConfigError
from pipelines.data import TokenSplit
from pipelines.evaluation import evaluate, measure_decode, measure_prefill
from pipelines.model import set_prices, switch_opening, weigh_opening
from pipelines.modelled import PhaseModel

LAMBDAS = (0.0, *(10 ** (exponent / 2) for exponent in range(-10, 5)))
"""0, then from 1e-5 to 100, two a decade."""
MAX_LOSS_RISE = 0.1
"""nats per token over λ = 0 from which on the loss counts as broken."""
MIN_DIVERSITY = 0.5
"""Share of the diversity at λ = 0 below which it counts as broken."""
ACTS = 0.005
"""Share of flipped decisions from which on a price counts as acting."""


ALWAYS = ("n_layer", "n_head", "n_embd", "data", "seq_len", "batch_size", "decode_batches", "router", "top_k")
"""Keys that a suggested space states, default or not."""
UNSAID = ("mixing", "expert_activation", "shared_expert_width", "gibbs_beta", "n_inner", "activation_function")
"""Keys of a model that a trial has no key for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanPoint:
    """A checkpoint at one λ, on the validation split.

    Open experts are distinct experts that compute at a position of an evaluation batch, mean over positions and layers:
    what a decode step of as many sequences reads. Joules per token by phase: prefill and decode as measured
    (`energy_source` says how), training as the cost model has it for the width that was selected (always modelled; None
    without a GPU).
    """

    energy_lambda: float
    loss_nats: float
    routing_diversity: float
    effective_experts: float
    agreement: float | None
    flip_fraction: float | None
    position_open_experts: float
    mean_selected_width: float
    prefill_j_per_token: float | None
    decode_j_per_token: float | None
    modelled_train_j_per_token: float | None
    energy_source: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """The walk: its points, why it ended, and the λ worth training (None: `verdict` says why).

    `sequences` are those of an evaluation batch, over which open experts are counted.
    """

    checkpoint: str
    sequences: int
    points: tuple[ScanPoint, ...]
    stopped: str
    worth: tuple[float, float] | None


def scan(
    loaded: Loaded,
    monitor: EnergyMonitor,
    lambdas: Sequence[float] = LAMBDAS,
    *,
    on_point: Callable[[ScanPoint], None] = lambda point: None,
) -> Scan:
    """Evaluate the checkpoint at each λ, until diversity or loss breaks.

    Raises:
        ConfigError: λ does not act on the checkpoint's router, or the λ do not rise from 0.
    """
    if not loaded.config.is_priced:
        raise ConfigError(f"router: expected one on which λ acts, got {loaded.config.router}")
    values = sorted({0.0, *lambdas})
    if not all(0 <= value < math.inf for value in values):
        raise ConfigError(f"lambdas: expected finite numbers of at least 0, got {lambdas}")
    before, points, stopped = float(loaded.model.config.energy_lambda), list[ScanPoint](), "the last λ was reached"
    try:
        for value in values:
            points.append(_point(loaded, monitor, value))
            on_point(points[-1])
            if (reason := broken(points[0], points[-1])) is not None:
                stopped = reason
                break
    finally:
        _at(loaded, before)
    return Scan(
        checkpoint=loaded.config.base,
        sequences=sequences_of(loaded),
        points=tuple(points),
        stopped=stopped,
        worth=worth_training(points),
    )


def sequences_of(loaded: Loaded) -> int:
    """Sequences of an evaluation batch."""
    return min(loaded.config.batch_size, len(_split(loaded).blocks_NS))


def broken(free: ScanPoint, point: ScanPoint) -> str | None:
    """Why a walk ends here; None: it goes on."""
    at = f"at λ = {point.energy_lambda:.3g}"
    if not point.loss_nats <= free.loss_nats + MAX_LOSS_RISE:
        return f"{at} the loss is {point.loss_nats - free.loss_nats:+.3f} nat above that at λ = 0"
    if point.routing_diversity < MIN_DIVERSITY * free.routing_diversity:
        return f"{at} diversity is {point.routing_diversity:.2f}, below half of {free.routing_diversity:.2f} at λ = 0"
    return None


def worth_training(points: Sequence[ScanPoint]) -> tuple[float, float] | None:
    """From the first λ that changes decisions to the last that changes any more, before something breaks.

    Training adapts to the price, so that the upper end is where an untrained price begins to hurt, not a limit.
    """
    whole = [p for p in points if broken(points[0], p) is None]
    most = max(p.flip_fraction or 0.0 for p in whole)
    low = [p.energy_lambda for p in whole if acts(p)]
    high = [p.energy_lambda for p in whole if (p.flip_fraction or 0.0) >= most - ACTS]
    return (low[0], max(low[0], high[0])) if low else None


def acts(point: ScanPoint) -> bool:
    """Whether λ changes decisions."""
    return point.energy_lambda > 0 and (point.flip_fraction or 0.0) >= ACTS


def verdict(found: Scan) -> str:
    """The λ worth training in words, or why there is none."""
    if found.worth is not None:
        return f"Worth training: λ from {found.worth[0]:.3g} to {found.worth[1]:.3g}."
    broke = [p for p in found.points if acts(p)]
    if not broke:
        return "No λ of the walk changed decisions: no range to suggest."
    high = broke[0].energy_lambda
    low = max(p.energy_lambda for p in found.points if p.energy_lambda < high)
    return (
        f"The first λ of the walk that changed decisions, {high:.3g}, broke loss or diversity too: no range to suggest."
        f" Walk λ between {low:.3g} and {high:.3g} (--lambdas)."
    )


def _split(loaded: Loaded) -> TokenSplit:
    return loaded.corpus.splits["validation"].first(loaded.config.max_eval_tokens)


def _at(loaded: Loaded, energy_lambda: float) -> None:
    """Put λ on the routers; whether `opening` pays depends on it."""
    loaded.model.set_energy_lambda(energy_lambda)
    switch_opening(loaded.model, weigh_opening(loaded.config, loaded.model.config, loaded.hardware))


def _point(loaded: Loaded, monitor: EnergyMonitor, energy_lambda: float) -> ScanPoint:
    model, config, hardware = loaded.model, loaded.config, loaded.hardware
    assert loaded.prices is not None
    _at(loaded, energy_lambda)
    split = _split(loaded)
    set_prices(model, loaded.prices["prefill"])
    found = evaluate(model, split, config, hardware)
    prefill = measure_prefill(model, split, config, hardware, monitor)
    set_prices(model, loaded.prices["decode"])
    decode = measure_decode(model, split, config.decode_batches[0], config, hardware, monitor)
    routing = found.routing
    assert routing is not None
    assert routing.position_open_experts is not None
    modelled = PhaseModel.of(config, model.config, hardware, selected_width=routing.mean_selected_width)
    step_j, batch = modelled.training_j(1), {"batch_size": config.batch_size, "seq_len": config.seq_len}
    return ScanPoint(
        energy_lambda=energy_lambda,
        loss_nats=found.loss_nats,
        routing_diversity=routing.routing_diversity,
        effective_experts=routing.effective_experts,
        agreement=routing.unpriced_agreement,
        flip_fraction=routing.price_flip_fraction,
        position_open_experts=routing.position_open_experts,
        mean_selected_width=routing.mean_selected_width,
        prefill_j_per_token=prefill.j_per_token,
        decode_j_per_token=decode.j_per_token,
        modelled_train_j_per_token=None if step_j is None else share_energy(step_j, **batch).token_j,
        energy_source=monitor.source,
    )


def write_scan(found: Scan, loaded: Loaded, out: Path) -> list[Path]:
    """Write `scan.json`, the curve as PNG and SVG and, where a range is worth training, `space.yaml`; returns paths."""
    out.mkdir(parents=True, exist_ok=True)
    data, space = out / "scan.json", out / "space.yaml"
    curves = [out / "scan.png", out / "scan.svg"]
    data.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", encoding="utf-8")
    figure = draw(found)
    for curve in curves:
        figure.savefig(curve, dpi=150)
    if found.worth is None:
        return [data, *curves]
    text = yaml.safe_dump(space_of(found, loaded), sort_keys=False, allow_unicode=True)
    head = f"# Suggested by a scan of {found.checkpoint}: {found.stopped}.\n"
    if unsaid := unsaid_keys(loaded.model.config):
        head += f"# Not the model's: a trial has no key for its {', '.join(unsaid)}.\n"
    space.write_text(head + text, encoding="utf-8")
    return [data, *curves, space]


def space_of(found: Scan, loaded: Loaded) -> dict[str, Any]:
    """A search space over the λ worth training, and λ = 0 to compare with.

    Every key of the scan's trial that differs from its default is in it, so that the space trains what was scanned,
    with fresh weights; those that give the shape always are.
    """
    assert found.worth is not None
    low, high = found.worth
    steps = 1 if low == high else 4
    grid = [low * (high / low) ** (i / max(steps - 1, 1)) for i in range(steps)]
    config, model_config = loaded.config, loaded.model.config
    values = config.model_dump(mode="json")
    named = set(config.model_dump(exclude_defaults=True))
    trial = {key: values[key] for key in values if key in named or key in ALWAYS}
    trial |= {"base": "random", "energy_lambda": {"grid": [0.0, *(float(f"{value:.3g}") for value in grid)]}}
    trial |= {"expert_width_factors": [width / (4 * model_config.n_embd) for width in model_config.expert_widths]}
    trial = {key: value for key, value in trial.items() if value is not None and key != "num_experts"}
    return {"question": "Which λ in the range where the price acts is worth its loss?", "trial": trial}


def unsaid_keys(model_config: Any) -> list[str]:
    """What a space cannot say of a model: `key = value` of each key that is not as trials have it."""
    default = type(model_config)()
    found = {key: getattr(model_config, key) for key in UNSAID if getattr(model_config, key) != getattr(default, key)}
    if found.get("n_inner") == 4 * model_config.n_embd:
        del found["n_inner"]
    if len(model_config.regularizers or {}) > 1:
        found["regularizers"] = model_config.regularizers
    return [f"{key} = {value}" for key, value in found.items()]


def draw(found: Scan) -> Figure:
    """Loss, diversity and joules over λ; λ = 0 stands at the left edge."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    priced = [p for p in found.points if p.energy_lambda > 0]
    x = [p.energy_lambda for p in priced]
    modelled = ", modelled" if found.points[0].energy_source == "modelled" else ""
    panels = (
        ("loss [nat/token]", {"loss": "loss_nats"}),
        ("share", {"diversity": "routing_diversity", "agreement with λ = 0": "agreement"}),
        (
            f"energy over that at λ = 0{modelled}",
            {
                "prefill": "prefill_j_per_token",
                "decode": "decode_j_per_token",
                "training, modelled": "modelled_train_j_per_token",
                f"open experts of {found.sequences} sequences": "position_open_experts",
            },
        ),
    )
    for axes, (title, columns) in zip(figure.subplots(3, 1, sharex=True), panels, strict=True):
        for label, column in columns.items():
            free = getattr(found.points[0], column)
            relative = free if title.startswith("energy") and free else 1.0
            if free is None and column.endswith("j_per_token"):
                continue
            y = [math.nan if (v := getattr(p, column)) is None else v / relative for p in priced]
            axes.plot(x, y, marker="o", label=label)
            if free is not None:
                axes.axhline(free / relative, lw=0.7, ls=":", color="grey")
        axes.set(ylabel=title, xscale="log")
        axes.legend(fontsize=8)
        if found.worth is not None:
            axes.axvspan(*found.worth, color="grey", alpha=0.12)
    axes.set_xlabel("λ [nat per c_ref]; dotted: λ = 0; grey: worth training")
    return figure
