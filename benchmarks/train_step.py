"""The whole training step of DistilGPT2 with all 6 FFNs as 8 experts: ours against transformers' grouped_mm peer.

    python benchmarks/train_step.py [--k 1 2 4] [--repetitions 5] [--seconds 3] [--head liger]
    python benchmarks/train_step.py --only peer ours "ours, same head"

16 x 1024 tokens a step, bf16 weights, fused AdamW, torch.compile(fullgraph=True) for both. Ours replays forward and
backward as a CUDA graph, as trials do; "launched" leaves that out, and "peer, captured" gives the peer the same graph.
"same head" lets ours compute its loss from full logits, as the peer does, so that the difference of the experts stands
alone. `--head` gives peer and ours a library's fused linear cross-entropy, where it is installed. Liger's asks the
device for the number of targets (`.item()`), so that it can be neither captured nor compiled whole: both are launched,
with the model's body compiled.

Two peaks of memory: what tensors took, and what the allocator holds for them, private pools of CUDA graphs included.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import time
import traceback
from collections.abc import Callable

import torch
from measure import Case, interleave, print_table, profile, spread, synchronize
from peer import PeerConfig, PeerLMHeadModel, backend

from hwcost import EnergyMonitor
from moe import MoEGPT2Config
from moe.captured import CapturedBackward
from moe.modeling import MoEGPT2LMHeadModel

BATCH, LENGTH = 16, 1024
SHAPE = {"n_layer": 6, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024, "use_cache": False}


HEADS = {"liger": ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")}


def loss_of(model: torch.nn.Module, head: str | None, **options: object) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's own loss, compiled whole, or a library's on the compiled body."""
    if head is None:
        compiled = torch.compile(model, fullgraph=True)
        return lambda batch_BS: compiled(input_ids=batch_BS, labels=batch_BS, use_cache=False, **options).loss
    module, name = HEADS[head]
    loss = getattr(importlib.import_module(module), name)()
    body = torch.compile(model.transformer, fullgraph=True)

    def run(batch_BS: torch.Tensor) -> torch.Tensor:
        hidden_BSD = body(input_ids=batch_BS, use_cache=False).last_hidden_state[:, :-1]
        return loss(model.lm_head.weight, hidden_BSD.flatten(0, 1), batch_BS[:, 1:].flatten())

    return run


def training_step(
    model: torch.nn.Module, ids_BS: torch.Tensor, *, graph: bool, head: str | None = None, **options: object
) -> Case:
    model = model.to("cuda", torch.bfloat16).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, fused=True
    )  # the weights stay put: text learnt by heart draws less power
    loss_fn = loss_of(model, head, **options)

    def backward(batch_BS: torch.Tensor) -> torch.Tensor:
        loss = loss_fn(batch_BS)
        loss.backward()
        return loss.detach()

    backward(ids_BS)  # compiles
    run = CapturedBackward(backward, model.parameters(), ids_BS) if graph else backward

    def case() -> None:
        case.loss = run(ids_BS)
        optimizer.step()
        if not graph:
            optimizer.zero_grad(set_to_none=True)

    return case


def ours(k: int, **options: object) -> torch.nn.Module:
    return MoEGPT2LMHeadModel(MoEGPT2Config(**SHAPE, num_experts_per_tok=k, **options))


def peer(k: int) -> torch.nn.Module:
    model = PeerLMHeadModel(PeerConfig(**SHAPE, num_experts_per_tok=k))
    assert backend(model) == "grouped_mm", backend(model)
    return model


VARIANTS = {
    "peer": (peer, {"graph": False}),
    "peer, captured": (peer, {"graph": True}),
    "ours": (ours, {"graph": True}),
    "ours, launched": (ours, {"graph": False}),
    "ours, same head": (ours, {"graph": True, "skip_logits": False}),
}


def with_head(head: str) -> dict[str, tuple[Callable[[int], torch.nn.Module], dict[str, object]]]:
    return {
        f"peer, {head} head, launched": (peer, {"graph": False, "head": head}),
        f"ours, {head} head, launched": (ours, {"graph": False, "head": head}),
    }


def build(name: str, make, ids_BS: torch.Tensor, **options: object) -> Case | None:
    """A warm step; prints its start-up time and peak memory (a graph takes all of its own when it is captured)."""
    gc.collect()
    torch.cuda.empty_cache()
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        case = training_step(make(), ids_BS, **options)
        case()
        synchronize()
        started_s = time.perf_counter() - start
    except Exception:
        print(f"{name} left out:")
        traceback.print_exc(limit=-4)
        return None
    peak_gb = (torch.cuda.max_memory_allocated() - held) / 1e9
    reserved_gb = (torch.cuda.max_memory_reserved() - reserved) / 1e9
    print(
        f"{name:28s} peak memory {peak_gb:6.2f} GB in tensors, {reserved_gb:6.2f} GB reserved (above what was held), "
        f"first step {started_s:.0f} s",
        flush=True,
    )
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--profile", action="store_true", help="kernel times of one step of ours and of the peer")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--head", nargs="*", default=[], choices=list(HEADS), help="libraries' heads, beside the others"
    )
    args = parser.parse_args()
    variants = {name: VARIANTS[name] for name in args.only}
    for head in args.head:
        variants |= with_head(head)
    torch.manual_seed(0)
    ids_BS = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH), device="cuda")
    with EnergyMonitor.for_assigned_devices() as monitor:
        for k in args.k:
            torch._dynamo.reset()
            cases = {}
            for name, (make, options) in variants.items():
                case = build(name, functools.partial(make, k), ids_BS, **options)
                cases |= {name: case} if case else {}
            if args.profile:
                for name, case in cases.items():
                    print(f"-- {name}, K={k}")
                    profile(case)
            if args.repetitions:
                runs = interleave(cases, repetitions=args.repetitions, seconds=args.seconds, monitor=monitor)
                print_table(f"training step, K={k}, mJ per token", runs, "peer", divide=BATCH * LENGTH)
                for name, samples in runs.items():
                    print(
                        f"{name:28s} {spread([BATCH * LENGTH / s.duration_ms for s in samples])} k tokens/s", flush=True
                    )
            for name, case in cases.items():
                assert torch.isfinite(case.loss), f"{name}: the loss is {float(case.loss)}"
            cases, case = {}, None  # their graphs hold memory
            gc.collect()


if __name__ == "__main__":
    main()
