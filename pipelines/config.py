"""What a trial is: a frozen value, checked at birth against the registries of routers and regularizers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from moe import REGULARIZERS, ROUTERS

DENSE = "dense"
NO_REGULARIZER = "none"
DEFAULT_EXPERTS = 8
# Keys that say where and how a trial runs, not which experiment it is.
_NOT_THE_EXPERIMENT = ("seed", "measure_seconds", "threads", "anytime", "checkpoint", "prefill")
ANYTIME_EPOCHS = 4
#: Seconds for which prefill and decode are repeated, and before that without measuring, by kind of device.
MEASURE_S = {"cuda": 5.0, "cpu": 0.3}
WARMUP_S = {"cuda": 1.0, "cpu": 0.05}
_GPU_COUNTS = ("gpus", "num_gpus", "gpus_per_trial")


class ConfigError(ValueError):
    """A setting that cannot be: one line with the key, what was expected and what was got."""


class StorageError(RuntimeError):
    """Results cannot be written any more: one line that says where, and why."""


class NonFiniteLossError(ArithmeticError):
    """A loss left the numbers: the trial fails with this reason."""


class TrialConfig(pydantic.BaseModel):
    """One trial. Every key of a space's `trial` section is a field here; an unknown key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    # model
    base: str = "random"
    tokenizer: str | None = None
    n_layer: int = pydantic.Field(6, ge=1)
    n_head: int = pydantic.Field(12, ge=1)
    n_embd: int = pydantic.Field(768, ge=8)
    dropout: float | None = pydantic.Field(None, ge=0, lt=1)
    moe_layers: tuple[int, ...] | None = None
    router: str = "topk"
    num_experts: int | None = pydantic.Field(None, ge=1)
    expert_width_factors: tuple[float, ...] | None = None
    top_k: int = pydantic.Field(2, ge=1)
    energy_lambda: float = pydantic.Field(0.0, ge=0)
    price: Literal["joules", "flops", "params", "latency", "uniform", "shuffled", "zero"] = "joules"
    regularizer: str = NO_REGULARIZER
    regularizer_weight: float = pydantic.Field(0.0, allow_inf_nan=False)
    temperature: float = pydantic.Field(1.0, gt=0)
    router_jitter: float = pydantic.Field(0.0, ge=0, lt=1)
    bias_balance_rate: float = pydantic.Field(0.0, ge=0)
    capacity_factor: float = pydantic.Field(1.25, gt=0)
    top_p: float = pydantic.Field(0.9, gt=0, le=1)
    upcycle_noise: float = pydantic.Field(0.01, ge=0)
    # training
    epochs: int = pydantic.Field(1, ge=1)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    decay_fraction: float = pydantic.Field(0.2, gt=0, lt=1)
    anytime: bool = False
    batch_size: int = pydantic.Field(16, ge=1)
    learning_rate: float = pydantic.Field(3e-4, gt=0)
    weight_decay: float = pydantic.Field(0.1, ge=0)
    warmup_fraction: float = pydantic.Field(0.05, ge=0, lt=1)
    grad_clip: float = pydantic.Field(1.0, gt=0)
    seed: int = pydantic.Field(0, ge=0)
    # data
    data: str = "embedded"
    seq_len: int = pydantic.Field(1024, ge=8)
    max_train_tokens: int | None = pydantic.Field(None, ge=1)
    max_eval_tokens: int | None = pydantic.Field(None, ge=1)
    test: bool = False
    # measurement
    checkpoint: bool = True
    prefill: bool = True
    decode_batches: tuple[int, ...] = (8,)
    decode_prompt_tokens: int = pydantic.Field(64, ge=1)
    decode_new_tokens: int = pydantic.Field(64, ge=1)
    measure_seconds: float | None = pydantic.Field(None, gt=0)
    # hardware
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "pure_bf16"] = "auto"
    compile: bool | None = None
    threads: int | None = pydantic.Field(None, ge=1)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> TrialConfig:
        """A checked config from plain values.

        Raises:
            ConfigError: the first setting that cannot be, in one line.
        """
        try:
            return cls.model_validate(dict(values))
        except pydantic.ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_gpu(cls, values: Any) -> Any:
        """A trial has one GPU or none; a space that asks for more is refused, whatever it calls them."""
        asked = [key for key in _GPU_COUNTS if isinstance(values, Mapping) and key in values]
        for key in asked:
            _expect(key, "1: one trial, one GPU, so that its joules are its own", values[key] == 1, values[key])
        return {key: value for key, value in values.items() if key not in asked} if asked else values

    @pydantic.model_validator(mode="before")
    @classmethod
    def _anytime_epochs(cls, values: Any) -> Any:
        """`epochs: anytime` (or `anytime:6`) is every number of epochs up to 4 (6) from one trial."""
        wanted = values.get("epochs") if isinstance(values, Mapping) else None
        if not isinstance(wanted, str) or not wanted.startswith("anytime"):
            return values
        count = wanted.partition(":")[2] or str(ANYTIME_EPOCHS)
        _expect("epochs", "anytime or anytime:COUNT", wanted.partition(":")[0] == "anytime" and count.isdigit(), wanted)
        schedule = values.get("schedule", "wsd")
        _expect("schedule", f"wsd (or none) with epochs: {wanted}", schedule == "wsd", schedule)
        return {**values, "epochs": int(count), "schedule": "wsd", "anytime": True}

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrialConfig:
        _known("router", self.router, (DENSE, *ROUTERS))
        _known("regularizer", self.regularizer, (NO_REGULARIZER, *REGULARIZERS))
        factors = self.width_factors
        count = len(factors) if self.num_experts is None else self.num_experts
        _expect("expert_width_factors", f"{count} widths (num_experts)", len(factors) == count, len(factors))
        _expect(
            "expert_width_factors", "widths ≥ 0, one of them above 0", min(factors) >= 0 and max(factors) > 0, factors
        )
        _expect("top_k", f"at most {len(factors)}, the number of experts", self.top_k <= len(factors), self.top_k)
        _expect("schedule", "wsd where anytime is set", self.schedule == "wsd" or not self.anytime, self.schedule)
        _expect("n_embd", f"a multiple of n_head ({self.n_head})", self.n_embd % self.n_head == 0, self.n_embd)
        _expect(
            "decode_batches", "batches of at least 1", all(b >= 1 for b in self.decode_batches), self.decode_batches
        )
        if self.base == "random" and self.moe_layers is not None:
            fits = list(self.moe_layers) == sorted({i for i in self.moe_layers if 0 <= i < self.n_layer})
            _expect("moe_layers", f"ascending block indices from 0 to {self.n_layer - 1}", fits, self.moe_layers)
        room = self.seq_len - self.decode_prompt_tokens
        _expect(
            "decode_new_tokens",
            f"at most {room} (seq_len − decode_prompt_tokens; change either)",
            self.decode_new_tokens <= room or not self.decode_batches,
            self.decode_new_tokens,
        )
        return self

    @property
    def is_dense(self) -> bool:
        """True for the plain model without experts."""
        return self.router == DENSE

    @property
    def width_factors(self) -> tuple[float, ...]:
        """Width of each expert relative to the dense feed-forward block; 0 is a null expert."""
        if self.expert_width_factors is not None:
            return self.expert_width_factors
        return (1.0,) * (self.num_experts or DEFAULT_EXPERTS)

    @property
    def is_priced(self) -> bool:
        """True where λ acts on what the router selects."""
        return not self.is_dense and ROUTERS[self.router].priced

    @property
    def uses_price(self) -> bool:
        """True where prices enter the router or a regularizer."""
        return self.is_priced or self.regularizer in ("expected_energy", "kl_gibbs")

    def effective(self) -> dict[str, Any]:
        """The settings that act, as JSON values: what cannot change the result is left out.

        Two configs with the same effective settings are the same experiment: λ without a price to act
        on, a regularizer's weight without a regularizer, anything about experts in a dense model.
        """
        values = self.model_dump(mode="json")
        values["expert_width_factors"] = list(self.width_factors)
        for key in ("base", "tokenizer", "data"):  # which files, not where on this host they lie
            values[key] = values[key] and re.sub(r"^/(?:.*/)?", "", values[key])
        inert = {"num_experts", *_NOT_THE_EXPERIMENT}
        if self.is_dense:
            inert |= set(_MOE_KEYS)
        if self.regularizer == NO_REGULARIZER or self.regularizer_weight == 0:
            inert |= {"regularizer", "regularizer_weight"}
        if not self.price_acts:
            inert |= {"energy_lambda", "price"}
            values["router"] = "topk" if self.router in ("energy", "opening") else self.router
        if not self.is_dense and not ROUTERS[self.router].learned:  # their defaults: identities of old stay
            values |= {key: type(self).model_fields[key].default for key in _GATE_KEYS}
        if self.schedule != "wsd":
            inert.add("decay_fraction")
        inert |= {key for router, key in (("capacity", "capacity_factor"), ("topp", "top_p")) if self.router != router}
        return {key: value for key, value in sorted(values.items()) if key not in inert}

    @property
    def price_acts(self) -> bool:
        """False where λ cannot change a decision: λ = 0, no prices, or one price for all (DESIGN §4)."""
        if self.regularizer in ("expected_energy", "kl_gibbs") and self.regularizer_weight:
            return True
        if not self.is_priced or self.energy_lambda == 0 or self.price == "zero":
            return False
        uniform = len(set(self.width_factors)) == 1 or self.price == "uniform"
        return not (uniform and self.router == "energy")

    @property
    def fingerprint(self) -> str:
        """Hash of the effective settings without the seed: replicates of an experiment share it."""
        return hashlib.sha256(json.dumps(self.effective(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def trial_id(self) -> str:
        """Name of the trial within any sweep: the experiment and its seed."""
        return f"{self.fingerprint[:10]}-s{self.seed}"


def experiment_of(trial_id: str) -> str:
    """What replicates of an experiment have in common in their ids (`TrialConfig.trial_id`)."""
    return trial_id.rsplit("-s", 1)[0]


_GATE_KEYS = ("temperature", "router_jitter", "bias_balance_rate")  # nothing to act on in `random` and `hash`
_MOE_KEYS = (
    "moe_layers", "expert_width_factors", "top_k", "energy_lambda", "price", "regularizer", "regularizer_weight",
    "temperature", "router_jitter", "bias_balance_rate", "capacity_factor", "top_p", "upcycle_noise",
)  # fmt: skip


def _known(key: str, value: str, known: tuple[str, ...]) -> None:
    _expect(key, f"one of {', '.join(known)}", value in known, value)


def _expect(key: str, expected: str, holds: bool, got: object) -> None:
    if not holds:
        raise ValueError(f"{key}: expected {expected}, got {got!r}")


def _one_line(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; expected one of {', '.join(sorted(TrialConfig.model_fields))}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    expected = message.replace("Input should be", "expected").replace("\n", " ")
    return f"{key}: {expected}, got {first['input']!r}"
