"""What benchmarks of routing share: a model trained for some seconds, text held out, results that a cut-off keeps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from pipelines.config import TrialConfig
from pipelines.data import Corpus, TokenSplit
from pipelines.model import Hardware, build_model, compiled_forward, set_prices
from pipelines.training import Trainer, batches

START_S = time.monotonic()


def elapsed_s() -> float:
    """Seconds since the benchmark began."""
    return time.monotonic() - START_S


class Results:
    """What was found, on the screen and in a file that is whole at any time."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.found = path, dict[str, Any]()

    def say(self, text: str) -> None:
        """A line, with the seconds since the start."""
        print(f"[{elapsed_s():6.1f} s] {text}", flush=True)

    def keep(self, name: str, value: Any) -> None:
        """Put a value under a name and write the whole."""
        self.found[name] = value
        self.found["seconds"] = round(elapsed_s(), 1)
        if self.path is not None:
            draft = self.path.with_suffix(".part")
            draft.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            os.replace(draft, self.path)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student)."""
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


class Tenant:
    """The forward, and beside it, where `repeats` says so, products of matrices: a load that is not the model's."""

    def __init__(self, forward: Callable[..., Any], device: torch.device) -> None:
        cuda = device.type == "cuda"
        size = 4096 if cuda else 256
        self.forward, self.repeats, self.synchronize = forward, 0, torch.cuda.synchronize if cuda else lambda: None
        self.a_NN = torch.randn(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32) / size

    def __call__(self, **kwargs: Any) -> Any:
        self.work(self.repeats)
        return self.forward(**kwargs)

    def work(self, repeats: int) -> None:
        for _ in range(repeats):
            torch.mm(self.a_NN, self.a_NN)

    def repeats_for(self, seconds: float) -> int:
        """How many products take so long."""
        self.work(3)
        self.synchronize()
        start_s = time.monotonic()
        self.work(50)
        self.synchronize()
        return max(1, round(seconds / ((time.monotonic() - start_s) / 50)))


def texts(corpus: Corpus, base: str) -> tuple[TokenSplit, TokenSplit]:
    """(to train on, unseen): of a base that has read the training split, the other splits are what is unseen."""
    if base == "random":
        return halves(corpus.splits["train"])
    others = [split for name, split in corpus.splits.items() if name != "train"]
    joined = {name: torch.cat([getattr(split, name) for split in others]) for name in ("blocks_NS", "domain_N")}
    return corpus.splits["train"], dataclasses.replace(others[0], **joined)


def halves(split: TokenSplit, every: int = 3) -> tuple[TokenSplit, TokenSplit]:
    """(to train on, held out): each third block is held out."""
    held_N = torch.arange(len(split.blocks_NS)) % every == every - 1
    parts = (
        dataclasses.replace(split, blocks_NS=split.blocks_NS[rows], domain_N=split.domain_N[rows])
        for rows in (~held_N, held_N)
    )
    train, held = parts
    return train, held


def trained(
    config: TrialConfig,
    corpus: Corpus,
    split: TokenSplit,
    hardware: Hardware,
    seconds: float,
    results: Results,
    *,
    phase: str = "prefill",
) -> Any:
    """A model trained for so many seconds, compiling not counted, with the prices of a phase, in the type in which it
    serves."""
    model, prices = build_model(config, corpus, hardware)
    # `opening` runs here whether it pays or not: that is what is to be found out.
    trainer = Trainer(model, config, dataclasses.replace(hardware, compile=False), split)
    if hardware.compile:
        trainer.forward = compiled_forward(model)
    try:
        trainer.warm_up()
    except Exception as error:  # blocks that compile forwards but not backwards
        results.say(f"compiling the whole model instead: {error}"[:200])
        trainer.forward = torch.compile(model)
        trainer.warm_up()
    results.say("compiled")
    loss = _steps(trainer, config, seconds)
    results.say(
        f"trained with {config.router}, λ {config.energy_lambda:g}: {trainer.step} steps, {trainer.tokens / 1e6:.1f} M"
        f" tokens, loss {loss:.3f}"
    )
    told = {"router": config.router, "energy_lambda": config.energy_lambda, "steps": trainer.step}
    results.keep(f"training {config.router}", told | {"tokens": trainer.tokens, "loss_nats": loss})
    assert prices is not None
    set_prices(model, prices[phase])
    return (model.to(torch.bfloat16) if hardware.device.type == "cuda" else model).eval()


def _steps(trainer: Trainer, config: TrialConfig, seconds: float) -> float:
    """Warm-up, a stable rate, and a decay in the last quarter of the time; returns one of the last losses."""
    trainer.model.train()
    start_s, loss = time.monotonic(), math.nan
    for epoch in itertools.count(1):
        for block_BS in batches(trainer.split, config, epoch, trainer.hardware.device):
            spent_s = time.monotonic() - start_s
            rate = min(1.0, max(0.05, 4 * (1 - spent_s / seconds))) * min(1.0, (trainer.step + 1) / 30)
            losses = trainer._step(block_BS, config.learning_rate * rate)
            if trainer.step % 10 == 1:
                loss = float(losses[0])  # waits for the device, so that the time is that of the work
            if spent_s >= seconds:
                return loss
    raise AssertionError
