"""Training: the Hugging Face Trainer as it is, bias balancing, and what balancing must not do to the price."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from moe import REGULARIZERS, ROUTERS, BalanceCallback, MoEGPT2Config, MoEGPT2LMHeadModel, Router, Tokens
from moe.routing import count_E

ROOT = Path(__file__).parents[2]
Build = Callable[..., MoEGPT2LMHeadModel]


class Text(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 24) -> None:
        self.ids = torch.randint(2, 97, (count, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model: nn.Module, out: Path, callbacks: list[Any] | None = None, **keys: Any) -> Trainer:
    base = {
        "output_dir": str(out), "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
        "save_strategy": "no", "per_device_train_batch_size": 8, "num_train_epochs": 1, "seed": 0, "max_grad_norm": 0.0,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "sgd", "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(**(base | keys))
    return Trainer(model=model, args=arguments, train_dataset=Text(), eval_dataset=Text(8), callbacks=callbacks)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_the_trainer_runs_unchanged(tiny: Build, tmp_path: Path, name: str) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate, which the dev extra installs")
    model = tiny(router=name, regularizers={"load_balance": 0.1}, bias_balance_rate=0.05)
    run = trainer(model, tmp_path, [BalanceCallback()], save_strategy="epoch")
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    assert all(router.count_E.sum() == 0 for router in model.routers)  # emptied after the last step
    assert any(router.bias_E.abs().max() > 0 for router in model.routers)
    loaded = MoEGPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(loaded.routers[0].bias_E, model.routers[0].bias_E)


def test_accumulation_equals_one_large_batch(tiny: Build, tmp_path: Path) -> None:
    """The Trainer sums micro-batches over num_items_in_batch; an unscaled auxiliary loss would count four times."""
    pytest.importorskip("accelerate", reason="needs accelerate, which the dev extra installs")
    states = []
    for size, accumulation in ((24, 1), (6, 4)):
        model = tiny(regularizers={"z_loss": 0.5, "token_entropy": 0.5}).double()
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer(model, tmp_path, None, **keys).train()
        states.append(dict(model.named_parameters()))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)


def test_the_callback_finds_the_model_under_its_wrappers(tiny: Build, ids: Tensor) -> None:
    model = tiny(bias_balance_rate=0.5).train()
    model(ids)
    BalanceCallback().on_optimizer_step(None, None, None, model=torch.compile(model, backend="eager"))
    assert model.routers[0].bias_E.abs().max() == 0.5
    with pytest.raises(ValueError, match="expected a MoEGPT2LMHeadModel"):
        BalanceCallback().on_optimizer_step(None, None, None, model=nn.Linear(1, 1))


def test_bias_balancing_by_hand(tiny: Build) -> None:
    model = tiny(bias_balance_rate=0.25)
    router = model.routers[0]
    router.count_E.copy_(torch.tensor([10.0, 2.0, 4.0, 0.0]))  # mean 4
    model.after_step()
    assert router.bias_E.tolist() == [-0.25, 0.25, 0.0, 0.25]
    assert router.count_E.sum() == 0


def test_counts_gather_over_micro_batches_and_not_in_evaluation(tiny: Build, ids: Tensor) -> None:
    model = tiny(bias_balance_rate=0.1, num_experts_per_tok=2).train()
    model(ids)
    model(ids)
    assert model.routers[1].count_E.sum() == 2 * 2 * ids.numel()
    model.eval()(ids)
    assert model.routers[1].count_E.sum() == 2 * 2 * ids.numel()


def test_after_step_is_a_no_op_without_balancing(tiny: Build, ids: Tensor) -> None:
    model = tiny().train()
    model(ids)
    model.after_step()
    assert all(r.count_E.sum() == 0 and r.bias_E.abs().sum() == 0 for r in model.routers)


RANK = """
import sys, torch
from moe import MoEGPT2Config, MoEGPT2LMHeadModel
rank, init, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
model = MoEGPT2LMHeadModel(
    MoEGPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=9, expert_widths=[8] * 4, bias_balance_rate=0.25)
)
counts = {0: [[10.0, 0.0, 4.0, 2.0], [8.0, 0.0, 0.0, 0.0]], 1: [[0.0, 6.0, 6.0, 4.0], [0.0, 8.0, 8.0, 8.0]]}
for router, count in zip(model.routers, counts[rank]):
    router.count_E.copy_(torch.tensor(count))
model.after_step()
torch.save([(r.bias_E, r.count_E) for r in model.routers], f"{out}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_bias_balancing_sums_counts_over_processes(tmp_path: Path) -> None:
    """[10, 6, 10, 6] and [8, 8, 8, 8] over both: each process alone would move its biases another way."""
    init = (tmp_path / "meet").as_uri()
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), init, str(tmp_path)], cwd=ROOT) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for rank in (0, 1):
        first, second = torch.load(tmp_path / f"{rank}.pt")
        assert first[0].tolist() == [-0.25, 0.25, -0.25, 0.25]
        assert second[0].tolist() == [0.0] * 4
        assert first[1].sum() == second[1].sum() == 0


# Balancing and the price

WIDTHS = [32, 32, 64, 64, 128, 128, 256, 256]


def selected_width(
    router: Router, tokens: Tokens, x_TD: Tensor, balancer: str, *, blind: bool = False, steps: int = 120
) -> float:
    """Mean neurons per choice over the dense 128, after balancing the router alone for a while.

    `blind` balances the priced choices, as a balancer would that knows nothing of the price.
    """
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    for _ in range(steps):
        routing = router(x_TD, tokens)
        if blind:
            routing = dataclasses.replace(routing, unpriced_TK=None)
        if balancer == "load_balance":
            optimizer.zero_grad()
            REGULARIZERS["load_balance"](routing).backward()
            optimizer.step()
        elif balancer == "bias":
            n_E = count_E(*routing.demand(), len(WIDTHS)).float()
            router.bias_E += 0.02 * (n_E.mean() - n_E).sign()
    return float(torch.tensor(WIDTHS)[router(x_TD, tokens).expert_TK].float().mean()) / 128


@pytest.mark.parametrize("k", [1, 2])
def test_balancing_does_not_cancel_the_price(k: int) -> None:
    """Selected width at λ = 1 with either balancer stays within 10 % of that without; a balancer that counts priced
    choices drives it back to where it was at λ = 0."""
    x_TD = torch.randn(1024, 64, generator=torch.Generator().manual_seed(1))
    tokens = Tokens(batch_size=1, position_T=torch.arange(1024))

    def width(energy_lambda: float, balancer: str, *, blind: bool = False) -> float:
        torch.manual_seed(0)
        config = MoEGPT2Config(
            n_embd=64, n_head=2, n_inner=128, expert_widths=WIDTHS, num_experts_per_tok=k, bias_balance_rate=0.01,
            energy_lambda=energy_lambda, router="energy",
        )  # fmt: skip
        router = ROUTERS["energy"](config, 0)
        with torch.no_grad():
            router.gate.weight.normal_(std=0.125)  # logits of standard deviation 1
        return selected_width(router, tokens, x_TD, balancer, blind=blind)

    free, priced = width(0.0, "none"), width(1.0, "none")
    assert priced < 0.75 * free
    for balancer in ("load_balance", "bias"):
        assert width(1.0, balancer) == pytest.approx(priced, rel=0.10)
        assert width(1.0, balancer, blind=True) > 0.9 * free
