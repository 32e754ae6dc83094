"""The reference study: its spaces are what they say, and its tables are those of its data."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import mixed_corpus, study, study_controls, study_members, study_phases, study_prices, study_rows
from benchmarks.study_controls import references
from benchmarks.study_rows import STAGES, Mean, Spread
from benchmarks.trained import texts
from pipelines.chart import Chart
from pipelines.config import TrialConfig
from pipelines.data import Corpus, TokenSplit
from pipelines.plan import plan_sweep
from pipelines.records import TrialRecord
from pipelines.trial_rows import config_columns
from tests.pipelines import synthetic
from tune_spaces import load_space, shipped_spaces

ROOT = Path(__file__).resolve().parent.parent
#: Studies whose tables are committed beside their data.
COMMITTED = sorted(path.parent for path in ROOT.glob("docs/study-*/tables.md"))
BOARDS = ("GPU-aaaa", "GPU-bbbb")
#: Stages whose space is shipped; that of `members` comes from the front's results.
SPACES = [stage for stage in STAGES if stage != "members"]


def trials(stage: str, **options: Any) -> tuple[TrialConfig, ...]:
    return plan_sweep(load_space(shipped_spaces()[f"study/{stage}.yaml"]), **options).trials


def second_look(folder: Path, **options: int) -> tuple[TrialConfig, ...]:
    """The trials of stage `members` after the front that lies in a folder."""
    study_members.write(folder, "front", folder / "members.yaml", **({"seeds": 5, "most": 8} | options))
    return plan_sweep(load_space(folder / "members.yaml")).trials


# --- the spaces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SPACES)
def test_every_stage_has_a_space_of_the_models_own_size(stage: str) -> None:
    space = load_space(shipped_spaces()[f"study/{stage}.yaml"])
    assert space.question
    for config in trials(stage):
        assert (config.seq_len, config.batch_size, config.n_layer, config.n_embd) == (1024, 16, 6, 768)
        assert config.checkpoint == (stage == "pretrain")
        assert bool(config.decode_batches) == (stage == "phases" or config.router in ("opening", "piggyback"))


def test_the_front_crosses_prices_with_top_k_and_regularizers_where_widths_differ() -> None:
    found = trials("front")
    assert len(found) == 54
    equal = [config for config in found if len(set(config.width_factors)) == 1]
    assert {config.energy_lambda for config in equal} == {0.0}
    assert {config.regularizer for config in found[:18]} == {"load_balance"}  # what a cut leaves is a design


def test_controls_share_seeds_and_the_configurations_of_other_stages() -> None:
    by_stage = {stage: {config.fingerprint for config in trials(stage)} for stage in SPACES}
    assert by_stage["repeatability"] < by_stage["front"]
    assert by_stage["repeatability"] < by_stage["controls"]
    for stage in ("controls", "controls_routers"):
        assert {config.seed for config in trials(stage)} == set(range(5))
    assert len({config.router for config in trials("controls_routers")}) == 6
    both = by_stage["controls"] & by_stage["controls_routers"]
    assert both == {trials("controls_routers")[0].fingerprint}  # its baseline runs beside its routers


# --- the tables --------------------------------------------------------------------------------------------


def rows_of(stage: str, configs: tuple[TrialConfig, ...], rng: np.random.Generator) -> list[TrialRecord]:
    """Trials of a stage with joules and losses by formula: K = 1 takes a fifth less, λ a tenth, boards differ."""
    made = []
    for i, config in enumerate(configs):
        board, factor = BOARDS[i % 2], 1.04 if i % 2 else 1.0
        joules = 1000.0 * config.epochs * factor
        joules *= {1: 0.8, 2: 1.0, 4: 1.5}[config.top_k] if not config.is_dense else 0.7
        joules *= 0.9 if config.price_acts else 1.0
        loss = 3.5 - 0.05 * math.log2(config.top_k) - 0.03 * config.epochs + 0.02 * config.price_acts
        share = 1.0 if config.max_train_tokens is None else 0.5
        joules, loss = joules * share, loss + 0.16 * (1 - share) - (stage == "long")
        joules *= 1 + 0.002 * rng.standard_normal()
        decode = {f"decode_j_per_token_b{b}": 0.1 / b for b in config.decode_batches}
        made.append(
            synthetic.trial(
                config.trial_id,
                **config_columns(config),
                sweep_id=f"{stage}-20260101-120000-abcd",
                gpu_uuid=board,
                train_energy_j=joules,
                train_energy_dynamic_j=None,
                total_energy_j=1.5 * joules,
                modelled_train_energy_j=1.1 * 1.02 * joules / factor,  # of the mean board
                tokens_trained=int(1_000_000 * config.epochs * share),
                train_j_per_token=joules / 1e6 / config.epochs / share,
                corpus_fingerprint="mixed" if stage == "long" else "corpus",
                eval_loss_nats=loss + 0.001 * rng.standard_normal(),
                test_loss_nats=loss + 0.1 + 0.001 * rng.standard_normal(),
                train_duration_s=joules / 600,
                duration_s=joules / 300,
                mean_selected_width=None if config.is_dense else 2000.0,
                dtype="bf16",
                **decode,
            )
        )
    return made


def written(folder: Path, *stages: str) -> Path:
    rng = np.random.default_rng(0)
    for stage in stages:
        configs = second_look(folder) if stage == "members" else trials(stage)
        store = synthetic.write_compacted(folder, rows_of(stage, configs, rng))
    synthetic.write_anchors(
        store,
        *(
            synthetic.anchor(board, "start", 1e-3 * factor, sweep_id=f"{stages[0]}-20260101-120000-abcd")
            for board, factor in zip(BOARDS, (1.0, 1.04), strict=True)
        ),
    )
    return folder


def at_test_time(folder: Path) -> None:
    """What benchmarks/adapt.py and benchmarks/opening.py leave; the second load is missed by the replay alone."""

    def windows(*millijoules: float | None) -> list[dict[str, Any]]:
        return [{"j_per_token": value and value / 1e3} for value in millijoules]

    change = {"budget_j": 1.1e-3, "before": 0.001, "jump": 0.08, "infeasible": False, "first": windows(1.1, 1.1)}
    kept = {"budget_j": 1.1e-3, "off": -0.0021, "spread": [1.1e-3] * 20, "pairs": [{}] * 5, "raw": [0.0012, 0.0005]}
    point = {"energy_lambda": 4.0, "j_per_token": 0.9e-3, "loss_nats": 3.5, "width": 2000.0}
    price = {
        "name": "join 3072",
        "table_j": 5e-6,
        "learnt_j": 6e-6,
        "low_j": -math.inf,
        "high_j": 9e-6,
        "trusted": False,
    }
    adapt = {
        "device": {"name": "Synthetic GPU", "source": "counter", "set": {"base": "/elsewhere/study-base"}},
        "training energy": {"router": "energy", "tokens": 4_000_000},
        "reach": {"points": [point | {"energy_lambda": 0.0, "j_per_token": 1.2e-3}, point]},
        "budget 0.75": {**kept, "at_equal_joules": [0.0003, math.nan], "update_s": 0.2, "span_s": 20.0},
        "budget 0.25 failed": "Traceback",
        "load changes": {
            "feedback": {**change, "settled": 0.004, "settled_after": 2, "second": windows(1.2, None, 1.1)},
            "replay": {**change, "first": windows(1.1), "settled": 0.081, "second": windows(1.2, 1.2, 1.2)},
        },
        "prices": {"profile": "synthetic", "analytic": False, "windows": 30, "prices": [price]},
    }  # fmt: skip
    row = {"trained": "topk", "batch": 32, "router": "topk", "top_k": 2, "energy_lambda": 0.0, "loss_nats": 3.5}
    measured = {"open": 6.5, "mj_per_token": 2.0, "uncertainty_mj": 0.01, "step_ms": 0.7, "step": "captured"}
    priced = {"router": "opening", "energy_lambda": 0.01, "mj_per_token": None}
    opened = {
        "rows": [row | measured, row | measured | priced],
        "overhead": [{"trained": "topk", "batch": 32, "share_of_step": 0.1, "share_of_joules": 0.07}],
    }
    (folder / "adapt.json").write_text(json.dumps(adapt), encoding="utf-8")
    (folder / "opening.json").write_text(json.dumps(opened), encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = written(tmp_path_factory.mktemp("study"), *STAGES)
    at_test_time(folder)
    return folder


def numbers(line: str) -> list[float]:
    return [float(word) for word in re.findall(r"[+-]?\d+\.\d+", line)]


def line(text: str, begin: str, *, after: str) -> str:
    return next(row for row in text.split(after, 1)[1].splitlines() if row.startswith(f"| {begin} |"))


def test_effects_that_were_put_in_come_out(whole: Path) -> None:
    found = study.load(whole)
    text = study.page(found, study.sections(found))
    assert "Not run." not in text
    assert "2 boards of one model corrected by their anchor workload" in text
    change, _, beyond = numbers(line(text, "top-k, K=1", after="paired by seed"))[:3]
    assert change == pytest.approx(100 * math.log(0.8), abs=1)
    assert beyond > 3
    spread = study_rows.joules_spread(found)
    assert spread is not None
    assert spread.value == pytest.approx(0.002, rel=0.6)
    loss, half, joules = numbers(line(text, "dense", after="Against no price").replace("5 |", "", 1))[:3]
    assert loss == pytest.approx(0.0, abs=0.06)
    assert 0 < half < 0.01
    assert joules == pytest.approx(100 * math.log(0.7), abs=1)
    longer = numbers(line(text, "dense, 2 epochs", after="Against no price").replace("5 |", "", 1))
    assert longer[2] == pytest.approx(100 * math.log(1.4), abs=1)  # all of its joules, not those per token
    assert "mean absolute error 10.0%" in text
    assert "orders 100.0% alike" in text


def test_more_text_holds_mixtures_against_the_dense_line_of_its_own(tmp_path: Path) -> None:
    """At the loss of K = 1 (0.05 nat above dense) the line of dense runs is 3/8 of the way from half to all tokens."""
    found = study.load(written(tmp_path, "repeatability", "long"))
    section = next(section for section in study.sections(found) if section.title == "More text")
    said, table, told = section.text
    assert "(dense, 15 M tokens to dense to dense, 2 epochs)" in said
    rows = {name.strip(): cells for _, name, *cells, _ in (row.split("|") for row in table.splitlines())}
    assert [cell.strip() for cell in rows["dense"][5:]] == ["–"] * 5
    loss, times, joules, _, saved = (float(cell) for cell in rows["top-k, K=1, 8×1"][5:])
    assert loss == pytest.approx(0.05, abs=0.005)
    spread = study_rows.loss_spread(found)
    assert spread is not None
    assert times == pytest.approx(loss / spread.value, abs=0.1)
    assert joules == pytest.approx(100 * math.log(0.8 / 0.7), abs=1)
    assert saved == pytest.approx(100 * (1 - 0.8 / (0.35 * 2 ** (3 / 8))), abs=4)
    half = [float(cell) for cell in rows["dense, 15 M tokens"][:2] + rows["dense, 15 M tokens"][5:9:2]]
    assert half == pytest.approx([0.5, 357, 0.08, -100 * math.log(2)], rel=0.05)
    assert re.search(r"dominates [1-4] of 4 mixtures", told)


def test_losses_on_other_text_enter_no_other_stage(tmp_path: Path) -> None:
    """The same experiments by name, seed and board, on text of which every loss is 1 nat lower."""
    stages = ("repeatability", "front", "controls")
    without, beside = (
        study.load(written(tmp_path / name, *stages, *more)) for name, more in (("a", []), ("b", ["long"]))
    )
    assert without.context == beside.context
    assert len(beside.stage("long")) == 7
    names = ("cost", "long", "modelled")
    for section in (one for one in study.SECTIONS if one.__name__ not in names):
        assert section(without) == section(beside), section.__name__
    pairs = [re.findall(r"Of (\d+) pairs", " ".join(study_phases.modelled(one).text)) for one in (without, beside)]
    mixed = len(beside.stage("long"))
    assert all(int(a) <= int(b) <= int(a) + mixed * (mixed - 1) / 2 for a, b in zip(*pairs, strict=True))


def test_another_epoch_is_judged_for_dense_and_mixtures_alike(tmp_path: Path) -> None:
    """Each end's joules and loss are those that were written; a second epoch takes as much as the first."""
    found = study.load(written(tmp_path, "epochs"))
    section = next(section for section in study.sections(found) if section.title == "Another epoch")
    for name in ("dense", "top-k, K=1", "top-k, K=2", "energy, K=2, λ=1"):
        row = next(row for row in section.text[1].splitlines() if row.startswith(f"| {name}, 2 epochs |"))
        trial = next(row for row in study_rows.named(found.stage("epochs")) if row["name"].startswith(name))
        _, loss, joules, change = numbers(row.replace(row.split("|")[2], " 0.0 "))
        assert loss == pytest.approx(trial["eval_loss_nats"], abs=1e-4)
        assert joules == pytest.approx(100 * math.log(2), abs=0.01)
        assert change == pytest.approx(-0.5, abs=1e-3)
        assert f"| {name}, 1 epoch |" in section.text[1]


def test_dense_runs_stand_beside_the_front_that_they_dominate(whole: Path) -> None:
    found = study.load(whole)
    front = next(section for section in study.sections(found) if section.title == "The front")
    dense = [row for row in found.stage("controls") if row["router"] == "dense" and row["epochs"] == 1]
    joules, loss = (float(np.mean([row[key] for row in dense])) for key in ("train_energy_j", "eval_loss_nats"))
    told = next(part for part in front.text if part.startswith("Dense, of the controls"))
    assert f"* dense: {joules:.0f} ± " in told
    assert "(5 seeds)" in told
    members = [[cell.split(" ±")[0] for cell in line.split("|")[2:4]] for line in front.text[1].splitlines()[2:]]
    worse = [x for x, y in members if float(x) > joules and float(y) > loss]
    assert 0 < len(worse) < len(members)
    assert f"dominates {len(worse)} of {len(members)} members" in told
    spreads = study_rows.joules_spread(found, over_boards=True), study_rows.loss_spread(found)
    of_joules, of_loss = (3 * spread.value for spread in spreads if spread is not None)
    clear = [x for x, y in members if float(x) > joules * math.exp(of_joules) and float(y) > loss + of_loss]
    assert f", {len(clear)} by three times the A/A spreads or more on both axes" in told
    (chart,) = front.figures
    assert isinstance(chart, Chart)
    assert [point.tip for point in chart.points[-2:]] == ["dense", "dense, 2 epochs"]
    assert chart.points[-2].x == pytest.approx(joules)
    assert any(key.label == "dense, of the controls" for key in chart.legend)


def test_a_front_without_controls_shows_no_dense_runs(tmp_path: Path) -> None:
    found = study.load(written(tmp_path, "front"))
    front = next(section for section in study.sections(found) if section.title == "The front")
    assert not any("ense" in part for part in front.text)
    (chart,) = front.figures
    assert isinstance(chart, Chart)
    assert not any("dense" in key.label for key in chart.legend)
    assert len(chart.lines) == 1


def test_the_fronts_members_and_neighbours_run_again_with_seeds_of_their_own(whole: Path) -> None:
    planned = second_look(whole)
    assert {config.seed for config in planned} == {1, 2, 3, 4, 5}  # the front has seed 0
    first = [config for config in planned if config.seed == 1]
    assert len(first) == 9
    front, settings = study_members.front_of(whole, "front")
    by_fingerprint = {TrialConfig.parse(config).fingerprint: i for i, config in enumerate(settings)}
    chosen = [by_fingerprint[config.fingerprint] for config in first]  # the experiments are the front's, keys and all
    order = front.order().tolist()
    assert {order[0], order[-1], study_rows.baseline(settings)} <= set(chosen)
    beside = set[int]().union(*(study_members.neighbours(settings, i) for i in order))
    assert set(chosen) <= {*order, *beside, study_rows.baseline(settings)}
    shapes = [(c.regularizer, c.width_factors, c.top_k) for c in first]
    runs = 1 + sum(one != other for one, other in itertools.pairwise(shapes))
    assert runs == len(set(shapes)) <= 6  # trials of one shape stand side by side


def test_a_front_of_too_many_members_is_thinned_evenly() -> None:
    configs = [{**TrialConfig(energy_lambda=i / 10).model_dump(mode="json"), "router": "energy"} for i in range(20)]
    joules, loss = 20.0 - np.arange(20), 3.0 + np.arange(20)
    chosen = study_members.choose(configs, joules, loss, np.ones(20, bool), 5)
    assert sorted(chosen) == [0, 5, 9, 14, 19]


def test_neighbours_differ_by_one_step_of_price_or_top_k() -> None:
    configs = [
        {**TrialConfig(top_k=k, energy_lambda=p).model_dump(mode="json")} for k in (1, 2, 4) for p in (0.0, 0.1, 1.0)
    ]
    assert study_members.neighbours(configs, 4) == {3, 5, 1, 7}
    assert study_members.neighbours(configs, 0) == {1, 3}


def test_members_are_judged_on_the_test_split_against_the_baseline(whole: Path) -> None:
    found = study.load(whole)
    text = study.page(found, study.sections(found)).split("members on the test split", 1)[1].split("\n## ")[0]
    assert "changes from top-k, K=2, paired by seed" in text
    assert "joules of boards are corrected by their anchors" in text
    row = next(line for line in text.splitlines() if line.startswith("| top-k, K=1"))
    joules, half, loss = numbers(row.split("|")[5])[0], numbers(row.split("|")[5])[1], numbers(row.split("|")[6])[0]
    assert joules == pytest.approx(100 * math.log(0.8), abs=1)
    assert 0 < half < 1
    assert loss == pytest.approx(0.05, abs=0.005)


def test_budgets_changes_and_prices_come_from_the_benchmark_beside_the_data(whole: Path) -> None:
    found = study.load(whole)
    text = study.page(found, study.sections(found))
    assert "Model: the study's dense model, 4.0 M tokens with energy" in text
    assert "0.9000 to 1.2000 mJ/token (25.0%)" in text
    assert "| 75% | 1.1000 | 20 | -0.21% | 5 | – | +0.00120 ± 0.00050 | +0.00030 | – | 1.00% |" in text
    assert "| load | feedback | +0.10% | +8.00% | +0.40% | 2 |  |" in text
    assert "| load | replay | +0.10% | +8.00% | +8.10% | – |  |" in text
    assert "| join 3072 | 5.000 | 6.000 | – to 9.000 | no |" in text
    assert "Broke off: budget 0.25." in text
    chart = next(figure for section in study.sections(found) for figure in section.figures if figure.id == "load")
    assert isinstance(chart, Chart)
    assert [list(line.x) for line in chart.lines[:2]] == [
        [1, 2, 3, 5],
        [2, 3, 4, 5],
    ]  # an unmeasured window is left out, and the change stands at one place
    assert "| topk, K=2 | topk | 32 | 3.5000 | 6.50 | 2.000 ± 0.020 | 0.700 |" in text
    assert "+7.0% joules, +10.0% time at batch 32 (topk)" in text


def test_text_that_a_base_has_read_is_not_called_unseen() -> None:
    def split(value: int) -> TokenSplit:
        blocks_NS = torch.full((6, 8), value, dtype=torch.int32)
        return TokenSplit(blocks_NS=blocks_NS, domain_N=torch.zeros(6, dtype=torch.int64), bytes_per_token=4.0)

    splits = {name: split(i) for i, name in enumerate(("train", "validation", "test"))}
    corpus = Corpus(splits=splits, domains=("a",), vocab_size=3, fingerprint="", end_id=None)
    assert [len(part.blocks_NS) for part in texts(corpus, "random")] == [4, 2]
    learnt, unseen = texts(corpus, "study-base")
    assert learnt is splits["train"]
    assert unseen.blocks_NS[:, 0].tolist() == [1] * 6 + [2] * 6
    assert len(unseen.domain_N) == 12


def test_phases_make_no_claim_where_launches_bound_the_time(whole: Path) -> None:
    found = study.load(whole)
    row = next(row for row in study_rows.named(found.stage("phases")) if row["name"] == "top-k, K=2")
    row |= {"gpu_name": "NVIDIA H100 80GB HBM3"}  # whose launches a profile knows

    def one(batch: int, milliseconds: float) -> study_phases.Reached:
        watts = row[f"decode_j_per_token_b{batch}"] / row["board_factor"] * batch / milliseconds * 1e3
        phases = study_phases.reached(row, {(row["trial_id"], f"decode_b{batch}"): watts}, (batch,))
        assert phases["prefill"].seconds is None  # no samples of it
        return phases[f"decode, batch {batch}"]

    assert one(1, 0.5).seconds == pytest.approx(0.5e-3)
    assert one(1, 0.5).by_launches
    assert not one(128, 0.5).by_launches  # all experts are read
    timed = row | {"decode_tokens_per_s_b8": 8 / 2e-3}
    assert study_phases.reached(timed, {}, (8,))["decode, batch 8"].seconds == pytest.approx(2e-3)  # as measured
    assert one(128, 0.25).flops_per_s == pytest.approx(2 * (one(128, 0.5).flops_per_s or 0))
    text = study.page(found, study.sections(found)).split("## Phases apart", 1)[1].split("\n## ")[0]
    claims = {
        row.split("|")[2].strip(): row.split("|")[-2].strip() for row in text.splitlines() if "| training |" in row
    }
    assert claims["top-k, K=2"] == ""
    assert claims["top-k, K=1"] == claims["energy, K=2, λ=1"] == "fewer joules"
    assert (
        "| decode, batch 1 | top-k, K=1 | 1.000 | – | – | – | – | – | – | none: time or repeatability not known |"
        in text
    )


def test_boards_without_an_anchor_are_compared_within_themselves_only(tmp_path: Path) -> None:
    written(tmp_path, "controls")
    for path in tmp_path.glob("anchors/*/*.parquet"):
        path.unlink()
    found = study.load(tmp_path)
    assert not found.corrected
    rows = found.stage("controls")
    base, *others = list(study_rows.by_config(rows).values())
    board = {row["seed"]: row["gpu_uuid"] for row in base}
    for group in others:
        mean = study_rows.paired(group, base, study_rows.log_joules)
        same = [row for row in group if row["gpu_uuid"] == board[row["seed"]]]
        assert (0 if mean is None else mean.count) == len(same)
    text = study.page(found, study.sections(found))
    assert "boards have no anchor, so only these are compared" in text
    assert "At equal loss: not judged" in text
    assert "saves" not in text.split("## Controls", 1)[1]


def test_saving_at_equal_loss_is_that_over_the_line_of_top_k(whole: Path) -> None:
    """λ = 1 at K = 2: a loss 2/5 of the way to K = 1, where the line saves 1 - 0.8^0.4, and a tenth saved in all."""
    found = study.load(whole)
    text = study.page(found, study.sections(found))
    saved = numbers(line(text, "energy, K=2, λ=1", after="line of K"))[0]
    assert saved == pytest.approx(100 * (1 - 0.9 / 0.8**0.4), abs=2)


def test_the_references_are_what_a_price_must_beat(whole: Path) -> None:
    rows = study_rows.named(study_rows.load(whole).stage("controls", "controls_routers"))
    found = {what: row["config"] for what, row in references(rows).items()}
    assert [(c["router"], c["top_k"], c["energy_lambda"], c["price"]) for c in found.values()] == [
        ("energy", 2, 0.0, "joules"),
        ("energy", 1, 0.0, "joules"),
        ("energy", 2, 1.0, "shuffled"),
    ]


def test_routers_are_paired_with_the_baseline_of_their_own_stage(tmp_path: Path) -> None:
    """The other stage's baseline takes twice the joules here, and is the only one for the last seed."""
    rng = np.random.default_rng(0)
    routers = [config for config in trials("controls_routers") if config.seed < 4 or config.router != "energy"]
    plain = routers[0].fingerprint
    rows = rows_of("controls", trials("controls"), rng)
    rows = [
        dataclasses.replace(row, train_energy_j=2 * (row.train_energy_j or 0))
        if row.config_fingerprint == plain
        else row
        for row in rows
    ]
    store = synthetic.write_compacted(tmp_path, [*rows, *rows_of("controls_routers", tuple(routers), rng)])
    synthetic.write_anchors(store, *(synthetic.anchor(board, "start", 1e-3) for board in BOARDS))
    found = study.load(tmp_path)
    text = study.page(found, study.sections(found)).split("## Controls", 1)[1]
    own, other = study_controls.sides(found, study_rows.named(found.stage(*study_controls.STAGES)))
    assert [row["stage"] for row in other.groups[plain]] == ["controls_routers"] * 4 + ["controls"]
    assert {row["stage"] for row in own.groups[plain]} == {"controls"}
    assert (
        numbers(line(text, "top-k, K=2", after="Means"))[0]
        > 1.5 * numbers(line(text, "top-k, K=2 (controls_routers)", after="Means"))[0]
    )
    after = "Against no price"
    lower = numbers(line(text, "top-k, K=1", after=after))
    assert lower[2] == pytest.approx(100 * math.log(0.4), abs=4)  # a board is 4 % from the other
    capacity = next(row for row in other.groups.values() if row[0]["router"] == "capacity")
    four = study_rows.paired(capacity[:4], other.groups[plain], study_rows.log_total)
    assert four is not None
    assert four.mean == pytest.approx(0.0, abs=0.05)
    assert "Stage controls: " in text
    assert "Stage controls_routers: " in text
    assert "adjusted for all candidates that its stage tried" in text


@pytest.mark.parametrize("stage", ["repeatability", "controls", "controls_routers", "phases"])
def test_a_stage_alone_is_told_and_the_others_are_missed(tmp_path: Path, stage: str) -> None:
    found = study.load(written(tmp_path, stage))
    text = study.page(found, study.sections(found))
    assert text.count("Not run.") >= 3
    study.write(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "tables.md").read_text(encoding="utf-8") == text


def test_figures_are_written_for_papers(whole: Path, tmp_path: Path) -> None:
    study.write(whole, tmp_path)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {path.stem for path in tmp_path.glob("*.svg")} == {
        "front", "members", "controls", "phases", "load", "model-1", "model-2", "collapse",
    }  # fmt: skip


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the results of a study"):
        study.load(tmp_path)


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_tables_are_those_of_their_data(folder: Path) -> None:
    found = study.load(folder / "data")
    assert (folder / "tables.md").read_text(encoding="utf-8") == study.page(found, study.sections(found))


def test_small_samples_have_students_intervals() -> None:
    mean = Mean.of([1.0, 2.0, None, 3.0])
    assert mean is not None
    assert mean.half == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert Mean.of([None]) is None
    single = Mean.of([1.0])
    assert single is not None
    assert single.half is None
    pooled = Spread.of([[1.0, 3.0], [5.0], [2.0, 2.0]])
    assert pooled is not None
    assert (pooled.value, pooled.dof) == (1.0, 2)


def test_savings_are_read_off_the_line_through_two_trials() -> None:
    low, high = ({"train_energy_j": j, "eval_loss_nats": loss} for j, loss in ((400.0, 5.0), (100.0, 5.2)))
    at = {"train_energy_j": 150.0, "eval_loss_nats": 5.1}  # the line takes √(400 · 100) J there
    assert study_prices.saving((low, high), at) == pytest.approx(math.log(200 / 150))
    assert study_prices.saving((high, low), at | {"train_energy_j": 250.0}) == pytest.approx(math.log(200 / 250))
    assert study_prices.saving((low, high), at | {"eval_loss_nats": 5.3}) is None


@pytest.mark.parametrize(
    ("sweep_id", "stage"),
    [("controls", "controls"), ("controls_routers-2026", "controls_routers"), ("frontier", None), ("front-1", "front")],
)
def test_a_sweep_belongs_to_the_stage_that_its_name_says(sweep_id: str, stage: str | None) -> None:
    assert study_rows.stage(sweep_id) == stage


def test_stages_run_one_after_another_and_one_that_fails_does_not_end_the_rest(tmp_path: Path) -> None:
    for name in ("joulemoe", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$LOG"\ncase "$*" in *epochs*) exit 3;; esac\n')
        (tmp_path / name).chmod(0o755)
    stages = ["epochs=36", "members=90", "long@a=b.parquet=72", "front-cv2=36"]
    ran = subprocess.run(
        [ROOT / "benchmarks/study.sh", "out", "text", "words", "base", *stages],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")},
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 1
    assert b"stage epochs ended with 3" in ran.stderr
    more = "--base base --tokenizer words --data text --max-hours"
    assert (tmp_path / "log").read_text().splitlines() == [
        f"joulemoe sweep tune_spaces/study/epochs.yaml --out out --sweep-id epochs {more} 0.01 --anchor",
        "python -m benchmarks.study_members out --out out/members.yaml",
        f"joulemoe sweep out/members.yaml --out out --sweep-id members {more} 0.025",
        "joulemoe sweep tune_spaces/study/long.yaml --out out --sweep-id long"
        f" {more.replace('data text', 'data a=b.parquet')} 0.02",
        f"joulemoe sweep tune_spaces/study/front.yaml --out out --sweep-id front-cv2 {more} 0.01 --set regularizer=cv2",
    ]


# --- text of packages --------------------------------------------------------------------------------------


def test_package_text_goes_whole_into_one_split_and_once(tmp_path: Path) -> None:
    corpus, root = tmp_path / "corpus.parquet", tmp_path / "site"
    known = "text of the corpus " * 20
    pq.write_table(pa.table({"domain": ["news"], "split": ["validation"], "text": [known]}), corpus)
    (root / "a").mkdir(parents=True)
    for i in range(200):
        (root / "a" / f"m{i}.py").write_text(f"value = {i}\n" * 30)
        (root / f"copy{i}.py").write_text(f"value = {i}\n" * 30)
    (root / "known.txt").write_text(known)
    (root / "empty.py").write_text("")
    (root / "table.csv").write_text("1,2\n" * 100)
    said = mixed_corpus.mix(corpus, tmp_path / "one.parquet", [root], 10**9)
    rows = pq.read_table(tmp_path / "one.parquet").to_pylist()
    assert rows[0] == {"domain": "news", "split": "validation", "text": known}
    texts = [row["text"] for row in rows]
    assert len(texts) == len(set(texts)) == 201
    assert {row["split"] for row in rows[1:]} == {"train", "validation", "test"}
    (root / "a").rename(root / "z")
    assert mixed_corpus.mix(corpus, tmp_path / "one.parquet", [root], 10**9) == said
    mixed_corpus.mix(corpus, tmp_path / "small.parquet", [root], 5000)
    small = pq.read_table(tmp_path / "small.parquet").to_pylist()
    assert small[1:] == rows[1 : len(small)]
    assert sum(len(row["text"]) for row in small[1:]) <= 5000


def test_windows_until_a_budget_is_kept_and_a_curve_through_three_points() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as a program it finds its neighbours there
    try:
        adapt = importlib.import_module("benchmarks.adapt")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))

    def windows(*errors: float) -> list[Any]:
        return [
            SimpleNamespace(measurement=SimpleNamespace(energy_j=1000 * (1 + error)), tokens=1000) for error in errors
        ]

    assert adapt.settled_after(windows(0.1, 0.05, *[0.01, -0.01] * 4), 1.0) == 2
    assert adapt.settled_after(windows(*[0.01, -0.01] * 4), 1.0) == 0
    assert adapt.settled_after(windows(*[0.0] * 6, *[0.03] * 4), 1.0) is None
    curve = [(x, 3 * (x - 1.0) ** 2) for x in (0.98, 0.99, 1.01)]
    assert adapt.parabola(curve, 1.0) == pytest.approx(0.0)
    assert math.isnan(adapt.parabola([(1.0, 0.0), (1.0001, 0.1), (1.02, 0.2)], 1.01))
    assert math.isnan(adapt.parabola(curve, 1.1))
