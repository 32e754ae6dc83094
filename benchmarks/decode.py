"""Greedy decoding through `model.generate`: ours, and transformers' grouped_mm peer with a static cache.

    python benchmarks/decode.py [--batch 32] [--profile]

DistilGPT2, 6 MoE layers of 8 experts, bf16, K 2, a 64-token prompt, 128 new tokens. Two tables, each with ratios to
the peer: the whole call (joules per new token, prompt included), and one step, which is the difference of a long and a
short generation of the same repetition over the difference of their lengths, so that the prompt drops out.
"""

from __future__ import annotations

import argparse
import traceback
import warnings

import torch
from measure import Case, Sample, difference, interleave, print_table, profile, spread, synchronize
from peer import PeerConfig, PeerLMHeadModel
from train_step import SHAPE

from hwcost import EnergyMonitor
from moe import MoEGPT2Config
from moe.modeling import MoEGPT2LMHeadModel

PROMPT, NEW, SHORT, K = 64, 128, 8, 2


def generation(model: torch.nn.Module, ids_BS: torch.Tensor, new: int, **options: object) -> Case:
    model = model.to("cuda", torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # every call generates all its tokens
    mask_BS = torch.ones_like(ids_BS)

    def case() -> torch.Tensor:
        return model.generate(
            ids_BS, attention_mask=mask_BS, max_new_tokens=new, do_sample=False, pad_token_id=0, **options
        )  # fmt: skip

    return case


def brief(name: str) -> str:
    return f"{name}, {SHORT} tokens"


def report(runs: dict[str, list[Sample]], names: list[str], batch: int) -> None:
    """Both tables, and the absolute figures with their range: the bars are absolute."""
    calls = {name: runs[name] for name in names}
    steps = {name: difference(runs[name], runs[brief(name)], NEW - SHORT) for name in names}
    print_table(
        f"generate, batch {batch}, {NEW} new tokens: per call; mJ per token", calls, names[0], divide=batch * NEW
    )
    print_table(f"one step, batch {batch}, without the prompt; mJ per token", steps, names[0], divide=batch)
    print(f"\n{'min-max over repetitions':28s} {'ms a step':24s} {'ms per new token':24s} mJ per new token")
    for name in names:
        step_ms = [s.duration_ms for s in steps[name]]
        call_ms = [s.duration_ms / NEW for s in calls[name]]
        mj = [s.energy_mj / (batch * NEW) for s in calls[name] if s.energy_mj is not None]
        print(f"{name:28s} {spread(step_ms):24s} {spread(call_ms):24s} {spread(mj) if mj else '-'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = {name: value for name, value in SHAPE.items() if name != "use_cache"}
    ids_BS = torch.randint(config["vocab_size"], (args.batch, PROMPT), device="cuda")
    ours = MoEGPT2LMHeadModel(MoEGPT2Config(**config, num_experts_per_tok=K))
    peer = PeerLMHeadModel(PeerConfig(**config, num_experts_per_tok=K))
    variants = {
        "peer, static cache": (peer, {"cache_implementation": "static"}),
        "peer, dynamic cache": (peer, {}),
        "ours": (ours, {}),
        "ours, static cache": (ours, {"cache_implementation": "static"}),
    }
    cases: dict[str, Case] = {}
    short: dict[str, Case] = {}
    for name, (model, options) in variants.items():
        if args.only and name not in args.only:
            continue
        try:
            long, few = (generation(model, ids_BS, new, **options) for new in (NEW, SHORT))
            for _ in range(2):
                long()
                few()
            cases[name], short[name] = long, few
        except Exception:
            print(f"{name} left out:")
            traceback.print_exc(limit=-4)
    if args.profile:
        for name, case in cases.items():
            print(f"-- {name}: {NEW} steps and the prompt")
            profile(case, 24)
    with EnergyMonitor.for_assigned_devices() as monitor:
        if args.repetitions and cases:
            pairs = cases | {brief(name): case for name, case in short.items()}
            runs = interleave(pairs, repetitions=args.repetitions, seconds=args.seconds, monitor=monitor)
            report(runs, list(cases), args.batch)
        synchronize()


if __name__ == "__main__":
    main()
