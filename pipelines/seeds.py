"""Seeds: means with intervals, the probability of being on the front, and attainment.

Legend: R rows (trials), N configurations, M objectives, S seeds, B resamples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import moocore
import numpy as np
import pyarrow as pa
from scipy import stats as distributions

from pipelines import fronts, hygiene

#: Beyond this many configurations no resampling is done: it would take minutes and say little.
BOOTSTRAP_LIMIT = 5000
_NORMAL_95 = 1.959963984540054


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Summary:
    """Configurations with their seeds.

    Attributes:
        value_RM: the rows' values.
        noise_RM: standard uncertainty of each value as measured; 0 where none is known.
        config_R: configuration of each row.
        seed_R: code of each row's seed.
        trial_R: code of the trial that each row is of; a trial's points share it.
        end_R: code of each row's place among its trial's points (its number of epochs).
        group_N: code of what each configuration shares with others that the same trials passed through.
        first_N: first row of each configuration.
        count_N: seeds of each configuration.
        mean_NM: mean over seeds.
        half_NM: half width of the mean's 95 % interval; NaN where neither seeds nor the meter give one.
    """

    value_RM: np.ndarray
    noise_RM: np.ndarray
    config_R: np.ndarray
    seed_R: np.ndarray
    trial_R: np.ndarray
    end_R: np.ndarray
    group_N: np.ndarray
    first_N: np.ndarray
    count_N: np.ndarray
    mean_NM: np.ndarray
    half_NM: np.ndarray

    @property
    def each_row_once(self) -> bool:
        """True where every row is a configuration of its own, in the order of the rows."""
        return len(self.first_N) == len(self.config_R) and bool((self.first_N == np.arange(len(self.first_N))).all())

    def trial_ids(self, table: pa.Table) -> pa.ChunkedArray:
        """The trial ids of each configuration, joined by spaces where it has several seeds."""
        ids = table["trial_id"] if "trial_id" in table.column_names else pa.array(np.arange(len(table)).astype(str))
        if self.each_row_once:
            return ids
        if (self.count_N == 1).all():
            return ids.take(pa.array(self.first_N))
        order = np.argsort(self.config_R, kind="stable")
        names = ids.take(pa.array(order)).to_pylist()
        ends = np.cumsum(self.count_N)
        return pa.chunked_array([[" ".join(names[e - c : e]) for e, c in zip(ends, self.count_N, strict=True)]])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Attainment:
    """Which region of the objective space how many seeds' fronts reach.

    Attributes:
        seeds: number of seeds.
        surfaces: corner points (x, y) of the attainment surface by the percentage of seeds that reach it.
        median_hypervolume: dominated volume of Vorob'ev's mean front.
        deviation: Vorob'ev deviation, the mean volume between a seed's front and the mean front.
    """

    seeds: int
    surfaces: dict[int, np.ndarray]
    mean_hypervolume: float
    deviation: float


def uncertainty_column(column: str) -> str:
    """Name of the column that holds the standard uncertainty of a column of joules."""
    return column.removesuffix("_j") + "_uncertainty_j"


def correct_boards(table: pa.Table, columns: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """Bring boards of one model to the same footing by the anchor workload that was measured on each.

    Joules of a board are divided by its anchor's joules per token relative to the mean of the boards.
    Where a board lacks the anchor nothing is corrected, and a note says so.
    """
    energy = [column for column in columns if hygiene.is_energy(column)]
    if not energy or "gpu_uuid" not in table.column_names or table.num_rows == 0:
        return table, []
    board_R, boards = hygiene.codes(table["gpu_uuid"])
    used = np.unique(board_R)
    if len(used) < 2:
        return table, []
    anchor_B = _board_anchors(table, board_R, len(boards))[used]
    lacking = int((~np.isfinite(anchor_B)).sum())
    if lacking:
        where = "" if lacking == len(used) else f" on {lacking} of them that compares with the others'"
        return table, [f"{len(used)} boards of one model share the front, not corrected: no anchor was measured{where}"]
    factor = np.zeros(len(boards))
    factor[used] = anchor_B.mean() / anchor_B
    for column in [*energy, *map(uncertainty_column, energy)]:
        if column in table.column_names:
            value = pa.array(hygiene.numbers(table[column]) * factor[board_R], from_pandas=True)
            table = table.set_column(table.column_names.index(column), column, value)
    spread = float(anchor_B.max() / anchor_B.min() - 1)
    return table, [f"{len(used)} boards of one model corrected by their anchor workload ({spread:.1%} apart)"]


def _board_anchors(table: pa.Table, board_R: np.ndarray, boards: int) -> np.ndarray:
    found = np.full(boards, np.nan)
    if "anchor_j_per_token" in table.column_names:
        anchor_R = hygiene.numbers(table["anchor_j_per_token"])
        for board in np.unique(board_R):
            values = anchor_R[(board_R == board) & np.isfinite(anchor_R)]
            found[board] = np.median(values) if len(values) else np.nan
    return found


def summarise(table: pa.Table, columns: Sequence[str], *, per_trial: bool = False) -> Summary:
    """Mean and interval of each configuration over its seeds.

    The half width of the 95 % interval joins two parts in quadrature: Student's t times the seeds' standard
    error, and 1.96 times the meter's standard uncertainty of the mean. With one seed only the meter's part is
    known; for a loss then nothing is.
    """
    value_RM = np.stack([hygiene.numbers(table[column]) for column in columns], axis=1)
    noise_RM = np.stack([_noise(table, column) for column in columns], axis=1)
    rows = len(value_RM)
    config_R = np.arange(rows)
    if not per_trial and "config_fingerprint" in table.column_names and rows:
        config_R = hygiene.codes(table["config_fingerprint"])[0]
    seed_R = hygiene.codes(table["seed"])[0] if "seed" in table.column_names else np.zeros(rows, dtype=np.int64)
    if rows == 0 or np.bincount(config_R).max() == 1:
        config_R = first_N = np.arange(rows)
        count_N = np.ones(rows, dtype=np.int64)
        mean_NM, half_NM = value_RM, _NORMAL_95 * noise_RM
    else:
        _, first_N, config_R, count_N = np.unique(config_R, return_index=True, return_inverse=True, return_counts=True)
        mean_NM, half_NM = _means(value_RM, noise_RM, config_R, count_N)
    half_NM = np.where(half_NM > 0, half_NM, np.nan)
    trial_R, end_R, group_R = _trials(table, seed_R)
    group_N = np.arange(len(first_N))
    if group_R is not None:
        _, group_N = np.unique(group_R[first_N], return_inverse=True)
    return Summary(
        value_RM=value_RM,
        noise_RM=noise_RM,
        config_R=config_R,
        seed_R=seed_R,
        trial_R=trial_R,
        end_R=end_R,
        group_N=group_N,
        first_N=first_N,
        count_N=count_N,
        mean_NM=mean_NM,
        half_NM=half_NM,
    )


def _trials(table: pa.Table, seed_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Trial, place within it, and experiment of each row; a row of `trials` is a trial of its own (None)."""
    if not {"trial_fingerprint", "epochs"} <= set(table.column_names) or table.num_rows == 0:
        return np.arange(table.num_rows), np.zeros(table.num_rows, dtype=np.int64), None
    group_R = hygiene.codes(table["trial_fingerprint"])[0].astype(np.int64)
    trial_R = np.unique(group_R * (int(seed_R.max()) + 1) + seed_R, return_inverse=True)[1]
    return trial_R, table["epochs"].to_numpy().astype(np.int64), group_R


def _noise(table: pa.Table, column: str) -> np.ndarray:
    name = uncertainty_column(column)
    if not column.endswith("_j") or name not in table.column_names:
        return np.zeros(table.num_rows)
    return np.nan_to_num(hygiene.numbers(table[name]), nan=0.0)


def _means(
    value_RM: np.ndarray, noise_RM: np.ndarray, config_R: np.ndarray, count_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    size = len(count_N)
    means, halves = [], []
    for m in range(value_RM.shape[1]):
        mean_N = np.bincount(config_R, value_RM[:, m], size) / count_N
        square_N = np.bincount(config_R, (value_RM[:, m] - mean_N[config_R]) ** 2, size)
        noise_N = np.bincount(config_R, noise_RM[:, m] ** 2, size) / count_N**2
        dof_N = np.maximum(count_N - 1, 1)
        error_N = np.where(count_N > 1, square_N / dof_N / count_N, 0.0)
        t_N = distributions.t.ppf(0.975, dof_N)
        means.append(mean_N)
        halves.append(np.sqrt(t_N**2 * error_N + _NORMAL_95**2 * noise_N))
    return np.stack(means, axis=1), np.stack(halves, axis=1)


def front_probability(summary: Summary, sign_M: np.ndarray, *, resamples: int, seed: int = 0) -> np.ndarray | None:
    """Probability that each configuration is on the front, by bootstrap over seeds and meter noise.

    A configuration's few seeds say little about their own spread, so residuals are pooled: each row's deviation
    from its configuration's mean (relative where all values are positive), times sqrt(n / (n - 1)), drawn for
    all objectives of a row together, so that their correlation stays. Meter noise is added as a Gaussian.
    Points that one trial passed through are not independent: they take the residuals of one other trial, each that
    of the same number of epochs (or the nearest that trial has), and one draw of meter noise.

    Returns:
        Probabilities (N,); None where no configuration has two seeds, or where there are too many.
    """
    size = len(summary.count_N)
    repeated_R = summary.count_N[summary.config_R] > 1
    if resamples <= 0 or size == 0 or size > BOOTSTRAP_LIMIT or not repeated_R.any():
        return None
    scale_NM = np.where((summary.value_RM > 0).all(axis=0), summary.mean_NM, 1.0)
    inflate_R = np.sqrt(summary.count_N / np.maximum(summary.count_N - 1, 1))[summary.config_R]
    residual_RM = (summary.value_RM - summary.mean_NM[summary.config_R]) / scale_NM[summary.config_R]
    pool_RM = residual_RM * inflate_R[:, None]
    donor_DE, place_R = _donors(summary, repeated_R)
    _, trial_R = np.unique(summary.trial_R, return_inverse=True)
    noise_NM = _noise_of_mean(summary)
    rng = np.random.default_rng(seed)
    hits_N = np.zeros(size)
    for _ in range(resamples):
        drawn_T = rng.integers(len(donor_DE), size=trial_R.max() + 1)
        drawn_RM = pool_RM[donor_DE[drawn_T[trial_R], place_R]]
        shift_NM = np.stack([np.bincount(summary.config_R, d, size) / summary.count_N for d in drawn_RM.T], axis=1)
        meter_GM = rng.standard_normal((summary.group_N.max() + 1, noise_NM.shape[1]))
        sample_NM = summary.mean_NM + scale_NM * shift_NM + noise_NM * meter_GM[summary.group_N]
        hits_N += fronts.nondominated(sample_NM * sign_M)
    return np.asarray(hits_N / resamples)


def _donors(summary: Summary, repeated_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row whose residual each donating trial (D) has for each number of epochs (E), and the number's place by row."""
    ends_E, place_R = np.unique(summary.end_R, return_inverse=True)
    rows = np.flatnonzero(repeated_R)
    _, donor_P = np.unique(summary.trial_R[rows], return_inverse=True)
    order = np.argsort(donor_P, kind="stable")
    parts = np.split(rows[order], np.cumsum(np.bincount(donor_P))[:-1])
    nearest = [part[np.abs(summary.end_R[part][:, None] - ends_E).argmin(axis=0)] for part in parts]
    return np.stack(nearest), place_R


def _noise_of_mean(summary: Summary) -> np.ndarray:
    size = len(summary.count_N)
    columns = [np.bincount(summary.config_R, n**2, size) for n in summary.noise_RM.T]
    return np.asarray(np.sqrt(np.stack(columns, axis=1)) / summary.count_N[:, None])


def attainment(summary: Summary, sign_M: np.ndarray) -> Attainment | None:
    """Empirical attainment over the seeds that every configuration with replicates has.

    Source: V. Grunert da Fonseca, C. Fonseca, A. Hall, "Inferential performance assessment of stochastic
    optimisers and the attainment function", EMO 2001; computed by moocore.

    Returns:
        None with fewer than two common seeds, or with more than two objectives.
    """
    if summary.value_RM.shape[1] != 2 or summary.count_N.max(initial=0) < 2:
        return None
    full_R = summary.count_N[summary.config_R] == summary.count_N.max()
    seeds_of = [set(summary.seed_R[full_R & (summary.config_R == n)]) for n in np.unique(summary.config_R[full_R])]
    common = sorted(set.intersection(*seeds_of)) if seeds_of else []
    if len(common) < 2:
        return None
    use_R = full_R & np.isin(summary.seed_R, common)
    cost = summary.value_RM[use_R] * sign_M
    set_R = np.searchsorted(common, summary.seed_R[use_R]) + 1
    order = np.argsort(set_R, kind="stable")
    cost, set_R = cost[order], set_R[order]
    levels = sorted({100 / len(common), 50.0, 100.0})
    surface = moocore.eaf(cost, set_R, percentiles=levels)
    reference = fronts.reference_point(cost)
    mean = moocore.vorob_t(cost, set_R, ref=reference)
    spread = moocore.vorob_dev(cost, set_R, ref=reference, ve=mean["ve"])
    return Attainment(
        seeds=len(common),
        surfaces={round(level): surface[np.isclose(surface[:, -1], level), :2] * sign_M for level in levels},
        mean_hypervolume=float(mean["avg_hyp"]),
        deviation=float(spread),
    )
