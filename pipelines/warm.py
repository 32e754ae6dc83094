"""What a process keeps warm from one trial to the next: tokenised text, and compiled code by shape of model.

torch.compile's code belongs to a module. So a process keeps one module per shape and gives it each trial's tensors:
λ, τ, prices and weights are tensors, hence nothing is compiled twice. Between trials a kept module is empty. Several
processes of a host share the compiler's cache on disk; of those that need one shape at once, one compiles and the
others wait for its cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from moe.generation import drop_decoders
from pipelines import data
from pipelines.config import TrialConfig
from pipelines.model import Hardware

#: Shapes that a process keeps, at two versions of a function each (with gradients and without). By itself the compiler
#: holds eight versions and refuses the ninth.
MOST_SHAPES = 24
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * MOST_SHAPES + 8)
_MOST_CORPORA = 2
#: Values of a model's configuration that live in tensors, or do not enter its code.
_NOT_THE_SHAPE = {"energy_lambda", "router_temperature", "router_seed", "transformers_version", "_name_or_path"}


@dataclasses.dataclass
class Compiled:
    """A module, its compiled forward, and what compiling took, after a wait for whoever else compiled; `ready` once it
    ran.
    """

    module: Any
    forward: Any
    shape: str
    ready: bool = False
    busy: bool = True
    seconds: float | None = None
    waited_s: float = 0.0


_shapes: dict[str, Compiled] = {}
_corpora: dict[tuple[Any, ...], data.Corpus] = {}


def corpus_of(config: TrialConfig) -> data.Corpus:
    """`data.load_corpus`, read once while its files stay as they are.

    Raises:
        ConfigError: the data or the tokenizer cannot be had.
    """
    key = (data.source_key(config.data), config.tokenizer or config.base, config.seq_len, str(data.cache_dir()))
    if key not in _corpora:
        while len(_corpora) >= _MOST_CORPORA:
            _corpora.pop(next(iter(_corpora)))
        _corpora[key] = data.load_corpus(config)
    return _corpora[key]


def compiled(model: Any, config: TrialConfig, hardware: Hardware) -> Compiled:
    """The module to train, holding this model's tensors and settings, with its compiled forward.

    It is the model itself where nothing of its shape was compiled in this process, or nothing is to be compiled.
    """
    if not hardware.compile:
        return Compiled(module=model, forward=model, shape="", ready=True)
    shape = shape_of(model, config, hardware)
    kept = _shapes.get(shape)
    if kept is None:
        if len(_shapes) >= MOST_SHAPES:
            forget()
        kept = Compiled(module=model, forward=torch.compile(model, fullgraph=True), shape=shape)
        _shapes[shape] = kept
        return kept
    if kept.busy:  # two trials of a shape at once: the second compiles for itself
        return Compiled(module=model, forward=torch.compile(model, fullgraph=True), shape=shape)
    _give(model, kept.module)
    kept.busy, kept.seconds = True, None
    return kept


@contextlib.contextmanager
def compiling(code: Compiled) -> Iterator[None]:
    """Around the first steps of a trial: where they compile, one process of this host does at a time per shape."""
    if code.ready:
        yield
        return
    asked_s = time.monotonic()
    with _one_at_a_time(code.shape):
        start_s = time.monotonic()
        yield
    code.ready, code.seconds, code.waited_s = True, time.monotonic() - start_s, start_s - asked_s


def release(code: Compiled) -> None:
    """Empty a module until the next trial of its shape."""
    code.busy = False
    if _shapes.get(code.shape) is code:
        drop_decoders(code.module)
        for tensor in (*code.module.parameters(), *code.module.buffers()):
            tensor.grad = None
            tensor.data = tensor.data.new_empty(0)


def forget() -> None:
    """Drop all compiled code of this process."""
    _shapes.clear()
    torch._dynamo.reset()


def shape_of(model: Any, config: TrialConfig, hardware: Hardware) -> str:
    """What compiled code depends on, as a digest: architecture, regularizers, batch, precision."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_SHAPE}
    if not all(router.learned for router in model.routers):
        settings["router_seed"] = model.config.router_seed  # it is hashed inside the code
    settings |= {"class": type(model).__name__, "batch": [config.batch_size, config.seq_len], "dtype": hardware.dtype}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _give(source: Any, target: Any) -> None:
    """Move tensors and settings from a new model into the kept one of the same shape; the source is empty then."""
    theirs = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, tensor in (*target.named_parameters(), *target.named_buffers()):
        tensor.data = theirs[name].data
        tensor.grad = None
    target.config.__dict__.update(source.config.__dict__)
    target.generation_config = source.generation_config
    for own, new in zip(target.routers, source.routers, strict=True):
        own.seed, own.keep_first = new.seed, new.keep_first
    target.train(source.training)


@contextlib.contextmanager
def _one_at_a_time(shape: str) -> Iterator[None]:
    """A lock among the processes of this host, which the kernel gives back when its holder dies."""
    if os.name == "nt":
        yield
        return
    import fcntl

    data.cache_dir().mkdir(parents=True, exist_ok=True)
    with open(data.cache_dir() / f"compile-{shape}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
