"""What only a GPU can show of the model: no host synchronisation, determinism, compiled equal to eager, cached equal
to uncached. Prints one line per check; exit code 1 if any failed:

    python benchmarks/check_cuda.py
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic mode

import torch
from torch import Tensor

from moe import REGULARIZERS, ROUTERS, MoEGPT2Config, MoEGPT2LMHeadModel, RoutingStats
from moe.routing import Tokens

DEVICE = "cuda"
ALL = {name: 0.01 for name in REGULARIZERS if name != "entropy"}


def build(dtype: torch.dtype = torch.bfloat16, **keys: Any) -> MoEGPT2LMHeadModel:
    torch.manual_seed(0)
    base: dict[str, Any] = {
        "n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "n_positions": 256, "bos_token_id": 0,
        "eos_token_id": 999, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "initializer_range": 0.1, "expert_widths": [1024, 512, 0, 1024, 2048, 512, 1024, 1024], "energy_lambda": 0.3,
        "regularizers": ALL, "bias_balance_rate": 0.01,
    }  # fmt: skip
    return MoEGPT2LMHeadModel(MoEGPT2Config(**(base | keys))).to(DEVICE, dtype)


def text(batch: int = 8, length: int = 128) -> Tensor:
    return torch.randint(2, 999, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_host_synchronisation(router: str) -> None:
    """Forward, backward, counting, the step after, and statistics: nothing waits for the device."""
    model, ids = build(router=router).train(), text()
    mask = torch.ones_like(ids)
    stats = RoutingStats(model.config.expert_widths)
    for attempt in range(2):  # the first may build kernels
        with no_synchronisation() if attempt else torch.enable_grad():
            # transformers looks at the values of an attention_mask; padding alone is told by token_mask.
            output = model(ids, token_mask=mask, labels=ids, output_routing=True)
            output.loss.backward()
            model.after_step()
            stats.update(output.routing)
    stats.summary()


def compiled_equals_eager(router: str) -> None:
    model, ids = build(torch.float32, router=router).train(), text()
    if router in ("random", "permuted"):
        model.eval()  # in training they draw anew, and compiled code draws its own numbers
    torch._dynamo.reset()
    results = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        output = call(ids, labels=ids, skip_logits=True)
        (output.lm_loss + output.aux_loss).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((output.lm_loss.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for eager, compiled in zip(results[0][1], results[1][1], strict=True):
        error = float((eager - compiled).norm() / eager.norm().clamp_min(1e-6))
        assert error < 1e-2, f"relative gradient error {error:.1e}"


def cached_equals_uncached(router: str) -> None:
    if not ROUTERS[router].causal:
        return
    model, ids = build(torch.float32, router=router, regularizers=None).eval(), text(4, 24)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    keys: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **keys)
    for cache in (None, "static"):
        cached = model.generate(ids, attention_mask=mask, cache_implementation=cache, **keys)
        same = (cached == uncached[:, : cached.shape[1]]).float().mean()
        assert torch.equal(cached, uncached), f"{cache} cache: {float(same):.3f} of the tokens agree"


def deterministic(router: str) -> None:
    """The same seed gives the same step, bit for bit, in PyTorch's deterministic mode and with dropout: gradients, and
    the parameters and buffers after fused AdamW and what follows it."""
    steps = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model, ids = build(router=router, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train(), text()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
            torch.manual_seed(2)
            model(ids, labels=ids).loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            model.after_step()
            steps.append([*gradients, *model.parameters(), *model.buffers()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


def the_layer_repeats(router: str) -> None:
    """A MoE layer alone gives the same bits twice without the deterministic mode."""
    model, ids = build(router=router, resid_pdrop=0.1).train(), text()
    layer = model.transformer.h[0].mlp
    embeds_BSD = model.transformer.wte(ids).detach().requires_grad_()
    probe_BSD = torch.randn_like(embeds_BSD)
    position_T = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids))
    tokens = Tokens(batch_size=len(ids), position_T=position_T, id_T=ids.reshape(-1))
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        y_BSD, routing = layer(embeds_BSD, tokens)
        inputs = [embeds_BSD, *layer.parameters()]
        gradients = torch.autograd.grad(y_BSD, inputs, probe_BSD, allow_unused=True)
        runs.append([y_BSD, routing.log_probs_TE, *(g for g in gradients if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


CHECKS: list[Callable[[str], None]] = [
    no_host_synchronisation,
    deterministic,
    the_layer_repeats,
    cached_equals_uncached,
    compiled_equals_eager,
]


def main() -> int:
    failed = 0
    for check in CHECKS:
        routers = ["topk", "energy", "capacity", "topp"] if check is compiled_equals_eager else sorted(ROUTERS)
        for router in routers:
            start = time.perf_counter()
            try:
                check(router)
                outcome = "ok"
            except Exception:
                outcome, failed = "FAILED", failed + 1
                traceback.print_exc(limit=-4)
            print(f"{check.__name__:28s} {router:12s} {outcome:8s} {time.perf_counter() - start:6.1f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
