"""One trial without Ray: what it measures, what it writes, and how it fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hwcost import EnergyMonitor
from moe.dense import to_gpt2
from pipelines.config import ConfigError, TrialConfig
from pipelines.data import load_corpus
from pipelines.evaluation import converged_at, evaluate
from pipelines.model import Hardware, build_model
from pipelines.records import EpochRecord, PointRecord, Store, TrialRecord
from pipelines.training import NonFiniteLossError, Trainer, batches, learning_rate, steps_per_epoch
from pipelines.trial import Trial, TrialKey, run_trial


def config_of(tiny: dict[str, Any], **changes: Any) -> TrialConfig:
    return TrialConfig.parse(tiny | changes)


def built(config: TrialConfig) -> tuple[Any, Any, Hardware]:
    corpus, hardware = load_corpus(config), Hardware.of(config)
    return build_model(config, corpus, hardware)[0], corpus, hardware


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> tuple[TrialRecord, Store]:
    out = tmp_path_factory.mktemp("out")
    return run_trial(TrialConfig.parse(tiny_values | {"epochs": 2, "test": True}), out=out), Store(out)


def test_a_trial_learns_and_writes_its_tables(finished: tuple[TrialRecord, Store]) -> None:
    record, store = finished
    assert record.state == "COMPLETED", record.error
    epochs = store.read(EpochRecord, "single").to_pylist()
    assert [e["epoch"] for e in epochs] == [0, 1, 2]
    assert epochs[2]["eval_loss_nats"] < epochs[0]["eval_loss_nats"]
    assert epochs[0]["eval_loss_nats"] == pytest.approx(math.log(512), rel=0.05)
    assert record.eval_loss_nats == epochs[2]["eval_loss_nats"]
    assert record.tokens_trained == 2 * 2048 * 63 // 64
    assert store.read(TrialRecord, "single").num_rows == 1
    (point,) = store.read(PointRecord, "single").to_pylist()
    assert point["train_energy_j"] == record.train_energy_j


def test_the_ledger_adds_up_to_the_span(finished: tuple[TrialRecord, Store]) -> None:
    record, _ = finished
    assert record.energy_source in ("modelled", "rapl")
    parts = (
        record.setup_energy_j,
        record.train_energy_j,
        record.eval_energy_j,
        record.idle_energy_j,
        record.lost_energy_j,
    )
    assert None not in parts
    assert sum(p for p in parts if p is not None) == pytest.approx(record.total_energy_j)
    assert record.idle_energy_j is not None
    assert record.idle_energy_j >= -1e-6


def test_phases_and_routing_are_reported(finished: tuple[TrialRecord, Store]) -> None:
    record, _ = finished
    for name in (
        "prefill_j_per_token",
        "decode_j_per_token",
        "train_j_per_token",
        "tokens_per_s",
        "test_loss_nats",
        "prefill_tokens_per_s",
    ):
        value = getattr(record, name)
        assert value is not None, name
        assert value > 0, name
    assert record.decode_batch == 2
    assert record.routing_diversity is not None
    assert 0 < record.routing_diversity <= 1
    assert record.routing_agreement is not None
    assert record.routing_agreement <= 1
    assert record.price_join is not None
    assert record.price_join[-1] == 0
    assert record.expert_widths == [128, 64, 64, 0]


def test_unknown_is_null_never_zero(finished: tuple[TrialRecord, Store]) -> None:
    record, _ = finished
    assert record.gpu_uuid is None
    assert record.max_temperature_c is None
    assert record.decode_j_per_token_b32 is None


def test_the_same_seed_gives_the_same_loss_to_the_bit(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tiny, router_jitter=0.1)
    losses = [run_trial(config, out=tmp_path / name).eval_loss_nats for name in "ab"]
    assert losses[0] == losses[1]
    assert run_trial(config_of(tiny, seed=1), out=tmp_path / "c").eval_loss_nats != losses[0]


def test_the_dense_model_is_the_plain_gpt2(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tiny, router="dense")
    model, corpus, _ = built(config)
    assert not model.routers
    plain = to_gpt2(model)
    assert type(plain) is transformers.GPT2LMHeadModel
    block_BS = corpus.splits["train"].blocks_NS[:2].long()
    torch.testing.assert_close(plain.eval()(block_BS).logits, model.eval()(block_BS).logits)
    record = run_trial(config, out=tmp_path)
    assert record.state == "COMPLETED", record.error
    assert record.top_k is None
    assert record.routing_diversity is None


def test_the_dense_model_compiles_without_a_graph_break(tiny: dict[str, Any]) -> None:
    model, corpus, _ = built(config_of(tiny, router="dense"))
    block_BS = corpus.splits["train"].blocks_NS[:2].long()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(input_ids=block_BS, labels=block_BS, use_cache=False).loss.isfinite()


def test_perturbing_one_expert_changes_the_logits(tiny: dict[str, Any]) -> None:
    config = config_of(tiny, energy_lambda=0.0)
    model, corpus, _ = built(config)
    block_BS = corpus.splits["validation"].blocks_NS[:4].long()
    with torch.no_grad():
        model.eval()
        before = model(input_ids=block_BS).logits
        experts = [p for name, p in model.named_parameters() if "experts" in name]
        assert experts
        for parameter in experts:
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.allclose(before, model(input_ids=block_BS).logits, atol=1e-4)


def test_loss_is_next_token_cross_entropy_in_nats(tiny: dict[str, Any]) -> None:
    config = config_of(tiny)
    model, corpus, hardware = built(config)
    split = corpus.splits["validation"].first(512)
    found = evaluate(model, split, config, hardware)
    with torch.no_grad():
        logits = model(input_ids=split.blocks_NS.long()).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), split.blocks_NS[:, 1:].reshape(-1).long()
        )
    assert found.loss_nats == pytest.approx(float(expected), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(found.loss_nats / math.log(2) / split.bytes_per_token)


def test_drops_are_those_of_the_training_steps(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Every step has the same tokens and the capacity is a share of them, so with a factor of ½ at least half drop."""
    keys = {"router": "capacity", "capacity_factor": 0.5, "epochs": 2}
    record = run_trial(config_of(tiny, **keys), out=tmp_path)
    start, *epochs = Store(tmp_path).read(EpochRecord, "single").to_pylist()
    assert start["dropped_fraction"] is start["layer_dropped_fraction"] is None
    for epoch in epochs:
        layers = epoch["layer_dropped_fraction"]
        assert len(layers) == config_of(tiny).n_layer
        assert all(0.49 < share < 1 for share in layers)
        assert epoch["dropped_fraction"] == pytest.approx(sum(layers) / len(layers))
    assert record.dropped_fraction == pytest.approx(sum(e["dropped_fraction"] for e in epochs) / 2)


def test_routing_by_layer_has_the_mean_beside_it(finished: tuple[TrialRecord, Store]) -> None:
    _, store = finished
    for epoch in store.read(EpochRecord, "single").to_pylist():
        names = ("effective_experts", "max_violation", "dead_experts", "domain_specialisation", "routing_agreement")
        for name in names:
            layers = epoch[f"layer_{name}"]
            assert epoch[name] == pytest.approx(sum(layers) / len(layers)), name


def test_the_audit_has_an_entry_for_each_layer_with_experts(tiny: dict[str, Any], tmp_path: Path) -> None:
    keys = {"n_layer": 3, "moe_layers": [0, 2], "energy_lambda": 1.0, "temperature": 2.0, "epochs": 1}
    record = run_trial(config_of(tiny, **keys), out=tmp_path)
    start, end = Store(tmp_path).read(EpochRecord, "single").to_pylist()
    for epoch in (start, end):
        for name in ("price_drift", "lambda_undone", "price_flip_fraction", "logit_std"):
            layers = epoch[f"layer_{name}"]
            assert len(layers) == 2, name
            assert epoch[name] == pytest.approx(sum(layers) / 2), name
        assert min(epoch["layer_logit_std"]) > 0
        assert epoch["layer_lambda_undone"] == pytest.approx([drift / 2.0 for drift in epoch["layer_price_drift"]])
        assert 0 < min(epoch["layer_price_flip_fraction"]) <= max(epoch["layer_price_flip_fraction"]) <= 1
    for name in ("price_drift", "lambda_undone"):
        assert start[f"layer_{name}"] == [0.0, 0.0]
        assert 0.0 not in end[f"layer_{name}"]
        assert getattr(record, name) == end[name]


def test_a_router_without_capacity_drops_none(finished: tuple[TrialRecord, Store]) -> None:
    record, store = finished
    assert record.dropped_fraction == 0.0
    assert [e["dropped_fraction"] for e in store.read(EpochRecord, "single").to_pylist()] == [None, 0.0, 0.0]


def test_warming_up_leaves_no_trace(tiny: dict[str, Any]) -> None:
    config = config_of(tiny, bias_balance_rate=0.01, router_jitter=0.1)
    model, corpus, hardware = built(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    Trainer(model, config, hardware, corpus.splits["train"]).warm_up()
    assert torch.equal(random_state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name


def test_batches_of_an_epoch_are_shuffled_and_whole(tiny: dict[str, Any]) -> None:
    config = config_of(tiny)
    split = load_corpus(config).splits["train"].first(2048)
    first, again, second = (torch.cat(list(batches(split, config, epoch, torch.device("cpu")))) for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert sorted(first[:, 0].tolist()) == sorted(split.blocks_NS[:, 0].tolist())
    assert steps_per_epoch(split, config) == 8


def test_the_schedule_warms_up_and_decays(tiny: dict[str, Any]) -> None:
    config = config_of(tiny, learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rate(config_of(tiny, schedule="constant", learning_rate=1.0), 90, 100) == 1.0


def test_nan_becomes_a_failed_row_with_its_reason(tiny: dict[str, Any], tmp_path: Path) -> None:
    record = run_trial(config_of(tiny, learning_rate=1e6, grad_clip=1e6, epochs=3), out=tmp_path)
    assert record.state == "FAILED"
    assert record.error is not None
    assert record.error.startswith(NonFiniteLossError.__name__)
    assert Store(tmp_path).read(TrialRecord, "single").to_pylist()[0]["error"] == record.error


def test_an_evaluation_that_is_not_finite_fails_too(tiny: dict[str, Any], tmp_path: Path) -> None:
    record = run_trial(config_of(tiny, learning_rate=1e30, grad_clip=1e6, max_train_tokens=256), out=tmp_path)
    assert record.state == "FAILED"
    assert record.error is not None
    assert "not finite" in record.error


def test_a_model_with_experts_is_no_base(tiny: dict[str, Any], tmp_path: Path) -> None:
    built(config_of(tiny))[0].save_pretrained(tmp_path / "moe")
    with pytest.raises(ConfigError, match="a model with experts cannot be a base"):
        built(config_of(tiny, base=str(tmp_path / "moe"), tokenizer="embedded"))


def test_a_trial_that_is_stopped_is_censored(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tiny, epochs=3)
    with EnergyMonitor.for_assigned_devices() as monitor:
        trial = Trial(config, TrialKey(sweep_id="s", trial_id=config.trial_id), Store(tmp_path), monitor)
        trial.advance()
        trial.advance()
        record = trial.stop()
    assert (record.state, record.censored) == ("STOPPED", True)
    assert Store(tmp_path).read(PointRecord, "s").num_rows == 0


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [([3.0, 2.0, 1.999, 1.9], 2), ([3.0, 2.0, 1.0], None), ([3.0], None), ([2.0, 2.1], 1), ([3.0, None, 2.0], None)],
)
def test_convergence_is_half_a_percent(losses: list[float | None], epoch: int | None) -> None:
    assert converged_at(losses) == epoch


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without a GPU")
def test_a_gpu_where_there_is_none_is_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="device: expected a CUDA GPU"):
        Hardware.of(config_of(tiny, device="cuda"))


def test_a_checkpoint_folder_can_be_the_base(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tiny, router="dense")
    built(config)[0].save_pretrained(tmp_path / "dense")
    record = run_trial(
        config_of(tiny, base=str(tmp_path / "dense"), tokenizer="embedded", upcycle_noise=0.0), out=tmp_path / "out"
    )
    assert record.state == "COMPLETED", record.error


def test_a_base_that_does_not_fit_is_named(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tiny, router="dense")
    built(config)[0].save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="seq_len: expected at most 64"):
        built(config_of(tiny, base=str(tmp_path / "dense"), tokenizer="embedded", seq_len=128))
