"""The cost model against the meter: measure points on a GPU, and errors on points that no fit has seen.

python -m benchmarks.cost_model measure --plan full --points points.json   # one GPU, about 9 minutes
python -m benchmarks.cost_model judge points.json                          # no GPU
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from pipelines import calibrate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure", help="measure points")
    run.add_argument("--plan", choices=("full", "small", "smoke"), default="full")
    run.add_argument("--points", type=Path, required=True)
    run.add_argument("--budget-s", type=float, default=510.0)
    options = parser.parse_args()
    console = Console(width=160)
    plans = {
        "full": lambda: calibrate.full_plan(options.budget_s),
        "small": calibrate.small_plan,
        "smoke": calibrate.smoke_plan,
    }
    device = "cpu" if options.plan == "small" else "cuda"
    measured = calibrate.measure(plans[options.plan](), device=device, console=console, raw=options.points)
    console.print(f"{len(measured.points)} points in {measured.device['seconds']} s")
    for reason in measured.skipped:
        console.print(f"left out: {reason}", markup=False)


if __name__ == "__main__":
    main()
