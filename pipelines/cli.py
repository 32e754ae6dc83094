"""The command `joulemoe`. It takes paths and switches; files hold hyperparameters."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from hwcost.cpu import SettingError
from pipelines import cli_analysis, cli_models
from pipelines.config import ConfigError, StorageError, TrialConfig
from pipelines.console import standard_output
from tune_spaces import RepeatedKeyError, Space, SpaceError, find_space, load_space, read_yaml

if TYPE_CHECKING:
    from pipelines.plan import SweepPlan

app = typer.Typer(
    name="joulemoe",
    help="Find the Mixture-of-Experts routing that buys the least loss per joule on the GPUs you own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Base = Annotated[str | None, typer.Option(help="Base checkpoint: hub name, folder, or 'random'.")]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer: hub name or folder.")]
Data = Annotated[str | None, typer.Option(help="Hub data set, text file or glob, or Parquet with a 'text' column.")]
Out = Annotated[str, typer.Option(help="Folder (or URI) for the results.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE: replace a key of the trial; repeatable.")]


@app.command()
def sweep(
    space: Annotated[str | None, typer.Argument(help="Space file, or the name of a shipped space.")] = None,
    out: Out = "results",
    resume: Annotated[
        str | None, typer.Option(help="Sweep id: go on with it; --seeds, --samples or a SPACE add trials.")
    ] = None,
    sweep_id: Annotated[
        str | None, typer.Option(help="Name of the sweep; one that exists under OUT goes on (for restarted jobs).")
    ] = None,
    base: Base = None,
    tokenizer: Tokenizer = None,
    data: Data = None,
    settings: Settings = None,
    search: Annotated[
        str | None, typer.Option(help="grid, random, tpe, nsga2, gp or cost-aware; default: what the space says.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="fifo or pareto-asha; default: what the space says.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Experiments to draw, for searches that draw; each gets --seeds trials.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Replicates of every experiment.")] = None,
    objectives: Annotated[
        list[str] | None, typer.Option("--objective", help="COLUMN or COLUMN:max; two or three times.")
    ] = None,
    max_joules: Annotated[float | None, typer.Option(help="End after so many joules, idle and lost ones too.")] = None,
    max_hours: Annotated[float | None, typer.Option(help="End after so many hours.")] = None,
    stall: Annotated[
        int | None, typer.Option("--stop-when-hypervolume-stalls", help="End when so many trials added nothing.")
    ] = None,
    anchor: Annotated[
        bool | None,
        typer.Option(
            "--anchor/--no-anchor",
            help="Measure a fixed workload for 10 s on every GPU at both ends, so that boards compare. [default: on]",
        ),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Further attempts of a trial whose process died.")] = 2,
    timeout: Annotated[
        float | None, typer.Option("--trial-timeout", help="Seconds without a report: the trial hangs.")
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trials at once; default: one per GPU, or per CPU core. More than a cluster has GPUs: it grows."
        ),
    ] = None,
    address: Annotated[str, typer.Option(help="Ray: local, auto, or ray://HOST:10001.")] = "local",
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow; default: sqlite in OUT.")
    ] = None,
) -> None:
    """Run a sweep and print its front."""
    from pipelines.journal import Journal
    from pipelines.sweep import run_sweep

    options: dict[str, Any] = {"search": search, "samples": samples, "seeds": seeds, "scheduler": scheduler}
    options |= {"objectives": objectives, "max_joules": max_joules, "max_hours": max_hours, "stall": stall}
    options |= {"anchor": anchor}
    overrides = _overrides(settings, base=base, tokenizer=tokenizer, data=data)
    if sweep_id is not None and resume is None and Journal(out, sweep_id).has("plan.json"):
        space, resume, overrides, options = None, sweep_id, {}, {}
    plan = _plan(space, resume, out, overrides, options | {"sweep_id": sweep_id or resume})
    console = standard_output()
    console.print(f"Sweep [bold]{plan.sweep_id}[/bold]: {plan.count} trials. {plan.question}", soft_wrap=True)
    if resume is None and plan.is_adaptive and samples is not None and (plan.samples or 0) < samples:
        console.print(f"The space has {plan.samples} experiments: each is drawn once.")
    if plan.dropped:
        console.print(
            f"{plan.dropped} points of the space repeat an experiment (λ where no price can act, say) and were dropped."
        )
    parallel = parallel or plan.document.get("sweep", {}).get("parallel")
    result = run_sweep(
        plan, out=out, parallel=parallel, address=address, tracking_uri=tracking_uri, retries=retries, timeout_s=timeout
    )
    if result.ended:
        console.print(f"Ended early: {result.ended}. Go on with --resume {plan.sweep_id} --out {out}", soft_wrap=True)
    written = cli_analysis.conclude_sweep(console, out, plan.sweep_id, tracking_uri)
    if not result.completed or not written:
        failed = sum(record.state == "FAILED" for record in result.records)
        console.print(f"[red]No front:[/red] {result.completed} trials completed, {failed} failed.")
        raise typer.Exit(1)
    if result.ended == "interrupted":
        raise typer.Exit(130)


def _plan(
    space: str | None, resume: str | None, out: str, overrides: dict[str, Any], options: dict[str, Any]
) -> SweepPlan:
    """A new plan, or a stored one with what was asked for beside it."""
    from pipelines.plan import plan_sweep
    from pipelines.sweep import stored_plan

    if resume is None:
        if space is None:
            raise ConfigError("space: expected a space file or the name of a shipped space, got nothing")
        return plan_sweep(load_space(find_space(space)), overrides=overrides, **options)
    plan = stored_plan(out, resume)
    asked = {key: value for key, value in options.items() if value is not None and key != "sweep_id"}
    if space is None and not asked and not overrides:
        return plan
    loaded = load_space(find_space(space)) if space is not None else plan.loaded_space()
    before = {key: getattr(plan, key) for key in options}
    return plan.extended(plan_sweep(loaded, overrides=overrides, fresh=False, **(before | asked)))


@app.command()
def trial(
    config: Annotated[Path, typer.Argument(help="YAML with the keys of one trial.")],
    out: Out = "results",
    base: Base = None,
    tokenizer: Tokenizer = None,
    data: Data = None,
    settings: Settings = None,
) -> None:
    """Run one trial, without Ray."""
    from pipelines.model import Hardware
    from pipelines.progress import Progress
    from pipelines.sweep import check_writable, preflight, quiet_libraries
    from pipelines.trial import run_trial

    values = {**_yaml_mapping(config), **_overrides(settings, base=base, tokenizer=tokenizer, data=data)}
    parsed = TrialConfig.parse(values)
    quiet_libraries()
    Hardware.of(parsed)
    preflight([parsed])
    check_writable(out)
    progress = Progress([parsed])
    record = run_trial(parsed, out=out, on_epoch=progress.epoch, keep=True)
    progress.finished(record)
    if record.state != "COMPLETED":
        raise typer.Exit(1)


@app.command()
def space(
    space: Annotated[str, typer.Argument(help="Space file, or the name of a shipped space.")],
    settings: Settings = None,
    gpu: Annotated[str | None, typer.Option(help="GPU to estimate for; default: the one of this host.")] = None,
    epoch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an epoch where the space does not cap them.")] = (
        100_000_000
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials as JSON.")] = False,
) -> None:
    """Print the trials or domains of a space, and what the cost model says of their training, without running them."""
    from pipelines.estimate import estimate
    from pipelines.plan import plan_sweep
    from pipelines.progress import clock, describe

    loaded = load_space(find_space(space))
    plan = plan_sweep(loaded, overrides=_overrides(settings))
    if as_json:
        typer.echo(json.dumps([t.model_dump(mode="json") for t in plan.trials], indent=1))
        return
    console = standard_output()
    console.print(f"{plan.count} trials, {plan.dropped} repeats dropped. {plan.question}", soft_wrap=True)
    if plan.search != "grid":
        for key, domain in plan.loaded_space().domains.items():
            console.print(f"  {key}: {domain}", soft_wrap=True, markup=False)
    for config in plan.trials:
        console.print(f"  {config.trial_id}  {describe(config)}", soft_wrap=True)
    examples = plan.trials or plan.examples()
    name, limit_w = (gpu, None) if gpu else _gpu_here()
    found = estimate(examples, gpu_name=name, power_limit_w=limit_w, epoch_tokens=epoch_tokens)
    share = plan.count / len(examples)
    unknown = "nothing was calibrated for this GPU" if name else "none for this host, which has no GPU"
    basis = f"profile {found.profile}" + (f": {unknown}" if found.analytic else "")
    console.print(
        f"Training, modelled ({basis}): {found.energy_j * share / 3.6e6:.3g} kWh, "
        f"{clock(found.duration_s * share)} on one GPU. On top: {clock(found.phases_s * share)} to measure prefill and "
        f"decode, {found.shapes} shapes to compile once per process (half a minute to a minute each), evaluation.",
        soft_wrap=True,
        markup=False,
    )
    if name is None or any(config.device == "cpu" for config in examples):
        console.print(
            "That is for a GPU: a CPU takes longer, compiles nothing, and its joules are modelled too.", soft_wrap=True
        )


def _gpu_here() -> tuple[str | None, float | None]:
    """Name and enforced power limit of this host's first GPU; None where there is none, or its limit is not told."""
    import torch

    from hwcost.devices import power_limit_w

    return (torch.cuda.get_device_name(0), power_limit_w("cuda:0")) if torch.cuda.is_available() else (None, None)


@app.command()
def submit(
    space: Annotated[str, typer.Argument(help="Space file, or the name of a shipped space.")],
    address: Annotated[str, typer.Option(help="Ray dashboard, http://HEAD:8265.")],
    out: Out = "results",
    follow: Annotated[bool, typer.Option(help="Stream the job's log and return its exit code.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Further word for the sweep: --option=--seeds --option=3; repeatable."),
    ] = None,
    base: Base = None,
    tokenizer: Tokenizer = None,
    data: Data = None,
    settings: Settings = None,
) -> None:
    """Run the same sweep as a job on a Ray cluster."""
    from pipelines.plan import plan_sweep
    from pipelines.submit import submit_sweep

    path = find_space(space)
    overrides = _overrides(settings, base=base, tokenizer=tokenizer, data=data)
    plan_sweep(load_space(path), overrides=overrides)  # bad input ends here, not on the cluster
    code = submit_sweep(path, out=out, address=address, overrides=overrides, follow=follow, options=option or ())
    raise typer.Exit(code)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Profile to write, a JSON file.")],
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    points: Annotated[Path | None, typer.Option(help="Fit these raw points instead of measuring.")] = None,
    budget_s: Annotated[float, typer.Option(min=60, help="Seconds to measure; the whole plan takes 510.")] = 510.0,
) -> None:
    """Fit a cost-model profile on this GPU and print its error on shapes held out of the fit."""
    from pipelines.calibrate import calibrate as run

    try:
        run(out, device=device, points=points, budget_s=budget_s)
    except (ValueError, OSError) as error:
        raise ConfigError(f"calibrate: {error}") from None


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Say what can be measured here: GPUs, fields, idle watts, the energy source of a sweep, Ray, MLflow."""
    from hwcost.doctor import examine, render
    from pipelines.services import reachable

    found, services = examine(), reachable()
    if as_json:
        typer.echo(json.dumps(found.as_dict() | {"services": services}, indent=1))
        return
    typer.echo(render(found))
    for name, state in services.items():
        typer.echo(f"{name}: {state}")


cli_analysis.register(app)
cli_models.register(app)


def _overrides(settings: list[str] | None, **named: str | None) -> dict[str, Any]:
    return cli_models.settings_of(settings) | {key: value for key, value in named.items() if value is not None}


def _yaml_mapping(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"config {path}: expected a readable YAML file, got {reason}") from None
    except RepeatedKeyError as error:
        raise ConfigError(f"config {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected the keys of a trial, got {values!r}")
    return values


def main() -> None:
    """Entry point: a setting that cannot be ends in one line and exit code 2, a disk that is full in exit code 1."""
    try:
        app()
    except (ConfigError, SettingError, SpaceError) as error:
        print(f"joulemoe: {error}", file=sys.stderr)
        sys.exit(2)
    except StorageError as error:
        print(f"joulemoe: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.freeze()  # else the interpreter looks through every object that was ever imported, for seconds, to end


__all__ = ["Space", "app", "main"]

if __name__ == "__main__":
    main()
