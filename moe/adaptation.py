"""Test-time training of routers under a joule budget (DESIGN §4).

Learnt at test time: a bias b_LE on the logits of every layer's router, and one bias of all null experts. Never experts;
λ belongs to the budget controller. A chunk is predicted first; afterwards, every so many chunks, the biases move by a
natural-gradient step on the tokens already seen, capped in KL. Guards give the trained router back.

    controller = BudgetController.for_reach(budget_j, reach)
    with EnergyAwareTTTRouter(model, canary_BS=held_out, controller=controller) as ttt:  # then as it was before
        for chunk_BS in text:
            loss = ttt.predict(chunk_BS)
            report = ttt.ttt_update(HardwareFeedback(energy_j=…, tokens=…, duration_s=…))

Shapes: B sequences, S positions, T = B·S, E experts, L MoE layers.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe.budget import Amortised, BudgetController
from moe.feedback import Found, HardwareFeedback, TTTReport, TTTSettings, TTTState
from moe.routers import EnergyRouter
from moe.routing import Routing
from moe.trust import expected_price, fisher, kl_L, kl_of_factors, largest_within, read

log = logging.getLogger(__name__)


class EnergyAwareTTTRouter:
    """Adapts the routers of a model to the text it sees and to the joules it measures.

    At the end of a `with`, or by `close`, the model is as it was before: biases, λ, `keep_first`, training mode.

    Args:
        model: `MoEGPT2LMHeadModel`; put into evaluation mode.
        canary_BS: held-out text that guards the loss.
        controller: of λ; None: no budget, λ stays.
        settings: see `TTTSettings`.
        forward: predicts in place of the model: `torch.compile(model)`, say.
        canary_forward: the same for the canary, which has a shape of its own; one for all adapters of a model, where it
            captures graphs.

    Raises:
        ValueError: a budget, or `keep_first`, for a router on which λ does not act. Routers on which it does, but which
            do not know `keep_first` (`opening`, say), run without it, and a warning says so.
    """

    def __init__(
        self,
        model: Any,
        *,
        canary_BS: Tensor,
        controller: BudgetController | None = None,
        settings: TTTSettings | None = None,
        forward: Callable[..., Any] | None = None,
        canary_forward: Callable[..., Any] | None = None,
    ) -> None:
        self.routers, self._forward, self._canary_forward = model.routers, forward or model, canary_forward or model
        self.settings = settings or TTTSettings()
        if controller is not None and not all(router.priced for router in self.routers):
            raise ValueError(f"router: expected one on which λ acts under a budget, got {model.config.router!r}")
        if self.settings.keep_first and not all(isinstance(router, EnergyRouter) for router in self.routers):
            self._do_without_keep_first(model.config.router)
        self._found: Found | None = Found.of(model)  # nothing of the model has changed up to here
        self.model, self.canary_BS, self.controller = model.eval(), canary_BS, controller
        self.seen_routing: tuple[Routing, ...] = ()
        self._names = [name for name, _ in model.named_buffers() if name.endswith("router.offset_E")]
        null = [width == 0 for width in model.config.expert_widths]
        device = self.routers[0].offset_E.device
        self._null_E = torch.tensor(null, dtype=torch.float64, device=device) if any(null) and not all(null) else None
        self._null, self._trained_lambda = 0.0, model.config.energy_lambda
        self._seen_BS: Tensor | None = None
        self._seen_as_is = False  # whether `seen_routing` is what the routers would do with that chunk now
        self._chunks, self._pending, self.suspended = 0, [0.0, 0.0, 0.0], False
        self._pending_update_j: float | None = 0.0
        self._amortised, self._chunk_tokens, self._learn_from = Amortised(), 0, 0
        self._canary_trained: tuple[Any, float] | None = None
        self._cost_ratio = 3.0 + 2.0  # a forward and a backward, and the canary twice, in chunks; until measured
        self._kept_LE = self.offsets()
        for router in self.routers:
            router.keep_first = self.settings.keep_first
        if controller is not None:
            model.set_energy_lambda(controller.energy_lambda)

    def __enter__(self) -> EnergyAwareTTTRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The model exactly as it was found: biases, λ, `keep_first` and training mode. Safe to call twice."""
        found, self._found = self._found, None
        if found is not None:
            found.give_back(self.model)

    def _do_without_keep_first(self, name: str) -> None:
        if not all(router.priced for router in self.routers):
            raise ValueError(f"keep_first: expected router 'energy', or keep_first=False, got router {name!r}")
        log.warning("router %s does not honour keep_first, which is off: a token may lose its best expert", name)
        self.settings = dataclasses.replace(self.settings, keep_first=False)

    # State

    def offsets(self) -> Tensor:
        """The biases in force, [L, E], nats; zero is the trained router."""
        return torch.stack([router.offset_E.detach().clone() for router in self.routers])

    @torch.no_grad()
    def apply(self, offset_LE: Tensor) -> None:
        """Put biases in force, [L, E]."""
        for router, offset_E in zip(self.routers, offset_LE, strict=True):
            router.offset_E.copy_(offset_E)
        self._seen_as_is = False

    def state(self) -> TTTState:
        """What a request starts from; `restore` gives it back to the last bit."""
        controller = {} if self.controller is None else dict(vars(self.controller))
        if controller:
            controller["_recent"] = controller["_recent"].copy()
        return TTTState(
            offset_LE=self.offsets(),
            kept_LE=self._kept_LE.clone(),
            null=self._null,
            energy_lambda=float(self.model.config.energy_lambda),
            controller=controller,
            chunks=self._chunks,
            cost_ratio=self._cost_ratio,
            pending=tuple(self._pending),
            pending_update_j=self._pending_update_j,
            amortised=self._amortised,
            learn_from=self._learn_from,
            suspended=self.suspended,
        )

    def restore(self, state: TTTState) -> None:
        """Exactly as `state` was taken."""
        self.apply(state.offset_LE)
        self._kept_LE, self._null = state.kept_LE.clone(), state.null
        self.model.set_energy_lambda(state.energy_lambda)
        if self.controller is not None:
            vars(self.controller).update(state.controller | {"_recent": state.controller["_recent"].copy()})
        self._chunks, self._cost_ratio = state.chunks, state.cost_ratio
        self._seen_BS, self._pending, self.suspended = None, list(state.pending), state.suspended
        self._pending_update_j, self._amortised = state.pending_update_j, state.amortised
        self._learn_from = state.learn_from

    def reset(self) -> None:
        """The trained router, and the controller as new; still adapting, so that `keep_first` stays (see `close`)."""
        self.apply(torch.zeros_like(self._kept_LE))
        self._kept_LE, self._null, self.suspended = torch.zeros_like(self._kept_LE), 0.0, False
        self._seen_BS, self._chunks, self._pending = None, 0, [0.0, 0.0, 0.0]
        self._pending_update_j, self._amortised, self._learn_from = 0.0, Amortised(), 0
        if self.controller is not None:
            self.controller.reset()
        self.model.set_energy_lambda(self._trained_lambda if self.controller is None else self.controller.energy_lambda)

    # Work

    @torch.no_grad()
    def predict(self, ids_BS: Tensor) -> Tensor:
        """Mean next-token loss of a chunk [B, S], nats, on the device, with the routers as they stand.

        Nothing learns from a chunk before this: it is what `ttt_update` may look at afterwards. The loss is a tensor of
        its own; `seen_routing` may be the forward's and holds until the next `predict`, which overwrites it.
        """
        self._seen_BS, self._chunk_tokens = ids_BS, ids_BS.numel()
        self._chunks += 1
        kwargs = {"labels": ids_BS, "use_cache": False, "output_routing": True, "skip_logits": True}
        output = self._forward(input_ids=ids_BS, **kwargs)
        self.seen_routing, self._seen_as_is = output.routing, True
        loss: Tensor = output.lm_loss.clone()  # a captured forward returns the same tensor every time
        return loss

    @property
    def update_every(self) -> int:
        """Chunks between two updates, so that updating stays within its share of the work."""
        return max(1, math.ceil(self._cost_ratio / self.settings.update_share))

    @property
    def update_due(self) -> bool:
        """Whether the next `ttt_update` learns, unless it is told not to."""
        return self._chunks >= self.update_every and self._seen_BS is not None and not self.suspended

    @property
    def cost_ratio(self) -> float:
        """Cost of an update, in chunks: measured, see `note_cost`, or at first a guess on the safe side."""
        return self._cost_ratio

    @property
    def cost_share(self) -> float:
        """Updates over predicting, in work, as it is known by now: what they add to the joules per token."""
        return self._cost_ratio / self.update_every

    def note_cost(self, ratio: float) -> None:
        """Measured cost of an update over that of a chunk."""
        if math.isfinite(ratio) and ratio > 0:
            self._cost_ratio = ratio

    def ttt_update(self, feedback: HardwareFeedback | None = None, *, update: bool | None = None) -> TTTReport:
        """Act on the hardware's word, and learn from the chunk predicted last if it is time to.

        Args:
            feedback: joules of the work since the last call; None where there is no budget.
            update: learn now, or do not; None: when `update_every` chunks have gone by.
        """
        events: list[str] = []
        measured, heard = (None, None) if feedback is None else self._hear(feedback, events)
        kl, delta, updated = 0.0, None, False
        if self.update_due if update is None else update and self._seen_BS is not None and not self.suspended:
            self._chunks = 0
            kl, delta = self._learn(events, measured)
            updated = kl > 0
        return TTTReport(
            energy_lambda=float(self.model.config.energy_lambda),
            j_per_token=measured,
            heard_j_per_token=heard,
            infeasible=self.controller is not None and self.controller.infeasible,
            updated=updated,
            kl=kl,
            canary_delta=delta,
            events=tuple(events),
        )

    def _hear(self, feedback: HardwareFeedback, events: list[str]) -> tuple[float | None, float | None]:
        """Gather a window; at its end move λ. Bad telemetry: the trained router, λ untouched, until good one comes.

        Returns:
            The joules per token of a window that is complete, and what the controller heard of it.
        """
        fault = feedback.fault(self.settings.max_age_s)
        if fault is not None:
            events.append(f"telemetry {fault}")
            self._pending, self._pending_update_j = [0.0, 0.0, 0.0], 0.0
            if not self.suspended:
                self._kept_LE, self.suspended = self.offsets(), True
                self.apply(torch.zeros_like(self._kept_LE))
            return None, None
        if self.suspended:
            self.suspended = False
            self.apply(self._kept_LE)
            events.append("telemetry back")
        assert feedback.energy_j is not None
        energy, tokens, seconds = self._pending
        self._pending = [energy + feedback.energy_j, tokens + feedback.tokens, seconds + feedback.duration_s]
        known = self._pending_update_j is not None and feedback.update_j is not None
        self._pending_update_j = (self._pending_update_j or 0.0) + (feedback.update_j or 0.0) if known else None
        if self._pending[2] < self.settings.min_window_s:
            return None, None
        energy, tokens, _ = self._pending
        heard = self._evened(energy, tokens, self._pending_update_j) / tokens
        self._pending, self._pending_update_j = [0.0, 0.0, 0.0], 0.0
        if self.controller is not None:
            was = self.controller.infeasible
            self.model.set_energy_lambda(self.controller.step(heard))
            self._seen_as_is = False
            if self.controller.infeasible != was:
                events.append("feasible again" if was else "infeasible")
        return energy / tokens, heard

    def _evened(self, energy_j: float, tokens: float, update_j: float | None) -> float:
        """Joules of a window with those of its updates replaced by its part of the updates' mean."""
        if update_j is None or not self._chunk_tokens or update_j >= energy_j:
            return energy_j
        chunk_j = (energy_j - update_j) / tokens * self._chunk_tokens
        part = tokens / (self._chunk_tokens * self.update_every)
        self._amortised, charged = self._amortised.window(update_j, expected_j=self._cost_ratio * chunk_j, part=part)
        return energy_j - update_j + charged

    def _learn(self, events: list[str], j_per_token: float | None) -> tuple[float, float | None]:
        """One step of the biases on the chunk seen last; returns its KL and the canary's difference in loss.

        The device is asked twice: how the step came out, and what the canary says; more only on the way back from the
        total cap.
        """
        assert self._seen_BS is not None
        before_LE, tau = self.offsets(), float(self.model.config.router_temperature)
        grad_LE, logits = self._gradient(self._part(self._seen_BS), before_LE, j_per_token)
        step_LE, null_step = self._direction(grad_LE, logits, tau)
        if self._seen_as_is:  # capped on the whole chunk, not on the part alone that is learnt from
            logits = [routing.logits_TE for routing in self.seen_routing]
        self._seen_BS = None
        trained = [z_TE - b_E for z_TE, b_E in zip(logits, before_LE, strict=True)]
        scale, kl = self._capped(step_LE, logits, self.settings.kl_step, tau)
        after_LE = before_LE + scale * step_LE
        shrink, _ = self._capped(after_LE, trained, self.settings.kl_total, tau)
        finite, kl_found, shrunk, null = read(
            torch.isfinite(torch.cat([grad_LE, step_LE])).all(), kl, shrink, shrink * (self._null + scale * null_step)
        )
        if not finite:
            events.append("gradient not finite")
            return 0.0, None
        if shrunk < 1:  # as far from the trained router as allowed: come back, a retreat if need be
            events.append("total KL cap")
            after_LE = shrink * after_LE
            kl_found = float(kl_L(after_LE - before_LE, logits, tau).max())
            if kl_found > self.settings.kl_step:
                after_LE, kl_found, null = self._retreat(before_LE, logits, trained, tau)
        self.apply(after_LE)
        self._null = null
        delta = self._canary_delta(after_LE)
        if not delta <= self.settings.canary_margin:
            events.append("canary revert")
            self.apply(torch.zeros_like(after_LE))
            self._null = 0.0
        self._kept_LE = self.offsets()
        return kl_found, delta

    def _retreat(
        self, before_LE: Tensor, logits: list[Tensor], trained: list[Tensor], tau: float
    ) -> tuple[Tensor, float, float]:
        """Biases as far back towards the total cap as a step may go, its KL, and the null bias; the rest of the way is
        for the next updates."""
        shrink, _ = self._capped(before_LE, trained, self.settings.kl_total, tau)
        part, kl = self._capped((shrink - 1) * before_LE, logits, self.settings.kl_step, tau)
        left = 1 - part * (1 - shrink)
        found, kept = read(kl, left)
        return left * before_LE, found, kept * self._null

    def _part(self, ids_BS: Tensor) -> Tensor:
        """The sequences of a chunk to learn from; the next update takes those after them."""
        batch, length = ids_BS.shape
        count = min(batch, max(1, self.settings.learn_tokens // length))
        if count == batch:
            return ids_BS
        first, self._learn_from = self._learn_from % batch, (self._learn_from + count) % batch
        return ids_BS.roll(-first, dims=0)[:count]

    def _gradient(self, ids_BS: Tensor, offset_LE: Tensor, j_per_token: float | None) -> tuple[Tensor, list[Tensor]]:
        """∂(loss + μ·Ê/B + β·KL)/∂b, [L, E], and the logits of every layer, detached."""
        leaf_LE = offset_LE.clone().requires_grad_()
        buffers = dict(zip(self._names, leaf_LE.unbind(0), strict=True))
        kwargs = {
            "input_ids": ids_BS,
            "labels": ids_BS,
            "use_cache": False,
            "output_routing": True,
            "skip_logits": True,
        }
        with torch.enable_grad():
            output = torch.func.functional_call(self.model, buffers, kwargs=kwargs)
            loss = output.lm_loss + self.settings.kl_weight * self._from_trained(output.routing, leaf_LE)
            if self.controller is not None:
                over = (j_per_token or self.controller.budget_j) / self.controller.budget_j
                loss = loss + self.settings.energy_weight * over * expected_price(output.routing)
        (grad_LE,) = torch.autograd.grad(loss, leaf_LE)
        return grad_LE, [routing.logits_TE.detach() for routing in output.routing]

    def _from_trained(self, routings: tuple[Routing, ...], leaf_LE: Tensor) -> Tensor:
        """KL(π ‖ π_trained) on the same inputs, mean over tokens and layers."""
        terms = []
        for router, routing, offset_E in zip(self.routers, routings, leaf_LE, strict=True):
            trained_TE = ((routing.logits_TE - offset_E).detach() / router.temperature).log_softmax(-1)
            now_TE = ((routing.logits_TE.detach() + offset_E - offset_E.detach()) / router.temperature).log_softmax(-1)
            terms.append((now_TE.exp() * (now_TE - trained_TE)).sum(-1).mean())
        return torch.stack(terms).mean()

    def _direction(self, grad_LE: Tensor, logits: list[Tensor], tau: float) -> tuple[Tensor, Tensor]:
        """The natural-gradient step of the biases, and of the null experts' common one, before any cap."""
        fishers = torch.stack([fisher(z_TE, tau) for z_TE in logits])
        damping = 1e-2 * fishers.diagonal(dim1=-2, dim2=-1).mean() + 1e-6
        grad_LE = grad_LE.to(fishers.dtype)
        eye_EE = torch.eye(grad_LE.shape[1], device=fishers.device, dtype=fishers.dtype)
        # `solve_ex` does not wait for the device to say that it worked; what is not finite is found with the gradient
        natural_LE = torch.linalg.solve_ex(fishers + damping * eye_EE, grad_LE[..., None]).result[..., 0]
        rate = self.settings.learning_rate
        step_LE, null_step = -rate * natural_LE, damping.new_zeros(())
        if self._null_E is not None:
            null_E = self._null_E.to(fishers)
            curvature = (null_E @ fishers @ null_E).sum() + damping
            null_step = -rate * (grad_LE @ null_E).sum() / curvature / 2  # each direction takes half
            step_LE = step_LE / 2 + null_step * null_E
        return (step_LE - step_LE.mean(dim=-1, keepdim=True)).float(), null_step

    def _capped(self, step_LE: Tensor, logits: list[Tensor], cap: float, tau: float) -> tuple[Tensor, Tensor]:
        """The largest factor ≤ 1 (of those tried) with which no layer's KL exceeds the cap, and that KL; on the device.

        Along a ray the KL only grows: factors an octave apart first, then 16 in the octave that was found.
        """
        step_LE = step_LE.double()
        octaves = torch.exp2(-torch.arange(64, device=step_LE.device, dtype=torch.float64))
        scale, _ = largest_within(octaves, kl_of_factors(octaves, step_LE, logits, tau), cap)
        finer = (scale * torch.exp2(torch.arange(15, -1, -1, device=octaves.device, dtype=octaves.dtype) / 16)).clamp(
            max=1.0
        )
        return largest_within(finer, kl_of_factors(finer, step_LE, logits, tau), cap)

    @torch.no_grad()
    def _canary_delta(self, offset_LE: Tensor) -> float:
        """Loss of the canary with the biases, less that of the trained router at the same λ; inf if not finite.

        The latter is known from before, as long as nothing of λ, τ and prices has changed.
        """
        now = self._canary_loss()
        routers = ((id(r.join_E), r.join_E._version, id(r.open_E), r.open_E._version) for r in self.routers)
        key = (self.model.config.energy_lambda, self.model.config.router_temperature, *routers)
        if self._canary_trained is None or self._canary_trained[0] != key:
            self.apply(torch.zeros_like(offset_LE))
            loss, trained = read(now, self._canary_loss())
            self.apply(offset_LE)
            self._canary_trained = (key, trained)
        else:
            (loss,) = read(now)
        delta = loss - self._canary_trained[1]
        return delta if math.isfinite(delta) else math.inf

    def _canary_loss(self) -> Tensor:
        """On the device; a tensor of its own."""
        output = self._canary_forward(
            input_ids=self.canary_BS, labels=self.canary_BS, use_cache=False, skip_logits=True
        )
        loss: Tensor = output.lm_loss.clone()
        return loss
