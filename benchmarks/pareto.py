"""A million trials from Parquet to a printed front, beside pandas + optuna and moocore alone on the same rows.

    python benchmarks/pareto.py [ROWS]        each case runs in a process of its own; synthetic rows

Prints wall and CPU seconds inside the process (imports apart) and its peak resident memory, imports included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.records import TrialRecord, arrow_schema

ROUTERS = ("topk", "energy", "random", "hash")


def make(rows: int, folder: Path) -> Path:
    """One compacted file of trials, with failed, censored, null and modelled ones among them."""
    rng = np.random.default_rng(0)
    schema = arrow_schema(TrialRecord)
    joules = rng.lognormal(6, 0.6, rows)
    loss = 3.2 + 40 / joules**0.7 + rng.gamma(2.0, 0.08, rows)
    loss[rng.random(rows) < 0.001] = np.nan
    numbers = {
        "energy_lambda": rng.choice([0.0, 0.1, 0.3, 1.0], rows),
        "train_energy_j": joules,
        "train_energy_uncertainty_j": 0.01 * joules,
        "eval_loss_nats": loss,
        "test_loss_nats": loss + 0.01,
        "train_duration_s": joules / 400,
        "power_limit_w": np.full(rows, 700.0),
        "decode_j_per_token": rng.lognormal(-6, 0.3, rows),
    }
    words = {
        "sweep_id": ["million"],
        "state": ["COMPLETED"] * 97 + ["STOPPED"] * 2 + ["FAILED"],
        "config_json": ["{}"],
        "base": ["random"],
        "router": list(ROUTERS),
        "regularizer": ["load_balance", "cv2", "z_loss"],
        "price": ["join"],
        "schedule": ["cosine"],
        "energy_source": ["counter"] * 19 + ["modelled"],
        "gpu_name": ["GPU"],
        "gpu_uuid": ["GPU-0"],
        "corpus_fingerprint": ["corpus"],
    }
    flags = {"censored": 0.02, "shared_gpu": 0.01, "throttled": 0.02}
    columns = []
    for field in schema:
        name, kind = field.name, field.type
        if name in ("trial_id", "config_fingerprint"):
            values = pa.array(np.char.add(name[0], np.arange(rows).astype(str)))
        elif name in numbers:
            values = pa.array(numbers[name])
        elif name in words:
            values = pa.array(np.array(words[name], dtype=object)[rng.integers(len(words[name]), size=rows)])
        elif name in flags:
            values = pa.array(rng.random(rows) < flags[name])
        elif pa.types.is_timestamp(kind):
            values = pa.array(np.full(rows, 1_760_000_000_000_000)).cast(kind)
        elif pa.types.is_integer(kind):
            values = pa.array(
                rng.integers(1, 5, rows) if name in ("top_k", "epochs") else np.zeros(rows, dtype=np.int64)
            )
        else:
            values = pa.nulls(rows, kind)
        columns.append(values.cast(kind))
    path = folder / "trials" / "sweep_id=million" / "compacted.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns, schema=schema), path)
    return folder


def case_joulemoe(folder: str) -> int:
    """Parquet to printed front, all hygiene included."""
    from rich.console import Console

    from pipelines.pareto import pareto_front
    from pipelines.show import print_front

    def run() -> int:
        front = pareto_front(folder, sweep_id="million")
        print_front(front, Console(file=sys.stderr, width=120))
        return len(front)

    return timed(run)


def case_optuna(folder: str) -> int:
    """pandas and optuna: read two columns, drop what is not finite, best_trials' own function."""
    import pandas as pd
    from optuna.study._multi_objective import _is_pareto_front

    def run() -> int:
        frame = pd.read_parquet(
            f"{folder}/trials/sweep_id=million/compacted.parquet", columns=["train_energy_j", "eval_loss_nats", "state"]
        )
        frame = frame[(frame.state == "COMPLETED")].replace([np.inf, -np.inf], np.nan).dropna()
        values = frame[["train_energy_j", "eval_loss_nats"]].to_numpy()
        front = frame[_is_pareto_front(values, assume_unique_lexsorted=False)]
        print(front.sort_values("train_energy_j").to_string(), file=sys.stderr)
        return len(front)

    return timed(run)


def case_moocore(folder: str) -> int:
    """moocore's functions alone on the clean array: front and hypervolume."""
    import moocore

    columns = ["train_energy_j", "eval_loss_nats", "state"]
    table = pq.read_table(f"{folder}/trials/sweep_id=million/compacted.parquet", columns=columns, partitioning=None)
    frame = table.to_pandas()
    values = frame[frame.state == "COMPLETED"].dropna()[columns[:2]].to_numpy()

    def run() -> int:
        front = values[moocore.is_nondominated(values, keep_weakly=True)]
        moocore.hypervolume(front, ref=values.max(axis=0))
        return len(front)

    return timed(run)


def timed(run: object) -> int:
    """Print seconds, front size and peak memory as JSON."""
    start, cpu = time.perf_counter(), time.process_time()
    size = run()  # type: ignore[operator]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory before exec
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "front": size, "peak_mib": peak}))
    return size


CASES = {"joulemoe": case_joulemoe, "pandas + optuna": case_optuna, "moocore alone": case_moocore}


def main() -> None:
    """Make the rows, run every case three times, print the best and the worst."""
    if len(sys.argv) == 3 and sys.argv[1] in CASES:
        CASES[sys.argv[1]](sys.argv[2])
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = make(rows, Path(name))
        print(f"{rows} rows, {sum(p.stat().st_size for p in folder.rglob('*.parquet')) / 2**20:.0f} MiB of Parquet")
        print(f"{'case':<18} {'best s':>8} {'worst s':>8} {'cpu s':>7} {'peak MiB':>9} {'front':>6}")
        for case in CASES:
            found = []
            for _ in range(3):
                command = [sys.executable, __file__, case, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
                found.append(json.loads(done.stdout.splitlines()[-1]))
            times = [one["seconds"] for one in found]
            peak, cpu = max(one["peak_mib"] for one in found), min(one["cpu"] for one in found)
            print(f"{case:<18} {min(times):>8.2f} {max(times):>8.2f} {cpu:>7.2f} {peak:>9.0f} {found[0]['front']:>6}")


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


if __name__ == "__main__":
    main()
