"""The configuration of a GPT-2 whose feed-forward networks are experts."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config
from transformers.activations import ACT2FN

ACTIVATIONS = ("gelu", "swiglu")
GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # three names of the tanh form, which fast experts compute
MIXINGS = ("normalized", "probability")


class MoEGPT2Config(GPT2Config):
    """GPT-2 with experts.

    Attributes:
        expert_widths: inner width of each expert, neurons; 0 is a null expert, which computes and
            costs nothing. Its length is the number of experts E. Default: 8 copies' worth of the
            dense width (`n_inner`, or 4·n_embd).
        num_experts_per_tok: K, experts per token. (`top_k` would collide with generation's own.)
        moe_layers: indices of the blocks whose FFN becomes experts; None: all.
        router: key of `ROUTERS`.
        energy_lambda: λ, nats per c_ref: how much a router that looks at prices gives up for joules.
        router_temperature: τ in softmax(z/τ). It, `router_jitter` and `bias_balance_rate` do nothing with routers
            `random` and `hash`, which have no gate: no logits to scale, no choices to balance.
        regularizers: name → weight, keys of `REGULARIZERS`.
        gibbs_beta: β of `kl_gibbs`.
        capacity_factor: of router `capacity`, which drops while training and never in evaluation.
        router_top_p: of router `topp`: the probability mass that a token's set must exceed. (`top_p` would
            collide with generation's own, as `top_k` does.)
        router_jitter: ε; the router's input is scaled by U(1−ε, 1+ε) while training (Switch §2.2).
        bias_balance_rate: u of bias balancing; 0 turns it off.
        mixing: `normalized` (weights sum to 1; K = 1 mixes with p/stopgrad(p)) or `probability`
            (the weight is p itself, as Switch has it; upcycling is then not exact).
        router_seed: of routers `random`, `hash`, `permuted`.
        expert_activation: `gelu` (an exact copy of GPT-2's FFN: `activation_function` and biases)
            or `swiglu` (silu gate).
        shared_expert_width: neurons of an expert that every token passes through besides; 0: none.
        dispatch: how tokens reach experts; `auto` picks the fastest that the device offers.
    """

    model_type = "moe_gpt2"
    keys_to_ignore_at_inference = ["past_key_values", "lm_loss", "aux_loss", "router_logits", "routing"]  # noqa: RUF012

    expert_widths: list[int] = None  # type: ignore[assignment]  # None becomes the default at birth
    num_experts_per_tok: int = 2
    moe_layers: list[int] | None = None
    router: str = "topk"
    energy_lambda: float = 0.0
    router_temperature: float = 1.0
    regularizers: dict[str, float] | None = None
    gibbs_beta: float = 1.0
    capacity_factor: float = 1.25
    router_top_p: float = 0.9
    router_jitter: float = 0.0
    bias_balance_rate: float = 0.0
    mixing: str = "normalized"
    router_seed: int = 0
    expert_activation: str = "gelu"
    shared_expert_width: int = 0
    dispatch: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        given: Any = self.expert_widths
        self.expert_widths = [self.dense_width] * 8 if given is None else list(given)
        self.check()

    @property
    def dense_width(self) -> int:
        """Inner width of the dense FFN of this GPT-2."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def num_experts(self) -> int:
        return len(self.expert_widths)

    @property
    def plain_experts(self) -> bool:
        """Whether the experts' activation is one that only the plain path computes."""
        return self.expert_activation == "gelu" and self.activation_function not in GELUS

    @property
    def moe_layer_indices(self) -> tuple[int, ...]:
        return tuple(range(self.n_layer)) if self.moe_layers is None else tuple(self.moe_layers)

    def check(self) -> None:
        """Raise a ValueError of one line that names the first bad key."""
        for key, expected, good in self._rules():
            if not good:
                raise ValueError(f"{key}: expected {expected}, got {getattr(self, key)!r}")

    def _rules(self) -> list[tuple[str, str, bool]]:
        from moe.registry import ROUTERS  # these two import nothing of this file
        from moe.regularizers import REGULARIZERS

        widths, layers, regularizers = self.expert_widths, self.moe_layers, self.regularizers or {}
        unknown = sorted(set(regularizers) - set(REGULARIZERS))
        in_range = layers is None or all(0 <= i < self.n_layer for i in layers)
        unique = layers is None or list(layers) == sorted(set(layers))
        return [
            ("expert_widths", "a list of integers ≥ 0", bool(widths) and all(_is_int(w) and w >= 0 for w in widths)),
            (
                "num_experts_per_tok",
                f"an integer from 1 to the {len(widths)} experts",
                _is_int(self.num_experts_per_tok) and 1 <= self.num_experts_per_tok <= len(widths),
            ),
            ("moe_layers", f"ascending block indices from 0 to {self.n_layer - 1}", in_range and unique),
            ("router", f"one of {', '.join(sorted(ROUTERS))}", self.router in ROUTERS),
            ("energy_lambda", "a finite number ≥ 0", 0 <= self.energy_lambda < float("inf")),
            ("router_temperature", "a finite number > 0", 0 < self.router_temperature < float("inf")),
            (
                "regularizers",
                f"names among {', '.join(sorted(REGULARIZERS))} (unknown: {', '.join(unknown)})",
                not unknown,
            ),
            ("regularizers", "finite weights", all(abs(w) < float("inf") for w in regularizers.values())),
            (
                "regularizers",
                "kl_uniform or entropy, not both: their gradient is the same",
                not {"kl_uniform", "entropy"} <= set(regularizers),
            ),
            ("gibbs_beta", "a finite number ≥ 0", 0 <= self.gibbs_beta < float("inf")),
            ("capacity_factor", "a number > 0", self.capacity_factor > 0),
            ("router_top_p", "a number in (0, 1]", 0 < self.router_top_p <= 1),
            ("router_jitter", "a number in [0, 1)", 0 <= self.router_jitter < 1),
            ("bias_balance_rate", "a finite number ≥ 0", 0 <= self.bias_balance_rate < float("inf")),
            ("mixing", f"one of {', '.join(MIXINGS)}", self.mixing in MIXINGS),
            ("expert_activation", f"one of {', '.join(ACTIVATIONS)}", self.expert_activation in ACTIVATIONS),
            ("activation_function", "an activation that transformers knows", self.activation_function in ACT2FN),
            (
                "shared_expert_width",
                "an integer ≥ 0",
                _is_int(self.shared_expert_width) and self.shared_expert_width >= 0,
            ),
            ("add_cross_attention", "False: experts are for decoder-only models", not self.add_cross_attention),
        ]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
