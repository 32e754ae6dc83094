"""Test-time training: what it may change, what stops it, and that it gives everything back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe import BudgetController, EnergyAwareTTTRouter, Gains, HardwareFeedback, MoEGPT2LMHeadModel, TTTSettings
from moe.trust import kl_L

Build = Callable[..., MoEGPT2LMHeadModel]
GOOD = HardwareFeedback(energy_j=100.0, tokens=1000, duration_s=1.2)
GAINS = Gains(integral=0.5, proportional=0.2, memory=0.5, lambda_max=3.0)
KEYS: dict[str, Any] = {"router": "energy", "expert_widths": [64, 32, 16, 0], "energy_lambda": 0.2}


def text(batch: int, length: int, seed: int) -> Tensor:
    """Text with something to learn: every second token repeats the one before."""
    ids_BS = torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids_BS[:, 1::2] = ids_BS[:, ::2]
    return ids_BS


def adapting(tiny: Build, *, budget: float | None = None, **settings: Any) -> EnergyAwareTTTRouter:
    controller = None if budget is None else BudgetController(budget, GAINS, start=0.2)
    return EnergyAwareTTTRouter(
        tiny(**KEYS), canary_BS=text(4, 32, 99), controller=controller, settings=TTTSettings(**settings)
    )


def weights(ttt: EnergyAwareTTTRouter) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in ttt.model.state_dict().items() if "offset_E" not in n}


@torch.no_grad()
def routed(ttt: EnergyAwareTTTRouter, ids_BS: Tensor) -> list[Tensor]:
    return [routing.logits_TE for routing in ttt.model(ids_BS, output_routing=True).routing]


@torch.no_grad()
def canary_loss(ttt: EnergyAwareTTTRouter) -> float:
    return float(ttt.model(ttt.canary_BS, labels=ttt.canary_BS).lm_loss)


def test_an_update_changes_the_biases_and_nothing_else(tiny: Build) -> None:
    ttt = adapting(tiny)
    before, config = weights(ttt), ttt.model.config.to_dict()
    ttt.predict(text(4, 32, 0))
    report = ttt.ttt_update(update=True)
    assert report.updated
    assert ttt.offsets().abs().max() > 0
    assert all(torch.equal(value, before[name]) for name, value in weights(ttt).items())
    assert ttt.model.config.to_dict() == config
    assert all(p.grad is None for p in ttt.model.parameters())


def test_learning_lowers_the_loss_of_a_shifted_text(tiny: Build) -> None:
    ttt = adapting(
        tiny, keep_first=False, learning_rate=0.5, kl_weight=0.0, kl_step=0.01, kl_total=10.0, canary_margin=9.0
    )
    chunk_BS = text(16, 32, 5)
    first = float(ttt.predict(chunk_BS))
    for _ in range(60):
        ttt.predict(chunk_BS)
        ttt.ttt_update(update=True)
    assert float(ttt.predict(chunk_BS)) < first - 0.003


def test_it_is_causal_a_chunk_is_predicted_before_anything_learns_from_it(tiny: Build) -> None:
    """The loss of a chunk is that of the router before it, whatever the chunk says; and an update without a new chunk
    does nothing."""
    losses = []
    for last in (7, 8):
        ttt = adapting(tiny)
        ttt.predict(text(4, 32, 0))
        ttt.ttt_update(update=True)
        ttt.predict(text(4, 32, last))
        losses.append(ttt.offsets())
        ttt.ttt_update(update=True)
        assert not torch.equal(ttt.offsets(), losses[-1])
        assert not ttt.ttt_update(update=True).updated
    assert torch.equal(*losses)


@pytest.mark.parametrize("rate", [0.05, 1.0, 1000.0])
def test_the_kl_cap_is_never_exceeded(tiny: Build, rate: float) -> None:
    ttt = adapting(tiny, learning_rate=rate, kl_step=1e-3, kl_total=4e-3, canary_margin=math.inf, kl_weight=0.0)
    for step in range(15):
        chunk_BS = text(4, 32, step)
        ttt.predict(chunk_BS)
        with torch.no_grad():
            output = ttt.model(chunk_BS, output_routing=True)
        logits, before_LE = [r.logits_TE for r in output.routing], ttt.offsets()
        report = ttt.ttt_update(update=True)
        after_LE = ttt.offsets()
        assert report.kl <= 1e-3
        assert kl_L(after_LE - before_LE, logits, 1.0).max() <= 1e-3 * 1.001
        trained = [z - b for z, b in zip(logits, before_LE, strict=True)]
        assert kl_L(after_LE, trained, 1.0).max() <= 4e-3 * 1.001


def test_a_retreat_after_a_change_of_text_takes_steps_within_the_cap_too(tiny: Build) -> None:
    """Biases just within the total cap on one text lie far outside it on another: they come back little by little."""
    ttt = adapting(tiny, kl_step=1e-3, kl_total=0.05, canary_margin=math.inf)
    one_BS, other_BS = torch.full((4, 32), 60), text(4, 32, 1)
    bias_LE = torch.tensor([0.0, 0.0, -9.0, 0.0]).expand(2, 4)
    one = routed(ttt, one_BS)
    ttt.apply(ttt._capped(bias_LE, one, 0.0499, 1.0)[0] * bias_LE)
    totals = []
    for _ in range(30):
        before_LE = ttt.offsets()
        ttt.predict(other_BS)
        logits = routed(ttt, other_BS)
        totals.append(float(kl_L(before_LE, [z - b for z, b in zip(logits, before_LE, strict=True)], 1.0).max()))
        report = ttt.ttt_update(update=True)
        assert report.kl <= 1e-3
        assert kl_L(ttt.offsets() - before_LE, logits, 1.0).max() <= 1e-3 * 1.001
    assert totals[0] > 0.1
    assert totals[1] > 0.051
    assert totals[-1] <= 0.05 * 1.01


def test_each_token_keeps_the_expert_that_the_trained_router_likes_best(tiny: Build) -> None:
    ttt = adapting(tiny)
    chunk_BS = text(4, 32, 0)
    with torch.no_grad():
        trained = ttt.model(chunk_BS, output_routing=True).routing[0]
        for router in ttt.routers:
            router.offset_E.copy_(torch.tensor([-50.0, 50.0, 50.0, -50.0]))
        adapted = ttt.model(chunk_BS, output_routing=True).routing[0]
    first_T1 = trained.expert_TK[:, :1]
    assert (adapted.expert_TK == first_T1).any(dim=1).all()
    assert not torch.equal(adapted.expert_TK.sort().values, trained.expert_TK.sort().values)
    assert (adapted.expert_TK[:, 0] != adapted.expert_TK[:, 1]).all()


@pytest.mark.parametrize(
    "change",
    [{"energy_j": None}, {"energy_j": math.nan}, {"energy_j": -5.0}, {"energy_j": math.inf}, {"age_s": 60.0},
     {"age_s": math.nan}, {"duration_s": 0.0}, {"tokens": 0}],
)  # fmt: skip
def test_bad_telemetry_gives_the_trained_router_and_leaves_lambda(tiny: Build, change: dict[str, Any]) -> None:
    ttt = adapting(tiny, budget=0.09)
    ttt.predict(text(4, 32, 0))
    ttt.ttt_update(GOOD, update=True)
    learnt_LE, energy_lambda = ttt.offsets(), ttt.model.config.energy_lambda
    assert learnt_LE.abs().max() > 0
    for _ in range(3):
        ttt.predict(text(4, 32, 1))
        report = ttt.ttt_update(dataclasses.replace(GOOD, **change), update=True)
        assert report.events[0].startswith("telemetry")
        assert not report.updated
        assert torch.equal(ttt.offsets(), torch.zeros_like(learnt_LE))
        assert ttt.model.config.energy_lambda == energy_lambda
    assert "telemetry back" in ttt.ttt_update(GOOD, update=False).events
    assert torch.equal(ttt.offsets(), learnt_LE)
    assert ttt.model.config.energy_lambda != energy_lambda


def test_feedback_is_gathered_until_the_window_is_long_enough(tiny: Build) -> None:
    ttt = adapting(tiny, budget=0.1)
    part = HardwareFeedback(energy_j=30.0, tokens=250, duration_s=0.3)
    reports = [ttt.ttt_update(part, update=False) for _ in range(4)]
    assert [r.j_per_token for r in reports] == [None, None, None, pytest.approx(0.12)]
    assert reports[3].energy_lambda > reports[2].energy_lambda == pytest.approx(0.2)


def test_drop_outs_in_between_do_not_stop_the_controller(tiny: Build) -> None:
    """A plant whose joules follow λ through telemetry of which a third is lost."""
    ttt, energies = adapting(tiny, budget=0.8), []
    for window in range(90):
        energy = 0.6 + 0.4 * math.exp(-1.2 * ttt.model.config.energy_lambda)
        energies.append(energy)
        lost = window % 3 == 1
        ttt.ttt_update(
            HardwareFeedback(energy_j=None if lost else 1000 * energy, tokens=1000, duration_s=1.1), update=False
        )
    assert sum(energies[-30:]) / 30 == pytest.approx(0.8, rel=0.01)


def test_poisoned_text_is_reverted_by_the_canary(tiny: Build) -> None:
    """Text that drags the biases to where held-out text suffers; the router that was trained comes back."""
    ttt = adapting(
        tiny, learning_rate=5.0, kl_step=1.0, kl_total=50.0, kl_weight=0.0, canary_margin=1e-3, keep_first=False
    )
    poison_BS, events = torch.full((8, 32), 13), list[str]()
    poison_BS[:, ::3] = 14
    for _ in range(40):
        ttt.predict(poison_BS)
        report = ttt.ttt_update(update=True)
        events += report.events
        if "canary revert" in report.events:
            assert report.canary_delta is not None
            assert report.canary_delta > 1e-3
            assert torch.equal(ttt.offsets(), torch.zeros_like(ttt.offsets()))
        else:
            assert report.canary_delta is None or report.canary_delta <= 1e-3
    assert "canary revert" in events


@pytest.mark.parametrize(
    ("pattern", "guard"), [([17, 17, 17], "canary revert"), ([14, 13, 13], "total KL cap")], ids=["canary", "cap"]
)
def test_poisoned_text_stays_within_the_default_bounds(tiny: Build, pattern: list[int], guard: str) -> None:
    """The trust region and the canary's loss, measured here and not as reported, after every update."""
    ttt, bounds = adapting(tiny), TTTSettings()
    poison_BS, events = torch.tensor(pattern).repeat(8, 11)[:, :32], list[str]()
    clean = canary_loss(ttt)
    for _ in range(30):
        ttt.predict(poison_BS)
        before_LE, logits = ttt.offsets(), routed(ttt, poison_BS)
        report = ttt.ttt_update(update=True)
        events += report.events
        after_LE = ttt.offsets()
        assert report.canary_delta is not None
        if "canary revert" in report.events:
            assert torch.equal(after_LE, torch.zeros_like(after_LE))
        else:
            assert kl_L(after_LE - before_LE, logits, 1.0).max() <= bounds.kl_step * 1.001
        trained = [z - b for z, b in zip(logits, before_LE, strict=True)]
        assert kl_L(after_LE, trained, 1.0).max() <= bounds.kl_total * 1.001
        assert canary_loss(ttt) - clean <= bounds.canary_margin
    assert guard in events


def test_reset_and_restore_are_exact(tiny: Build) -> None:
    ttt = adapting(tiny, budget=0.09)
    clean = {name: value.clone() for name, value in ttt.model.state_dict().items()}
    for step in range(3):
        ttt.predict(text(4, 32, step))
        ttt.ttt_update(GOOD, update=True)
    state, learnt = ttt.state(), ttt.offsets()
    follow = []
    for _ in range(2):  # two requests from one state run alike to the last bit
        ttt.restore(state)
        assert torch.equal(ttt.offsets(), learnt)
        losses = []
        for step in range(3):
            losses.append(ttt.predict(text(4, 32, 10 + step)).item())
            losses.append(ttt.ttt_update(GOOD, update=True).energy_lambda)
        follow.append(losses)
    assert follow[0] == follow[1]
    ttt.reset()
    after = ttt.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in clean.items())


def test_closed_it_leaves_the_model_as_it_was_found(tiny: Build) -> None:
    model = tiny(**KEYS).train()
    model.routers[0].offset_E.fill_(0.25)
    model.routers[1].keep_first = True
    clean = {name: value.clone() for name, value in model.state_dict().items()}
    controller = BudgetController(0.09, GAINS, start=0.7)
    with EnergyAwareTTTRouter(model, canary_BS=text(4, 32, 99), controller=controller) as ttt:
        ttt.predict(text(4, 32, 0))
        ttt.ttt_update(GOOD, update=True)
        ttt.reset()
        assert all(router.keep_first for router in model.routers)
    assert all(torch.equal(value, clean[name]) for name, value in model.state_dict().items())
    assert [router.keep_first for router in model.routers] == [False, True]
    assert model.config.energy_lambda == KEYS["energy_lambda"]
    assert model.training
    model.routers[0].keep_first = True
    ttt.close()  # once is enough
    assert model.routers[0].keep_first


def test_a_refused_router_is_left_alone(tiny: Build) -> None:
    model = tiny(router="topk").train()
    with pytest.raises(ValueError, match="keep_first"):
        EnergyAwareTTTRouter(model, canary_BS=text(2, 16, 0))
    assert model.training
    assert not any(router.keep_first for router in model.routers)


def test_a_loss_stays_what_it_was_where_the_forward_writes_into_one_tensor(tiny: Build) -> None:
    """As a forward does that replays a CUDA graph."""
    model = tiny(**KEYS)
    kept = torch.zeros(())

    def captured(**kwargs: Any) -> Any:
        output = model(**kwargs)
        kept.copy_(output.lm_loss)
        output.lm_loss = kept
        return output

    ttt = EnergyAwareTTTRouter(model, canary_BS=text(2, 16, 0), forward=captured)
    first, second = ttt.predict(text(2, 16, 1)), ttt.predict(text(2, 16, 2))
    assert first != second
    assert second == kept


def test_two_requests_from_one_state_update_at_the_same_chunk(tiny: Build) -> None:
    ttt = adapting(tiny, update_share=0.5)
    ttt.note_cost(3.0)  # every 6 chunks
    for step in range(2):
        ttt.predict(text(2, 16, step))
    state, follow = ttt.state(), []
    for _ in range(2):
        ttt.restore(state)
        follow.append([(ttt.predict(text(2, 16, step)).item(), ttt.ttt_update().updated) for step in range(9)])
        ttt.note_cost(0.5)  # measured by one request: not the next one's
    assert follow[0] == follow[1]
    assert [updated for _, updated in follow[0]].index(True) == 3
    ttt.reset()
    assert ttt.state().chunks == 0


def test_a_state_taken_while_suspended_gives_the_learnt_biases_back(tiny: Build) -> None:
    ttt = adapting(tiny, budget=0.09)
    ttt.predict(text(2, 16, 0))
    ttt.ttt_update(update=True)
    learnt_LE = ttt.offsets()
    ttt.ttt_update(dataclasses.replace(GOOD, energy_j=None))
    state = ttt.state()
    ttt.reset()
    ttt.restore(state)
    assert ttt.suspended
    assert ttt.offsets().abs().max() == 0
    assert "telemetry back" in ttt.ttt_update(dataclasses.replace(GOOD, duration_s=0.4), update=False).events
    assert torch.equal(ttt.offsets(), learnt_LE)
    state = ttt.state()  # within a window
    ttt.reset()
    ttt.restore(state)
    assert ttt.state().pending == (100.0, 1000, 0.4)


def test_updates_stay_within_their_share(tiny: Build) -> None:
    ttt = adapting(tiny)
    assert ttt.update_every == 250  # (3 + 2) chunks' worth, at 2 %
    ttt.note_cost(1.5)
    assert ttt.update_every == 75
    updates = 0
    for step in range(160):
        ttt.predict(text(1, 8, step))
        updates += ttt.ttt_update().updated
    assert updates == 2


def test_a_budget_needs_a_router_on_which_lambda_acts(tiny: Build) -> None:
    with pytest.raises(ValueError, match="router"):
        EnergyAwareTTTRouter(tiny(router="topk"), canary_BS=text(2, 16, 0), controller=BudgetController(1.0, GAINS))


def test_keep_first_is_refused_where_the_router_does_not_honour_it(tiny: Build) -> None:
    model = tiny(router="topk")
    with pytest.raises(ValueError, match=r"keep_first.*topk"):
        EnergyAwareTTTRouter(model, canary_BS=text(2, 16, 0))
    EnergyAwareTTTRouter(model, canary_BS=text(2, 16, 0), settings=TTTSettings(keep_first=False))


@pytest.mark.parametrize("name", ["opening", "piggyback"])
def test_keep_first_is_off_with_a_warning_for_routers_that_adapt_all_the_same(
    tiny: Build, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    ttt = EnergyAwareTTTRouter(tiny(**(KEYS | {"router": name})), canary_BS=text(2, 16, 0))
    assert f"router {name} does not honour keep_first" in caplog.text
    assert not ttt.settings.keep_first
    assert not any(router.keep_first for router in ttt.routers)


def test_gradients_that_are_not_finite_change_nothing(tiny: Build) -> None:
    ttt = adapting(tiny)
    ttt.model.transformer.ln_f.weight.data.fill_(math.nan)
    ttt.predict(text(2, 16, 0))
    report = ttt.ttt_update(update=True)
    assert report.events == ("gradient not finite",)
    assert torch.equal(ttt.offsets(), torch.zeros_like(ttt.offsets()))


@pytest.mark.slow
def test_10000_chunks_of_stationary_text_do_not_drift(tiny: Build) -> None:
    ttt = EnergyAwareTTTRouter(tiny(**(KEYS | {"n_layer": 1})), canary_BS=text(16, 32, 99))
    held_out = text(64, 32, 12345)
    frozen = float(ttt.predict(held_out))
    reports = []
    for chunk in range(10_000):
        ttt.predict(text(1, 16, chunk))
        reports.append(ttt.ttt_update())
    assert sum(report.updated for report in reports) == 40
    assert abs(float(ttt.predict(held_out)) - frozen) < 0.005


def test_many_updates_on_stationary_text_do_not_drift(tiny: Build) -> None:
    """As many updates as 10 000 chunks bring, and four times as many."""
    ttt = adapting(tiny)
    held_out = text(64, 32, 12345)
    frozen = float(ttt.predict(held_out))
    for chunk in range(160):
        ttt.predict(text(2, 16, chunk))
        ttt.ttt_update(update=True)
    assert float(ttt.predict(held_out)) - frozen < 0.005


# What an update costs


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for its device: numbers asked for one by one, or as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Forwards:
    """The model's forward, and how many tokens each call saw; the host's waits inside it are not counted."""

    def __init__(self, ttt: EnergyAwareTTTRouter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: dict[str, list[int]] = {"predicting": [], "learning": [], "canary": []}
        self.lists, inside, plain, tolist = 0, ttt.model.forward, ttt.model, Tensor.tolist

        def counted(name: str) -> Callable[..., Any]:
            def forward(**kwargs: Any) -> Any:
                self.tokens[name].append(kwargs["input_ids"].numel())
                return inside(**kwargs)

            return forward

        def listed(tensor: Tensor) -> Any:
            self.lists += 1
            return tolist(tensor)

        monkeypatch.setattr(ttt, "_forward", counted("predicting"))
        monkeypatch.setattr(ttt, "_canary_forward", counted("canary"))
        monkeypatch.setattr(plain, "forward", counted("learning"))  # by functional_call
        monkeypatch.setattr(Tensor, "tolist", listed)


def test_an_update_learns_from_a_part_of_the_chunk_and_every_sequence_gets_its_turn(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    ttt, seen = adapting(tiny, learn_tokens=100), list[Tensor]()
    gradient = ttt._gradient

    def watched(ids_BS: Tensor, *args: Any) -> Any:
        seen.append(ids_BS)
        return gradient(ids_BS, *args)

    monkeypatch.setattr(ttt, "_gradient", watched)
    chunk_BS = text(8, 32, 0)
    for _ in range(8):
        ttt.predict(chunk_BS)
        ttt.ttt_update(update=True)
    assert {part.shape for part in seen} == {(3, 32)}
    rows = [chunk_BS.eq(row).all(dim=1).int().argmax().item() for part in seen for row in part]
    assert rows == [i % 8 for i in range(24)]
    ttt = adapting(tiny, learn_tokens=10)  # at least one
    ttt.predict(chunk_BS)
    assert ttt._part(chunk_BS).shape == (1, 32)


def test_an_update_costs_one_small_backward_and_the_canary_once_or_twice(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    ttt = adapting(tiny, learn_tokens=64)
    forwards = Forwards(ttt, monkeypatch)
    for step, energy_lambda in enumerate((0.2, 0.2, 0.2, 0.5)):
        ttt.model.set_energy_lambda(energy_lambda)
        ttt.predict(text(16, 32, step))
        assert ttt.ttt_update(update=True).updated
    assert forwards.tokens["predicting"] == [512] * 4
    assert forwards.tokens["learning"] == [64] * 4
    assert forwards.tokens["canary"] == [128] * (2 + 1 + 1 + 2)  # the trained router's loss is known at the same λ
    ttt.model.set_prices(torch.tensor([1.0, 0.5, 0.3, 0.0]), torch.ones(4))
    ttt.predict(text(16, 32, 9))
    ttt.ttt_update(update=True)
    assert forwards.tokens["canary"][6:] == [128] * 2  # not at other prices


@pytest.mark.parametrize("rate", [0.05, 1000.0])
def test_an_update_asks_the_device_twice_however_far_the_step_has_to_shrink(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    ttt = adapting(tiny, learning_rate=rate, canary_margin=math.inf, kl_total=10.0)
    ttt.predict(text(4, 32, 0))
    part = ttt._gradient(text(4, 32, 0), ttt.offsets(), None)
    monkeypatch.setattr(ttt, "_gradient", lambda *_: part)
    monkeypatch.setattr(ttt, "_canary_loss", lambda: torch.ones(()))
    forwards, reads = Forwards(ttt, monkeypatch), Reads()
    with reads:
        report = ttt.ttt_update(update=True)
    assert report.updated
    assert 0 < report.kl <= 1e-3
    assert (forwards.lists, reads.count) == (2, 0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0, 1e6])
def test_the_factor_is_the_largest_within_the_cap_to_five_percent(tiny: Build, size: float) -> None:
    ttt = adapting(tiny)
    logits = routed(ttt, text(8, 32, 0))
    step_LE = size * torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    scale, kl = ttt._capped(step_LE, logits, 1e-3, 1.0)
    assert kl <= 1e-3
    assert kl_L(scale * step_LE.double(), logits, 1.0).max() == pytest.approx(float(kl), rel=1e-6)
    assert scale == 1 or kl_L(1.05 * scale * step_LE.double(), logits, 1.0).max() > 1e-3
    nothing = ttt._capped(math.nan * step_LE, logits, 1e-3, 1.0)
    assert [float(x) for x in nothing] == [0.0, 0.0]


def test_the_cap_is_on_the_whole_chunk_where_a_part_is_learnt_from(tiny: Build) -> None:
    ttt = adapting(tiny, learning_rate=1000.0, learn_tokens=32, canary_margin=math.inf)
    for step in range(8):
        chunk_BS = torch.cat([torch.full((1, 32), 60), text(7, 32, step)])
        ttt.predict(chunk_BS)
        before_LE, logits = ttt.offsets(), routed(ttt, chunk_BS)
        assert ttt.ttt_update(update=True).kl <= 1e-3
        assert kl_L(ttt.offsets() - before_LE, logits, 1.0).max() <= 1e-3 * 1.001


# What the controller hears of it


def test_the_controller_hears_the_joules_of_updates_evenly(tiny: Build) -> None:
    """Windows of ten chunks, every third with an update of the joules of six tenths of a chunk."""
    ttt = adapting(tiny, budget=1.0)
    ttt.note_cost(0.6)  # at 2 %: every 30 chunks
    told, heard = [], []
    for window in range(60):
        for chunk in range(10):
            ttt.predict(text(1, 8, chunk))
        update = 4.8 if window % 3 == 2 else 0.0
        feedback = HardwareFeedback(energy_j=80.0 + update, tokens=80, duration_s=1.2, update_j=update)
        report = ttt.ttt_update(feedback, update=False)
        told.append(report.j_per_token)
        heard.append(report.heard_j_per_token)
        assert report.j_per_token == pytest.approx((80.0 + update) / 80)
    assert heard == pytest.approx([1.02] * 60)
    assert sum(heard) == pytest.approx(sum(told))
    state = ttt.state()
    ttt.ttt_update(dataclasses.replace(GOOD, update_j=50.0), update=False)
    ttt.restore(state)
    assert ttt.state().amortised == state.amortised
    report = ttt.ttt_update(GOOD, update=False)  # what updates took is not told: as it is
    assert report.heard_j_per_token == report.j_per_token == 0.1
    ttt.reset()
    assert ttt.state().amortised.balance_j == 0


@pytest.mark.parametrize("update_j", [-1.0, 101.0, math.nan])
def test_joules_of_updates_that_cannot_be_are_bad_telemetry(tiny: Build, update_j: float) -> None:
    report = adapting(tiny, budget=0.1).ttt_update(dataclasses.replace(GOOD, update_j=update_j), update=False)
    assert report.events == ("telemetry of updates not within the whole",)
    assert report.heard_j_per_token is None
