"""One MoE layer on one GPU, forward and backward: ours, the peers, and the dense FFN of equal FLOPs.

    python benchmarks/moe_layer.py                     # the comparison, time and joules
    python benchmarks/moe_layer.py --check --sweep     # kernels against the float64 loop, then block sizes

A layer is everything a block's FFN does: router logits, softmax, top-k, mixing weights, dispatch, experts, combine.
D 768, FFN 3072 (SwiGLU peers: 2048, equal FLOPs), 8 experts, 16 384 tokens, bf16. A second table holds unequal widths
against the uniform layer of equal FLOPs.

ScatterMoE (https://github.com/shawntan/scattermoe) takes part where `scattermoe` can be imported, as with its checkout
on PYTHONPATH. It counts tokens with `bincount`, which waits for the device, so that no graph can hold it: it is
launched by the host, as all are with `--host`, which is how to compare with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import traceback

import torch
import torch.nn.functional as F
from measure import Case, calls_in, interleave, print_table, profile, synchronize
from torch import nn

from hwcost import EnergyMonitor
from moe import MoEGPT2Config
from moe.blocks import MoEMLP
from moe.dispatch import Weights, loop
from moe.routing import Tokens

T, D, FFN, E = 16384, 768, 3072, 8
UNEQUAL = [1536, 1536, 3072, 3072, 3072, 6144, 6144, 0]  # on average FFN: equal FLOPs where choices are spread evenly
UNIFORM_NAME, UNEQUAL_NAME, SCATTER_NAME = "ours", "ours, widths 1/2 1 2 null", "ScatterMoE, launched"


class Dense(nn.Module):
    """GPT-2's FFN, K times as wide: the FLOPs of K experts per token."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, k * FFN), nn.Linear(k * FFN, D)

    def forward(self, x_TD):
        return self.down(F.gelu(self.up(x_TD), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, k: int, *, dispatch: str = "auto", widths: list[int] | None = None) -> None:
        super().__init__()
        self.widths = widths or [FFN] * E
        config = MoEGPT2Config(
            n_embd=D, num_experts_per_tok=k, dispatch=dispatch, resid_pdrop=0.0, expert_widths=self.widths
        )
        self.mlp = MoEMLP(config, 0)
        for name, parameter in self.mlp.named_parameters():
            nn.init.normal_(parameter, std=0.02 if "bias" not in name else 0.01)

    def forward(self, x_TD):
        return self.mlp(x_TD[None], self._tokens(x_TD))[0].squeeze(0)

    def routing(self, x_TD):
        return self.mlp.router(x_TD, self._tokens(x_TD))

    def _tokens(self, x_TD):
        return Tokens(batch_size=16, position_T=torch.arange(x_TD.shape[0], device=x_TD.device))


def mixtral(k: int) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D, intermediate_size=2048, num_local_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return nn.Sequential(_Batch(block))


class _Batch(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_TD):
        y = self.block(x_TD[None])
        return (y[0] if isinstance(y, tuple) else y).squeeze(0)


class Scatter(nn.Module):
    """ScatterMoE's experts behind Mixtral's routing: GELU, biases where its version has them."""

    def __init__(self, k: int) -> None:
        from scattermoe.mlp import MLP

        super().__init__()
        self.k = k
        self.weight_ED = nn.Parameter(torch.empty(E, D).normal_(std=0.02))
        bias = {"bias": True} if "bias" in inspect.signature(MLP).parameters else {}
        activation = nn.GELU(approximate="tanh")
        self.experts = MLP(input_size=D, hidden_size=FFN, num_experts=E, top_k=k, activation=activation, **bias)

    def forward(self, x_TD):
        probs_TE = F.softmax(F.linear(x_TD, self.weight_ED).float(), dim=-1)
        weight_TK, expert_TK = probs_TE.topk(self.k, dim=-1)
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return self.experts(x_TD, weight_TK.to(x_TD.dtype), expert_TK)


def captured(case: Case) -> Case:
    """The same work as replays of a CUDA graph: device time, whatever the host's launches cost."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            case()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case()

    def replay(keep: Case = case) -> None:  # the graph reads the case's tensors: they must outlive it
        graph.replay()

    return replay


def step(layer: nn.Module, *, compiled: bool) -> Case:
    layer = layer.to("cuda", torch.bfloat16).train()
    parameters = list(layer.parameters())
    x_TD = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy_TD = torch.randn_like(x_TD)
    run = torch.compile(layer, fullgraph=True) if compiled else layer

    def case() -> None:
        torch.autograd.grad(run(x_TD), [x_TD, *parameters], dy_TD, allow_unused=True)

    return case


@torch.no_grad()
def chosen_width(layer: Layer, tokens: int = T) -> float:
    """Neurons that a choice meets on average, on tokens like those that are timed."""
    weight = next(layer.parameters())
    x_TD = torch.randn(tokens, D, device=weight.device, dtype=weight.dtype)
    expert_TK = layer.routing(x_TD).expert_TK
    return torch.tensor(layer.widths, dtype=torch.float32, device=weight.device)[expert_TK].mean().item()


def unequal(k: int) -> Case:
    layer = Layer(k, widths=UNEQUAL)
    case = step(layer, compiled=True)
    print(f"{UNEQUAL_NAME}, K={k}: {chosen_width(layer) / FFN:.3f} x the FLOPs of the uniform layer's experts")
    return case


def compare(k: int, args: argparse.Namespace, monitor: EnergyMonitor) -> None:
    torch._dynamo.reset()  # all layers share their code, and 8 compilations of one function are dynamo's limit
    builders = {
        "dense": lambda: step(Dense(k), compiled=False),
        "dense, compiled": lambda: step(Dense(k), compiled=True),
        UNIFORM_NAME: lambda: step(Layer(k), compiled=True),
        "ours, eager": lambda: step(Layer(k), compiled=False),
        "sort + grouped_mm, compiled": lambda: step(Layer(k, dispatch="grouped_mm"), compiled=True),
        "Mixtral block, compiled": lambda: step(mixtral(k), compiled=True),
        UNEQUAL_NAME: lambda: unequal(k),
        SCATTER_NAME: lambda: step(Scatter(k), compiled=False),
    }
    if importlib.util.find_spec("scattermoe") is None:
        print("ScatterMoE is not measured: there is no package `scattermoe` here")
        del builders[SCATTER_NAME]
    cases: dict[str, Case] = {}
    for name in [name for name in args.only or builders if name in builders]:
        try:
            case = builders[name]()
            for _ in range(3):
                case()
            cases[name] = case if args.host or name == SCATTER_NAME else captured(case)
            cases[name]()
            if args.profile:
                print(f"-- {name}, K={k}")
                profile(cases[name], 24)
        except Exception:
            cases.pop(name, None)
            print(f"{name} left out:")
            traceback.print_exc(limit=-3)
    samples = interleave(cases, repetitions=args.repetitions, seconds=args.seconds, monitor=monitor)
    how = "launched by the host" if args.host else "replayed CUDA graphs"
    print_table(f"layer forward + backward, K={k}, {T} tokens, E {E}, bf16, {how}", samples, "dense")
    widths = {name: samples[name] for name in (UNIFORM_NAME, UNEQUAL_NAME) if name in samples}
    if len(widths) == 2:
        print_table(f"unequal widths over the uniform layer of equal FLOPs, K={k}", widths, UNIFORM_NAME)


# Correctness


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check_case(name: str, tokens: int, k: int, widths: list[int], dtype: torch.dtype, drop: float = 0.0) -> bool:
    """Errors of y and all gradients against the float64 loop on the same (rounded) inputs; buffers poisoned first."""
    from moe import fused

    N, P = len(widths), sum(widths)
    make = lambda *shape: (torch.randn(*shape, device="cuda") * 0.3).to(dtype).requires_grad_()
    weights = Weights(make(P, D), make(P), make(P, D), make(N, D))
    x_TD, weight_TK = make(tokens, D), torch.rand(tokens, k, device="cuda", requires_grad=True)
    slot_TK = torch.rand(tokens, N, device="cuda").argsort(1)[:, :k]
    if drop >= 1.0:
        slot_TK = torch.arange(k, device="cuda").expand(tokens, k).contiguous()  # all to one expert
    slot_TK = torch.where(torch.rand(tokens, k, device="cuda") < drop % 1.0, -1, slot_TK)
    dy_TD = torch.randn(tokens, D, device="cuda").to(dtype)
    inputs = [x_TD, weight_TK, *weights[:4]]
    wide = [i.detach().double().requires_grad_() for i in inputs]
    y64 = loop(wide[0], slot_TK, wide[1], Weights(*wide[2:]), widths)
    g64 = torch.autograd.grad(y64, wide, dy_TD.double())
    poison = torch.full((2**28,), float("nan"), device="cuda", dtype=torch.bfloat16)
    del poison
    y = fused.fused_experts(x_TD, slot_TK, weight_TK, *weights[:4], widths)[0]
    grads = torch.autograd.grad(y, inputs, dy_TD)
    errors = [error(a, b) for a, b in zip([y, *grads], [y64, *g64], strict=True)]
    if tokens <= fused.MAX_TOKENS:
        with torch.no_grad():
            errors.append(error(fused.decode_experts(x_TD, slot_TK, weight_TK, *weights[:4], widths), y64))
    again = fused.fused_experts(x_TD, slot_TK, weight_TK, *weights[:4], widths)[0]
    same = torch.equal(y, again) and all(
        torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(again, inputs, dy_TD), strict=True)
    )
    limit = 2e-5 if dtype == torch.float32 else 1.5e-2
    good = same and max(errors) < limit
    print(f"{'ok  ' if good else 'BAD '} {name:28s} same={same} " + " ".join(f"{e:.1e}" for e in errors), flush=True)
    return good


def check() -> bool:
    cases = [
        ("decode 32", 32, 2, [FFN] * 8, torch.bfloat16, 0.0),
        ("decode 7 dropped", 7, 2, [FFN] * 8, torch.bfloat16, 0.5),
        ("decode 128", 128, 2, [FFN] * 8, torch.bfloat16, 0.1),
        ("decode fp32", 5, 2, [256] * 4, torch.float32, 0.0),
        ("train K2", 2048, 2, [FFN] * 8, torch.bfloat16, 0.0),
        ("train K1 dropped", 3001, 1, [FFN] * 8, torch.bfloat16, 0.3),
        ("all to one", 1000, 1, [FFN] * 4, torch.bfloat16, 1.0),
        ("widths", 1500, 2, [1536, 3072, 6144, 192], torch.bfloat16, 0.1),
        ("fp32", 500, 2, [256, 512, 64], torch.float32, 0.1),
        ("K=E", 300, 4, [384] * 4, torch.bfloat16, 0.0),
        ("E=1", 333, 1, [FFN], torch.bfloat16, 0.0),
        ("many experts", 2000, 4, [256] * 64, torch.bfloat16, 0.0),
    ]
    good = True
    for case in cases:
        try:
            good &= check_case(*case)
        except Exception:
            good = False
            print(f"BAD  {case[0]}")
            traceback.print_exc(limit=-4)
    return good


# Block sizes


def timed(case: Case, seconds: float = 0.06) -> float:
    """Milliseconds per call."""
    count = calls_in(case, seconds)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        case()
    end.record()
    synchronize()
    return start.elapsed_time(end) / count


def sweep(k: int) -> None:
    from moe import fused
    from moe.fused import Tiles

    widths = [FFN] * E
    weights = [torch.randn(E * FFN, D, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(2)]
    bias_P, bias_ND = (torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in (E * FFN, E * D))
    x_TD, dy_TD = (torch.randn(T, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    # Loads as a router makes them: not all equal, so that the number of tiles is no round one.
    skew_E = 0.3 * torch.randn(E, device="cuda")
    slot_TK = (torch.randn(T, E, device="cuda") + skew_E).topk(k, dim=1).indices.contiguous()
    weight_TK = torch.rand(T, k, device="cuda")
    plan = fused.schedule(slot_TK, E)
    x_RD = fused.gather(x_TD, plan, k)
    pre_RW, hidden_RW, _ = fused.to_neurons(x_RD, weights[0], bias_P, plan, widths, None)
    out_RD = fused.to_rows(hidden_RW, weights[1], bias_ND.view(E, D), plan, widths)
    dout_RD, _, partial_GD = fused.spread(dy_TD, out_RD, weight_TK, plan)
    _, _dpre_RW, partial_MW = fused.to_neurons(dout_RD, weights[1], bias_P, plan, widths, pre_RW)
    kernels = {
        "up": lambda: fused.to_neurons(x_RD, weights[0], bias_P, plan, widths, None),
        "up_backward": lambda: fused.to_neurons(dout_RD, weights[1], bias_P, plan, widths, pre_RW),
        "down": lambda: fused.to_rows(hidden_RW, weights[1], bias_ND, plan, widths),
        "weight": lambda: fused.weight_gradient(hidden_RW, dout_RD, plan, widths),
    }
    small = {
        "schedule": lambda: fused.schedule(slot_TK, E),
        "gather": lambda: fused.gather(x_TD, plan, k),
        "combine": lambda: fused.combine(out_RD, plan, weight_TK, (T, k)),
        "spread": lambda: fused.spread(dy_TD, out_RD, weight_TK, plan),
        "bias up": lambda: fused.bias_gradient(partial_MW, plan, widths, True),
        "bias down": lambda: fused.bias_gradient(partial_GD, plan, widths, False),
    }
    flops = 2 * T * k * D * FFN
    dense = [torch.randn(T * k, D, device="cuda", dtype=torch.bfloat16), weights[0][:FFN]]
    hidden = torch.randn(T * k, FFN, device="cuda", dtype=torch.bfloat16)
    floors = {
        "cublas x·up": lambda: dense[0] @ dense[1].T,
        "cublas h·down": lambda: hidden @ dense[1],
        "cublas hT·dy": lambda: hidden.T @ dense[0],
    }
    for name, case in floors.items():
        ms = timed(case)
        print(f"K={k} {name:24s} {ms:7.4f} ms {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)
    for name, case in small.items():
        print(f"K={k} {name:24s} {timed(case):7.4f} ms (host bound below about 0.02)", flush=True)
    options = [Tiles(128, 128, 64, 4, n) for n in (2, 3, 4)] + [Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3)]
    options += [
        Tiles(128, 256, 32, 8, 4),
        Tiles(128, 256, 64, 8, 2),
        Tiles(64, 256, 64, 4, 3),
        Tiles(64, 256, 64, 4, 4),
    ]
    options += [Tiles(128, 128, 64, 4, 3, 16), Tiles(128, 256, 64, 8, 3, 16), Tiles(128, 256, 64, 8, 3, 4)]
    options += [Tiles(64, 128, 64, 4, 4), Tiles(128, 64, 64, 4, 4), Tiles(128, 128, 32, 4, 4)]
    for name, case in kernels.items():
        found = []
        extra = [Tiles(256, 128, 64, 8, 3), Tiles(256, 128, 64, 8, 4)] if name == "weight" else []
        for tiles in options + extra:
            before = fused.TILES[name]
            try:
                fused.TILES[name] = tiles
                case()
                found.append((timed(case, 0.04), tiles))
            except Exception as problem:
                print(f"K={k} {name} {tuple(tiles)} failed: {str(problem)[:100]}")
            finally:
                fused.TILES[name] = before
        found.sort(key=lambda pair: pair[0])
        for ms, tiles in found[:6]:
            print(f"K={k} {name:12s} {tuple(tiles)!s:28s} {ms:7.4f} ms {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)
        if found:
            fused.TILES[name] = found[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the kernels with the float64 loop")
    parser.add_argument("--sweep", action="store_true", help="time block sizes and use the best ones below")
    parser.add_argument("--k", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one window")
    parser.add_argument("--host", action="store_true", help="launch from the host instead of replaying CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="kernel times of each case")
    parser.add_argument("--only", nargs="*", help="names of the cases, the baseline `dense` first")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    if args.check:
        print("all correct" if check() else "NOT CORRECT", flush=True)
    if args.sweep:
        for k in args.k:
            sweep(k)
    if args.repetitions:
        with EnergyMonitor.for_assigned_devices() as monitor:
            print("energy source:", monitor.source)
            for k in args.k:
                compare(k, args, monitor)


if __name__ == "__main__":
    main()
