"""Greedy decoding through `model.generate`: ours, and transformers' grouped_mm peer with a static cache.

    python benchmarks/decode.py [--batch 32] [--profile]

DistilGPT2, 6 MoE layers of 8 experts, bf16, K 2, a 64-token prompt, 128 new tokens. The step time is the
difference of a long and a short generation over the difference of their lengths, so the prompt drops out; the whole
call over all new tokens stands beside it. Joules per token are of the whole call.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
import warnings

import torch
from measure import Case, interleave, print_table, profile, synchronize
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
            case, brief = (generation(model, ids_BS, new, **options) for new in (NEW, SHORT))
            for _ in range(2):
                case()
                brief()
            cases[name], short[name] = case, brief
        except Exception:
            print(f"{name} left out:")
            traceback.print_exc(limit=-4)
    if args.profile:
        for name, case in cases.items():
            print(f"-- {name}: {NEW} steps and the prompt")
            profile(case, 24)
    with EnergyMonitor.for_assigned_devices() as monitor:
        if args.repetitions:
            runs = interleave(cases, repetitions=args.repetitions, seconds=args.seconds, monitor=monitor)
            brief_runs = interleave(short, repetitions=args.repetitions, seconds=args.seconds / 2)
            title = f"generate, batch {args.batch}, {NEW} new tokens: ms per call, mJ per token"
            print_table(title, runs, next(iter(runs)), divide=args.batch * NEW)
            for name, samples in runs.items():
                ms = statistics.median(s.duration_ms for s in samples)
                brief_ms = statistics.median(s.duration_ms for s in brief_runs[name])
                step_ms = (ms - brief_ms) / (NEW - SHORT)
                print(f"{name:28s} {step_ms:.3f} ms a step; {ms / NEW:.3f} ms per new token, prompt included")
        synchronize()


if __name__ == "__main__":
    main()
