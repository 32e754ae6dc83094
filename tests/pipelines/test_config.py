"""TrialConfig: what it refuses, in which words, and when two configs are one experiment."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.config import ConfigError, TrialConfig


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("top_kk", 2, "top_kk: unknown key; expected one of anytime, base, batch_size"),
        ("energy_lambda", -0.1, "energy_lambda: expected greater than or equal to 0, got -0.1"),
        ("energy_lambda", float("nan"), "energy_lambda: expected a finite number, got nan"),
        ("top_k", 9, "top_k: expected at most 4, the number of experts, got 9"),
        ("top_k", 0, "top_k: expected greater than or equal to 1, got 0"),
        ("router", "magic", "router: expected one of dense, "),
        ("regularizer", "magic", "regularizer: expected one of none, "),
        ("price", "gold", "price: expected 'joules', "),
        ("epochs", "many", "epochs: expected a valid integer"),
        ("expert_width_factors", [0.0, 0.0], "expert_width_factors: expected widths ≥ 0, one of them above 0"),
        ("n_embd", 33, "n_embd: expected a multiple of n_head (2), got 33"),
        ("moe_layers", [5], "moe_layers: expected ascending block indices from 0 to 0, got (5,)"),
        ("temperature", 0, "temperature: expected greater than 0, got 0"),
        (
            "decode_new_tokens",
            1000,
            "decode_new_tokens: expected at most 56 (seq_len − decode_prompt_tokens; change either), got 1000",
        ),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(tiny: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrialConfig.parse(tiny | {key: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_num_experts_and_widths_must_agree(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expert_width_factors: expected 3 widths \(num_experts\), got 4"):
        TrialConfig.parse(tiny | {"num_experts": 3})


def test_a_config_is_frozen(tiny: dict[str, Any]) -> None:
    config = TrialConfig.parse(tiny)
    with pytest.raises(ValueError, match="frozen"):
        config.top_k = 3  # type: ignore[misc]


def fingerprint(tiny: dict[str, Any], **changes: Any) -> str:
    return TrialConfig.parse(tiny | changes).fingerprint


@pytest.mark.parametrize("router", ["random", "hash"])
def test_without_a_gate_temperature_jitter_and_balancing_do_not_act(tiny: dict[str, Any], router: str) -> None:
    gateless = tiny | {"router": router}
    changes = {"temperature": 2.0, "router_jitter": 0.1, "bias_balance_rate": 0.01}
    assert fingerprint(gateless) == fingerprint(gateless, **changes)
    for key, value in changes.items():
        assert fingerprint(tiny) != fingerprint(tiny, **{key: value})


def test_replicates_share_a_fingerprint_and_not_an_id(tiny: dict[str, Any]) -> None:
    one, two = (TrialConfig.parse(tiny | {"seed": seed}) for seed in (1, 2))
    assert one.fingerprint == two.fingerprint
    assert one.trial_id != two.trial_id


@pytest.mark.parametrize("change", [{"top_k": 1}, {"energy_lambda": 0.25}, {"epochs": 2}, {"regularizer_weight": 0.1}])
def test_what_acts_changes_the_fingerprint(tiny: dict[str, Any], change: dict[str, Any]) -> None:
    assert fingerprint(tiny) != fingerprint(tiny, **change)


def test_a_price_that_cannot_act_is_no_other_experiment(tiny: dict[str, Any]) -> None:
    uniform = tiny | {"expert_width_factors": [1.0, 1.0, 1.0, 1.0]}
    assert fingerprint(uniform, energy_lambda=0.5) == fingerprint(uniform, energy_lambda=0.0)
    assert fingerprint(tiny, price="uniform") == fingerprint(tiny, energy_lambda=0.0)
    assert fingerprint(tiny, price="uniform") != fingerprint(tiny)


def test_the_control_that_permutes_a_priced_router_is_priced_too(tiny: dict[str, Any]) -> None:
    permuted = tiny | {"router": "permuted", "expert_width_factors": [1, 1, 0.5, 0]}
    one, other = (TrialConfig.parse(permuted | {"energy_lambda": value}) for value in (0.1, 1.0))
    assert one.is_priced
    assert one.fingerprint != other.fingerprint


def test_a_null_expert_lets_the_price_act(tiny: dict[str, Any]) -> None:
    null = tiny | {"expert_width_factors": [1.0, 1.0, 1.0, 0.0]}
    assert fingerprint(null, energy_lambda=0.5) != fingerprint(null, energy_lambda=0.0)


def test_a_regularizer_without_weight_is_none(tiny: dict[str, Any]) -> None:
    assert fingerprint(tiny, regularizer_weight=0.0) == fingerprint(tiny, regularizer="none")


def test_the_dense_model_has_no_experts(tiny: dict[str, Any]) -> None:
    dense = tiny | {"router": "dense"}
    assert fingerprint(dense) == fingerprint(dense, top_k=1, energy_lambda=3.0, temperature=2.0)


def test_numbers_may_come_as_yaml_text(tiny: dict[str, Any]) -> None:
    assert TrialConfig.parse(tiny | {"learning_rate": "1e-3"}).learning_rate == 1e-3


def test_a_config_survives_json(tiny: dict[str, Any]) -> None:
    config = TrialConfig.parse(tiny)
    assert TrialConfig.parse(config.model_dump(mode="json")) == config
    assert TrialConfig.parse({"num_experts": 4}).width_factors == (1.0,) * 4


@pytest.mark.parametrize("key", ["gpus", "num_gpus", "gpus_per_trial"])
def test_a_trial_that_wants_more_than_one_gpu_is_refused(tiny: dict[str, Any], key: str) -> None:
    assert TrialConfig.parse(tiny | {key: 1}) == TrialConfig.parse(tiny)
    with pytest.raises(ConfigError, match=f"{key}: expected 1: one trial, one GPU.*got 2") as caught:
        TrialConfig.parse(tiny | {key: 2})
    assert "\n" not in str(caught.value)
