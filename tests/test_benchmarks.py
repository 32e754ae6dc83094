"""The benchmarks of the model, as far as they run without a GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import check_cuda
from moe import ROUTERS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports as the scripts see themselves: their folder is on the path."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in ("measure", "peer", "decode", "train_step", "moe_layer"):
        sys.modules.pop(name, None)


def samples(module: ModuleType, *pairs: tuple[float, float | None]) -> list[Any]:
    return [module.Sample(duration_ms=ms, energy_mj=mj) for ms, mj in pairs]


def test_a_step_is_a_difference_of_its_own_repetition(load: Any) -> None:
    measure = load("measure")
    long, short = samples(measure, (12.0, 50.0), (14.0, None)), samples(measure, (2.0, 10.0), (2.0, 8.0))
    assert measure.difference(long, short, 10) == samples(measure, (1.0, 4.0), (1.2, None))


def test_decode_prints_ranges_and_ratios_over_the_peer(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measure, decode = load("measure"), load("decode")
    steps = decode.NEW - decode.SHORT
    runs = {}
    for name, step_ms in (("peer, static cache", 2.0), ("ours", 0.5)):
        runs[name] = samples(
            measure, (steps * step_ms + 5, 5000.0 * step_ms), (steps * step_ms * 1.5 + 5, 5000.0 * step_ms)
        )
        runs[decode.brief(name)] = samples(measure, (5.0, 200.0), (5.0, 200.0))
    decode.report(runs, ["peer, static cache", "ours"], 32)
    calls, step, absolute = capsys.readouterr().out.strip().split("\n\n")
    assert "time / peer, static cache" in calls
    assert "0.250 (0.250-0.250)" in step.splitlines()[-1]
    assert absolute.splitlines()[-1].split()[1:3] == ["0.625", "(0.500-0.750)"]


def test_a_table_without_its_baseline_takes_the_first(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measure = load("measure")
    measure.print_table("title", {"ours": samples(measure, (2.0, 4.0))}, "peer")
    assert "time / ours" in capsys.readouterr().out
    measure.print_table("title", {}, "peer")


def test_a_librarys_head_computes_the_models_loss(load: Any, monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> None:
    """Given a stand-in with the calling convention of Liger's: weight, hidden states, targets."""
    train_step = load("train_step")

    class Head:
        def __call__(self, weight_VD: torch.Tensor, hidden_TD: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(hidden_TD @ weight_VD.T, target_T)

    monkeypatch.setitem(
        sys.modules, "liger_kernel.transformers", SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Head)
    )
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    ids_BS = torch.randint(90, (2, 12))
    own, library = (train_step.loss_of(tiny_model, head)(ids_BS) for head in (None, "liger"))
    torch.testing.assert_close(own, library)


@pytest.fixture
def tiny_model() -> Any:
    from moe import MoEGPT2Config, MoEGPT2LMHeadModel

    keys = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = MoEGPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=97, n_positions=32, expert_widths=[16] * 2, **keys
    )
    return MoEGPT2LMHeadModel(config).train()


@pytest.mark.parametrize("biases", [True, False])
def test_scattermoe_is_built_by_its_public_interface(load: Any, monkeypatch: pytest.MonkeyPatch, biases: bool) -> None:
    moe_layer = load("moe_layer")
    monkeypatch.setattr(moe_layer, "D", 8)
    monkeypatch.setattr(moe_layer, "FFN", 16)

    class Plain(nn.Module):
        def __init__(self, input_size: int, hidden_size: int, num_experts: int, top_k: int, activation: Any) -> None:
            super().__init__()
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(input_size, hidden_size), activation, nn.Linear(hidden_size, input_size))
                for _ in range(num_experts)
            )

        def forward(self, x_TD: Any, weight_TK: Any, expert_TK: Any) -> Any:
            all_TED = torch.stack([expert(x_TD) for expert in self.experts], dim=1)
            chosen_TKD = all_TED.gather(1, expert_TK[..., None].expand(-1, -1, x_TD.shape[1]))
            return (weight_TK[..., None] * chosen_TKD).sum(1)

    class WithBias(Plain):
        def __init__(self, *args: Any, bias: bool = False, **keys: Any) -> None:
            super().__init__(**keys)
            assert bias

    module = SimpleNamespace(MLP=WithBias if biases else Plain)
    monkeypatch.setitem(sys.modules, "scattermoe", SimpleNamespace(mlp=module))
    monkeypatch.setitem(sys.modules, "scattermoe.mlp", module)
    assert moe_layer.Scatter(2)(torch.randn(5, 8)).shape == (5, 8)


def test_unequal_widths_cost_the_uniform_layers_flops(load: Any) -> None:
    moe_layer = load("moe_layer")
    assert sum(moe_layer.UNEQUAL) == moe_layer.E * moe_layer.FFN
    torch.manual_seed(0)
    assert moe_layer.chosen_width(moe_layer.Layer(2, widths=moe_layer.UNEQUAL), 2048) == pytest.approx(3072, rel=0.05)


@pytest.mark.parametrize("check", [check_cuda.deterministic, check_cuda.the_layer_repeats], ids=lambda c: c.__name__)
@pytest.mark.parametrize("router", ["capacity", pytest.param("random", marks=pytest.mark.slow)])
def test_checks_of_a_gpu_run_on_a_cpu(check: Any, router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert router in ROUTERS
    monkeypatch.setattr(check_cuda, "DEVICE", "cpu")
    check(router)
