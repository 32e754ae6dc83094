"""A training step of the quickstart's model on CPU: ours against transformers' eager experts, everything else equal.

    python benchmarks/moe_cpu_step.py [--repetitions 15] [--threads 1 2] [--dropout 0.1 0.0]

2 layers, width 64, 6 experts of 256 neurons, 512 vocabulary entries, 8 x 128 tokens, fp32, clipped gradients, fused
AdamW. GPT-2's own dropout (0.1), with which a quickstart trial trains, and none. "ours, as the trial" has the
quickstart's router, prices, unequal widths and null expert besides, which the peer does not offer; "ours, no C" is ours
on a machine without a compiler. The MoE layer (forward and backward) and the products alone (what both cannot avoid)
stand below. Windows of a few steps in turn; CPU seconds of the process as well as wall time, because a machine may be
shared: medians, and paired ratios with their range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from measure import spread
from peer import PeerConfig, PeerLMHeadModel, backend

from moe import MoEGPT2Config, native
from moe.modeling import MoEGPT2LMHeadModel
from moe.routing import Tokens

Case = Callable[[], object]
BATCH, LENGTH, E, WIDTH, VOCABULARY, D = 8, 128, 6, 256, 512, 64
QUICKSTART_WIDTHS = [512, 256, 256, 128, 128, 0]
OURS, TRIAL, NO_C, PEER = "ours", "ours, as the trial", "ours, no C", "transformers, eager experts"


def shape(dropout: float) -> dict[str, object]:
    places = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return {
        "n_layer": 2, "n_embd": D, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": LENGTH, "use_cache": False,
    } | places  # fmt: skip


def build(name: str, k: int, dropout: float) -> torch.nn.Module:
    if name == PEER:
        config = PeerConfig(**shape(dropout), num_local_experts=E, num_experts_per_tok=k)
        config._experts_implementation = "eager"
        model = PeerLMHeadModel(config)
        assert backend(model) == "eager", backend(model)
        return model
    trial = {"router": "energy", "energy_lambda": 0.1} if name == TRIAL else {}
    widths = QUICKSTART_WIDTHS if name == TRIAL else [WIDTH] * E
    return MoEGPT2LMHeadModel(MoEGPT2Config(**shape(dropout), num_experts_per_tok=k, expert_widths=widths, **trial))


def training_step(model: torch.nn.Module, ids_BS: torch.Tensor) -> Case:
    """What `pipelines.training.Trainer` does in a step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    after_step = getattr(model, "after_step", lambda: None)

    def case() -> None:
        model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step()

    return case


def layer_step(model: torch.nn.Module) -> Case:
    """Forward and backward of one MoE layer: router, experts, combine."""
    block = model.transformer.h[0]
    x_BSD = torch.randn(BATCH, LENGTH, D, requires_grad=True)
    dy_BSD = torch.randn_like(x_BSD)
    tokens = (Tokens(batch_size=BATCH, position_T=torch.arange(LENGTH).repeat(BATCH)),)
    extra = tokens if isinstance(model, MoEGPT2LMHeadModel) else ()
    inputs = [x_BSD, *block.mlp.parameters()]

    def case() -> None:
        y = block.mlp(x_BSD, *extra)
        torch.autograd.grad(y[0] if isinstance(y, tuple) else y, inputs, dy_BSD, allow_unused=True)

    return case


def products(k: int, whole_step: bool) -> Case:
    """The matrix products alone, in the shapes of a balanced routing, into memory that is there already."""
    tokens = BATCH * LENGTH
    expert = [(k * tokens // E, D, WIDTH), (k * tokens // E, WIDTH, D)] * E
    shapes = expert
    if whole_step:  # two layers with QKV and projection, and the head
        shapes = 2 * [*expert, (tokens, D, 3 * D), (tokens, D, D)] + [(tokens, D, VOCABULARY)]
    tensors = [(torch.randn(m, n), torch.randn(n, p), torch.randn(m, p)) for m, n, p in shapes]
    outputs = [(torch.empty(m, p), torch.empty(m, n), torch.empty(n, p)) for m, n, p in shapes]

    def case() -> None:
        for (x, w, dy), (y, dx, dw) in zip(tensors, outputs, strict=True):
            torch.mm(x, w, out=y)
            torch.mm(dy, w.T, out=dx)
            torch.mm(x.T, dy, out=dw)

    return case


def without_library(case: Case) -> Case:
    """The case as it runs where there is no compiler."""
    found = native.library

    def wrapped() -> None:
        native.library = lambda: None  # type: ignore[assignment]
        try:
            case()
        finally:
            native.library = found

    return wrapped


def window(case: Case, calls: int) -> tuple[float, float]:
    """CPU and wall milliseconds of a call."""
    case()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        case()
    return (time.process_time() - cpu) / calls * 1e3, (time.perf_counter() - wall) / calls * 1e3


def compare(title: str, cases: Mapping[str, Case], repetitions: int, calls: int) -> None:
    """Print medians, and how many times as long the peer takes as each case."""
    for case in cases.values():
        window(case, 3)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, case in cases.items():
            runs[name].append(window(case, calls))
    print(f"\n{title}\n{'':30s} {'CPU ms':>8s} {'wall ms':>8s}  {'peer / this, CPU':24s} peer / this, wall")
    for name, samples in runs.items():
        cpu, wall = zip(*samples, strict=True)
        ratios = [spread([p[i] / s[i] for p, s in zip(runs[PEER], samples, strict=True)]) for i in (0, 1)]
        print(f"{name:30s} {statistics.median(cpu):8.2f} {statistics.median(wall):8.2f}  {ratios[0]:24s} {ratios[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.1, 0.0])
    args = parser.parse_args()
    torch.manual_seed(0)
    ids_BS = torch.randint(VOCABULARY, (BATCH, LENGTH))
    for threads in args.threads:
        torch.set_num_threads(threads)
        for k in (1, 2):
            for dropout in args.dropout:
                models = {name: build(name, k, dropout) for name in (PEER, OURS, TRIAL, NO_C)}
                cases = {name: training_step(model, ids_BS) for name, model in models.items()}
                cases = cases | {NO_C: without_library(cases[NO_C]), "products alone": products(k, True)}
                title = f"{threads} threads, training step, K={k}, dropout {dropout}"
                compare(title, cases, args.repetitions, args.calls)
            layers = {name: layer_step(model) for name, model in models.items() if name != TRIAL}
            layers = layers | {NO_C: without_library(layers[NO_C]), "products alone": products(k, False)}
            compare(f"{threads} threads, MoE layer, K={k}", layers, args.repetitions, 3 * args.calls)


if __name__ == "__main__":
    main()
