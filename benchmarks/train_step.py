"""The whole training step of DistilGPT2 with all 6 FFNs as 8 experts: ours against transformers' grouped_mm peer.

    python benchmarks/train_step.py [--k 1 2 4] [--repetitions 5] [--seconds 3]

16 x 1024 tokens a step, bf16 weights, fused AdamW, torch.compile(fullgraph=True) for both. Ours replays forward and
backward as a CUDA graph, as trials do; "launched" leaves that out, and "peer, captured" gives the peer the same graph.
"same head" lets ours compute its loss from full logits, as the peer does, so that the difference of the experts stands
alone.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
import traceback

import torch
from measure import Case, interleave, print_table, profile, synchronize
from peer import PeerConfig, PeerLMHeadModel, backend

from hwcost import EnergyMonitor
from moe import MoEGPT2Config
from moe.captured import CapturedBackward
from moe.modeling import MoEGPT2LMHeadModel

BATCH, LENGTH = 16, 1024
SHAPE = {"n_layer": 6, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024, "use_cache": False}


def training_step(model: torch.nn.Module, ids_BS: torch.Tensor, *, graph: bool, **options: object) -> Case:
    model = model.to("cuda", torch.bfloat16).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, fused=True
    )  # the weights stay put: text learnt by heart draws less power
    compiled = torch.compile(model, fullgraph=True)

    def backward(batch_BS: torch.Tensor) -> torch.Tensor:
        loss = compiled(input_ids=batch_BS, labels=batch_BS, use_cache=False, **options).loss
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


def build(name: str, make, ids_BS: torch.Tensor, **options: object) -> Case | None:
    """A warm step; prints its start-up time and peak memory (a graph takes all of its own when it is captured)."""
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
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
    print(f"{name:28s} peak memory {peak_gb:6.2f} GB (above what was held), first step {started_s:.0f} s", flush=True)
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--profile", action="store_true", help="kernel times of one step of ours and of the peer")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    args = parser.parse_args()
    torch.manual_seed(0)
    ids_BS = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH), device="cuda")
    with EnergyMonitor.for_assigned_devices() as monitor:
        for k in args.k:
            torch._dynamo.reset()
            cases = {}
            for name in args.only:
                make, options = VARIANTS[name]
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
                    ms = sorted(s.duration_ms for s in samples)[len(samples) // 2]
                    print(f"{name:28s} {BATCH * LENGTH / ms:8.1f} k tokens/s", flush=True)
            for name, case in cases.items():
                assert torch.isfinite(case.loss), f"{name}: the loss is {float(case.loss)}"
            del cases, case
            gc.collect()


if __name__ == "__main__":
    main()
