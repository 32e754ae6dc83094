"""The cost model against the meter: measure points on a GPU, and errors on points that no fit has seen.

python -m benchmarks.cost_model measure --plan full --points points.json   # one GPU, about 9 minutes
python -m benchmarks.cost_model judge points.json                          # no GPU
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hwcost.cost_model import Conditions, CostModel
from hwcost.judge import cross_validate, leave_out, relative_errors, with_errors
from hwcost.points import Calibration
from pipelines import calibrate, calibrate_plan
from pipelines.calibrate_show import table


def judge(path: Path, console: Console) -> None:
    """Every held-out point with its error, groups left out of a refit, and the summary."""
    measured = Calibration.read(path)
    model = with_errors(CostModel.fit(measured), measured)
    shown = Table("held-out point", "mJ a call", "W", "error, time measured", "error, time predicted", "time error")
    for point in (p for p in measured.points if p.held_out and p.name != "steady"):
        known, predicted = (relative_errors(model, [point], time_measured=flag)[0] for flag in (True, False))
        seconds = model.breakdown_of(point.counts, Conditions()).duration_s / point.seconds_per_call - 1
        row = (f"{1e3 * point.energy_per_call_j:.2f}", f"{point.power_w:.0f}")
        shown.add_row(point.name, *row, *(f"{100 * error:+.1f} %" for error in (known, predicted, seconds)))
    console.print(shown)
    groups = Table("left out of a refit", "points", "error, time measured", "error, time predicted")
    for left in leave_out(measured):
        groups.add_row(left.group, str(left.points), f"{100 * left.measured:.2f} %", f"{100 * left.predicted:.2f} %")
    for kind, (points, known, predicted) in cross_validate(measured).items():
        row = (str(points), f"{100 * known:.2f} %", f"{100 * predicted:.2f} %")
        groups.add_row(f"each {kind.replace('_', ' ')} alone", *row)
    console.print(groups)
    console.print(table(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure", help="measure points")
    run.add_argument("--plan", choices=("full", "small", "smoke"), default="full")
    run.add_argument("--points", type=Path, required=True)
    run.add_argument("--budget-s", type=float, default=510.0)
    whole = commands.add_parser("calibrate", help="what `joulemoe calibrate` does")
    whole.add_argument("--out", type=Path, required=True)
    whole.add_argument("--points", type=Path, required=True)
    whole.add_argument("--budget-s", type=float, default=510.0)
    judged = commands.add_parser("judge", help="errors of a fit to measured points")
    judged.add_argument("points", type=Path)
    options = parser.parse_args()
    console = Console(width=160)
    if options.command == "judge":
        judge(options.points, console)
        return
    if options.command == "calibrate":
        calibrate.calibrate(options.out, raw=options.points, budget_s=options.budget_s, console=console)
        judge(options.points, console)
        return
    plans = {
        "full": lambda: calibrate_plan.full_plan(options.budget_s),
        "small": calibrate_plan.small_plan,
        "smoke": calibrate_plan.smoke_plan,
    }
    device = "cpu" if options.plan == "small" else "cuda"
    measured = calibrate.measure(plans[options.plan](), device=device, console=console, raw=options.points)
    console.print(f"{len(measured.points)} points in {measured.device['seconds']} s")
    for reason in measured.skipped:
        console.print(f"left out: {reason}", markup=False)


if __name__ == "__main__":
    main()
