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

from moe.budget import BudgetController
from moe.routers import EnergyRouter
from moe.routing import Routing

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardwareFeedback:
    """What the hardware says of a span of work. Unknown is None.

    `energy_j` are all joules of the span, adapting included; `modelled_j` the cost model's for the same work;
    `age_s` how old the reading is when it is handed over.
    """

    energy_j: float | None
    tokens: int
    duration_s: float
    power_w: float | None = None
    temperature_c: float | None = None
    memory_fraction: float | None = None
    modelled_j: float | None = None
    age_s: float = 0.0

    def fault(self, max_age_s: float) -> str | None:
        """Why this cannot be acted on; None: it can."""
        if self.energy_j is None or not math.isfinite(self.energy_j) or not math.isfinite(self.duration_s):
            return "not finite"
        if self.energy_j <= 0 or self.tokens <= 0 or self.duration_s <= 0:
            return "not positive"
        if not self.age_s <= max_age_s:
            return "stale"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTSettings:
    """How the biases learn, and what stops them.

    Attributes:
        learning_rate: of the natural-gradient step.
        energy_weight: μ, nats: weight of Ê/B; acts only under a budget.
        kl_weight: β of KL(π ‖ π_trained).
        kl_step: largest KL of one step, any layer, nats per token. kl_total: of all steps together.
        canary_margin: nats by which the canary's loss may exceed the trained router's at the same λ.
        update_share: largest share of the work that updates may be.
        min_window_s: feedback is gathered until it spans this long.
        max_age_s: older telemetry is stale.
        keep_first: each token keeps the expert that the trained router likes best at this λ; router `energy` alone.
    """

    learning_rate: float = 0.05
    energy_weight: float = 0.02
    kl_weight: float = 0.1
    kl_step: float = 1e-3
    kl_total: float = 0.05
    canary_margin: float = 0.01
    update_share: float = 0.02
    min_window_s: float = 1.0
    max_age_s: float = 2.0
    keep_first: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTReport:
    """What one call of `ttt_update` did.

    `j_per_token` is that of the window which this call completed, None where none was. `kl` is the largest KL of any
    layer that the step made (0: no step). `events`: guards that acted, one word or two each.
    """

    energy_lambda: float
    j_per_token: float | None = None
    infeasible: bool = False
    updated: bool = False
    kl: float = 0.0
    canary_delta: float | None = None
    events: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTState:
    """All that adapting has changed, to be given back exactly."""

    offset_LE: Tensor
    kept_LE: Tensor
    null: float
    energy_lambda: float
    controller: dict[str, Any]
    chunks: int
    cost_ratio: float
    pending: tuple[float, ...]
    suspended: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """What a model is like before it is adapted."""

    offset_LE: Tensor
    keep_first: tuple[bool, ...]
    energy_lambda: float
    training: bool

    @classmethod
    def of(cls, model: Any) -> _Found:
        return cls(
            offset_LE=torch.stack([router.offset_E.detach().clone() for router in model.routers]),
            keep_first=tuple(router.keep_first for router in model.routers),
            energy_lambda=float(model.config.energy_lambda),
            training=model.training,
        )

    @torch.no_grad()
    def give_back(self, model: Any) -> None:
        for router, offset_E, keep_first in zip(model.routers, self.offset_LE, self.keep_first, strict=True):
            router.offset_E.copy_(offset_E)
            router.keep_first = keep_first
        model.set_energy_lambda(self.energy_lambda)
        model.train(self.training)


class EnergyAwareTTTRouter:
    """Adapts the routers of a model to the text it sees and to the joules it measures.

    At the end of a `with`, or by `close`, the model is as it was before: biases, λ, `keep_first`, training mode.

    Args:
        model: `MoEGPT2LMHeadModel`; put into evaluation mode.
        canary_BS: held-out text that guards the loss.
        controller: of λ; None: no budget, λ stays.
        settings: see `TTTSettings`.
        forward: predicts in place of the model: `torch.compile(model)`, say.

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
    ) -> None:
        self.routers, self._forward = model.routers, forward or model
        self.settings = settings or TTTSettings()
        if controller is not None and not all(router.priced for router in self.routers):
            raise ValueError(f"router: expected one on which λ acts under a budget, got {model.config.router!r}")
        if self.settings.keep_first and not all(isinstance(router, EnergyRouter) for router in self.routers):
            self._do_without_keep_first(model.config.router)
        self._found: _Found | None = _Found.of(model)  # nothing of the model has changed up to here
        self.model, self.canary_BS, self.controller = model.eval(), canary_BS, controller
        self.seen_routing: tuple[Routing, ...] = ()
        self._names = [name for name, _ in model.named_buffers() if name.endswith("router.offset_E")]
        self._null_E = torch.tensor([width == 0 for width in model.config.expert_widths])
        self._null, self._trained_lambda = 0.0, model.config.energy_lambda
        self._seen_BS: Tensor | None = None
        self._chunks, self._pending, self.suspended = 0, [0.0, 0.0, 0.0], False
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

    def reset(self) -> None:
        """The trained router, and the controller as new; still adapting, so that `keep_first` stays (see `close`)."""
        self.apply(torch.zeros_like(self._kept_LE))
        self._kept_LE, self._null, self.suspended = torch.zeros_like(self._kept_LE), 0.0, False
        self._seen_BS, self._chunks, self._pending = None, 0, [0.0, 0.0, 0.0]
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
        self._seen_BS = ids_BS
        self._chunks += 1
        kwargs = {"labels": ids_BS, "use_cache": False, "output_routing": True, "skip_logits": True}
        output = self._forward(input_ids=ids_BS, **kwargs)
        self.seen_routing = output.routing
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
        measured = None if feedback is None else self._hear(feedback, events)
        kl, delta, updated = 0.0, None, False
        if self.update_due if update is None else update and self._seen_BS is not None and not self.suspended:
            self._chunks = 0
            kl, delta = self._learn(events, measured)
            updated = kl > 0
        return TTTReport(
            energy_lambda=float(self.model.config.energy_lambda),
            j_per_token=measured,
            infeasible=self.controller is not None and self.controller.infeasible,
            updated=updated,
            kl=kl,
            canary_delta=delta,
            events=tuple(events),
        )

    def _hear(self, feedback: HardwareFeedback, events: list[str]) -> float | None:
        """Gather a window; at its end move λ. Bad telemetry: the trained router, λ untouched, until good one comes."""
        fault = feedback.fault(self.settings.max_age_s)
        if fault is not None:
            events.append(f"telemetry {fault}")
            self._pending = [0.0, 0.0, 0.0]
            if not self.suspended:
                self._kept_LE, self.suspended = self.offsets(), True
                self.apply(torch.zeros_like(self._kept_LE))
            return None
        if self.suspended:
            self.suspended = False
            self.apply(self._kept_LE)
            events.append("telemetry back")
        assert feedback.energy_j is not None
        energy, tokens, seconds = self._pending
        self._pending = [energy + feedback.energy_j, tokens + feedback.tokens, seconds + feedback.duration_s]
        if self._pending[2] < self.settings.min_window_s:
            return None
        j_per_token = self._pending[0] / self._pending[1]
        self._pending = [0.0, 0.0, 0.0]
        if self.controller is not None:
            was = self.controller.infeasible
            self.model.set_energy_lambda(self.controller.step(j_per_token))
            if self.controller.infeasible != was:
                events.append("feasible again" if was else "infeasible")
        return j_per_token

    def _learn(self, events: list[str], j_per_token: float | None) -> tuple[float, float | None]:
        """One step of the biases on the chunk seen last; returns its KL and the canary's difference in loss."""
        assert self._seen_BS is not None
        before_LE = self.offsets()
        grad_LE, logits = self._gradient(self._seen_BS, before_LE, j_per_token)
        self._seen_BS = None
        if not bool(torch.isfinite(grad_LE).all()):
            events.append("gradient not finite")
            return 0.0, None
        tau = float(self.routers[0].temperature)
        step_LE, null_step = self._direction(grad_LE, logits, tau)
        trained = [z_TE - b_E for z_TE, b_E in zip(logits, before_LE, strict=True)]
        scale, kl = self._capped(step_LE, logits, self.settings.kl_step, tau)
        after_LE = before_LE + scale * step_LE
        shrink, _ = self._capped(after_LE, trained, self.settings.kl_total, tau)
        if shrink < 1:  # as far from the trained router as allowed: come back, a retreat if need be
            events.append("total KL cap")
            after_LE = shrink * after_LE
            kl = float(_kl_L(after_LE - before_LE, logits, tau).max())
            if kl > self.settings.kl_step:
                shrink, _ = self._capped(before_LE, trained, self.settings.kl_total, tau)
                part, kl = self._capped((shrink - 1) * before_LE, logits, self.settings.kl_step, tau)
                scale, shrink = 0.0, 1 - part * (1 - shrink)  # the rest of the way is for the next updates
                after_LE = shrink * before_LE
        self.apply(after_LE)
        self._null = shrink * (self._null + scale * null_step)
        delta = self._canary_delta(after_LE)
        if not delta <= self.settings.canary_margin:
            events.append("canary revert")
            self.apply(torch.zeros_like(after_LE))
            self._null = 0.0
        self._kept_LE = self.offsets()
        return kl, delta

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
                loss = loss + self.settings.energy_weight * over * _expected_price(output.routing)
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

    def _direction(self, grad_LE: Tensor, logits: list[Tensor], tau: float) -> tuple[Tensor, float]:
        """The natural-gradient step of the biases, and of the null experts' common one, before any cap."""
        fishers = torch.stack([_fisher(z_TE, tau) for z_TE in logits])
        damping = 1e-2 * fishers.diagonal(dim1=-2, dim2=-1).mean() + 1e-6
        eye_EE = torch.eye(grad_LE.shape[1], device=grad_LE.device, dtype=fishers.dtype)
        natural_LE = torch.linalg.solve(fishers + damping * eye_EE, grad_LE.to(fishers.dtype)[..., None])[..., 0]
        rate = self.settings.learning_rate
        step_LE, null_step = -rate * natural_LE, 0.0
        if bool(self._null_E.any()) and not bool(self._null_E.all()):
            null_E = self._null_E.to(grad_LE.device, fishers.dtype)
            curvature = float((null_E @ fishers @ null_E).sum() + damping)
            null_step = -rate * float((grad_LE.to(fishers.dtype) @ null_E).sum()) / curvature
            step_LE = (step_LE + null_step * null_E) / 2  # each direction takes half
            null_step /= 2
        return (step_LE - step_LE.mean(dim=-1, keepdim=True)).to(grad_LE.dtype), null_step

    def _capped(self, step_LE: Tensor, logits: list[Tensor], cap: float, tau: float) -> tuple[float, float]:
        """The largest factor ≤ 1 (of those tried) with which no layer's KL exceeds the cap, and that KL."""
        scale = 1.0
        for _ in range(60):
            kl = float(_kl_L(scale * step_LE, logits, tau).max())
            if kl <= cap:
                return scale, kl
            scale *= min(0.9, 0.95 * math.sqrt(cap / kl)) if math.isfinite(kl) else 0.1
        return 0.0, 0.0

    @torch.no_grad()
    def _canary_delta(self, offset_LE: Tensor) -> float:
        """Loss of the canary with the biases, less that of the trained router at the same λ; inf if not finite."""
        losses = []
        for biases_LE in (torch.zeros_like(offset_LE), offset_LE):
            self.apply(biases_LE)
            kwargs = {"labels": self.canary_BS, "use_cache": False, "skip_logits": True}
            losses.append(float(self.model(input_ids=self.canary_BS, **kwargs).lm_loss))
        delta = losses[1] - losses[0]
        return delta if math.isfinite(delta) else math.inf


def _expected_price(routings: tuple[Routing, ...]) -> Tensor:
    """Σ_e P_e·c̃_e over its own value: 1, with the gradient of log Ê; mean over layers."""
    terms = []
    for routing in routings:
        assert routing.join_E is not None
        price = (routing.log_probs_TE.exp() @ routing.join_E.to(routing.log_probs_TE.dtype)).mean()
        terms.append(price / price.detach().clamp_min(1e-9))
    return torch.stack(terms).mean()


def _fisher(logits_TE: Tensor, tau: float) -> Tensor:
    """Mean Fisher matrix of softmax(z/τ) in a bias on z, [E, E]."""
    p_TE = (logits_TE.double() / tau).softmax(-1)
    return (torch.diag(p_TE.mean(0)) - p_TE.T @ p_TE / len(p_TE)) / tau**2


def _kl_L(step_LE: Tensor, logits: list[Tensor], tau: float) -> Tensor:
    """KL(softmax(z/τ) ‖ softmax((z + step)/τ)) of every layer, mean over tokens, nats."""
    found = []
    for step_E, z_TE in zip(step_LE, logits, strict=True):
        old_TE = (z_TE.double() / tau).log_softmax(-1)
        new_TE = ((z_TE.double() + step_E.double()) / tau).log_softmax(-1)
        found.append((old_TE.exp() * (old_TE - new_TE)).sum(-1).mean())
    return torch.stack(found)
