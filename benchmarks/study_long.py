"""The reference study's check on more text: whether mixtures and the dense model change places with more tokens."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import study_rows as data
from benchmarks.study_controls import estimate
from benchmarks.study_rows import Row, Study
from benchmarks.study_text import NOT_RUN, Section, markdown, text
from pipelines.compare import compare

STAGE = "long"
_HEAD = (
    "configuration", "M tokens", "J", "mJ/token", "loss, nat", "test loss, nat", "loss from dense, nat", "× spread",
    "joules from dense, %", "× spread", "joules saved at equal loss, %",
)  # fmt: skip


def long(study: Study) -> Section:
    """Each configuration against dense on the same tokens, and against the line of dense runs at equal loss."""
    title, rows = "More text", data.named(study.stage(STAGE))
    if not rows:
        return Section(title=title, text=(NOT_RUN,))
    rows = sorted(rows, key=data.log_joules)
    base = data.first(rows, _is_whole)
    line = [row for row in rows if row["router"] == "dense"]
    body = [_cells(study, row, base, line) for row in rows]
    return Section(title=title, text=(_said(study, rows, base, line), markdown(_HEAD, body), _told(rows, base)))


def _is_whole(row: Row) -> bool:
    """True of one dense epoch of all the text."""
    return bool(row["router"] == "dense" and row["epochs"] == 1 and row["config"]["max_train_tokens"] is None)


def _cells(study: Study, row: Row, base: Row | None, line: Sequence[Row]) -> list[str]:
    changes = ["–"] * 4
    if base is not None and row is not base and row["footing"] == base["footing"]:
        joules, loss = data.log_total(row) - data.log_total(base), data.loss(row) - data.loss(base)
        of_joules, of_loss = _spreads(study)
        changes = [f"{loss:+.4f}", _times(loss, of_loss), f"{100 * joules:+.2f}", _times(joules, of_joules)]
    return [
        row["name"],
        f"{row['tokens_trained'] / 1e6:.1f}",
        f"{row['train_energy_j']:.0f}",
        f"{1e3 * row['train_energy_j'] / row['tokens_trained']:.4f}",
        f"{row['eval_loss_nats']:.4f}",
        text(row["test_loss_nats"]),
        *changes,
        _saved(study, row, line),
    ]


def _spreads(study: Study) -> tuple[float | None, float | None]:
    """A/A spreads of joules (the larger of within a board and over boards) and of loss."""
    joules = [data.joules_spread(study), data.joules_spread(study, over_boards=True)]
    loss = data.loss_spread(study)
    of_joules = max((spread.value for spread in joules if spread is not None), default=None)
    return of_joules, None if loss is None else loss.value


def _times(change: float, spread: float | None) -> str:
    return f"{abs(change) / spread:.1f}" if spread else "–"


def _saved(study: Study, row: Row, line: Sequence[Row]) -> str:
    """Joules against those of the dense line at this loss; a dash on the line, or beyond its ends."""
    table = study.table(STAGE)
    if table is None or row["router"] == "dense" or len(line) < 2 or not study.corrected:
        return "–"
    keys = "|".join(one["config_fingerprint"] for one in line)
    answer = compare(table, f"config_fingerprint={keys}", f"config_fingerprint={row['config_fingerprint']}")
    return estimate(answer.saving_at_equal_loss, 100, 1)


def _said(study: Study, rows: Sequence[Row], base: Row | None, line: Sequence[Row]) -> str:
    of_joules, of_loss = _spreads(study)
    known = of_joules is not None and of_loss is not None
    spread = f"{of_joules:.2%} of joules, {of_loss:.4f} nat" if known else "not known: stage repeatability did not run"
    ends = " to ".join(row["name"] for row in sorted(line, key=data.log_total))
    where = "" if base is None else f" {data.footing(study, rows, [base])}"
    return (
        "One seed each, so no intervals: changes stand in multiples of the A/A spread, which is that of stage "
        f"repeatability ({spread}), on less text. Validation and test text are not those of the other stages: losses "
        "compare within this table only. Joules are all those of training, their changes log ratios. At equal loss: "
        f"against the line of dense runs ({ends or 'none'}), straight in log joules; a dash beyond its ends.{where}"
    )


def _told(rows: Sequence[Row], base: Row | None) -> str:
    """How many mixtures one dense epoch of all the text dominates."""
    if base is None:
        return "No dense run of all the text: nothing to hold the others against."
    mixtures = [row for row in rows if row["router"] != "dense" and row["footing"] == base["footing"]]
    beaten = sum(data.loss(row) >= data.loss(base) and _joules(row) >= _joules(base) for row in mixtures)
    return f"One dense epoch of all the text dominates {beaten} of {len(mixtures)} mixtures."


def _joules(row: Row) -> float:
    return float(row["train_energy_j"])
