"""The command `joulemoe`. It takes paths and switches; files hold hyperparameters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from pipelines import cli_analysis
from pipelines.config import ConfigError, TrialConfig
from tune_spaces import Space, SpaceError, find_space, load_space

app = typer.Typer(
    name="joulemoe",
    help="Find the Mixture-of-Experts routing that buys the least loss per joule on the GPUs you own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli_analysis.register(app)

Base = Annotated[str | None, typer.Option(help="Base checkpoint: hub name, folder, or 'random'.")]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer: hub name or folder.")]
Data = Annotated[str | None, typer.Option(help="Hub data set, text file or glob, or Parquet with a 'text' column.")]
Out = Annotated[str, typer.Option(help="Folder (or URI) for the results.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE: replace a key of the trial; repeatable.")]


@app.command()
def sweep(
    space: Annotated[str, typer.Argument(help="Space file, or the name of a shipped space.")],
    out: Out = "results",
    base: Base = None,
    tokenizer: Tokenizer = None,
    data: Data = None,
    settings: Settings = None,
    search: Annotated[str | None, typer.Option(help="grid or random; default: what the space says.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Trials to draw in a random search.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Replicates of every trial.")] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Trials at once; default: one per GPU, or per CPU core.")
    ] = None,
    address: Annotated[str, typer.Option(help="Ray: local, auto, or ray://HOST:10001.")] = "local",
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow; default: sqlite in OUT.")
    ] = None,
) -> None:
    """Run a sweep and print its front."""
    from pipelines.plan import plan_sweep
    from pipelines.sweep import run_sweep

    loaded = load_space(find_space(space))
    plan = plan_sweep(
        loaded,
        overrides=_overrides(settings, base=base, tokenizer=tokenizer, data=data),
        search=search,
        samples=samples,
        seeds=seeds,
    )
    console = Console(highlight=False)
    console.print(f"Sweep [bold]{plan.sweep_id}[/bold]: {len(plan.trials)} trials. {plan.question}", soft_wrap=True)
    if plan.dropped:
        console.print(
            f"{plan.dropped} points of the space repeat an experiment (λ where no price can act, say) and were dropped."
        )
    parallel = parallel or loaded.sweep.get("parallel")
    result = run_sweep(plan, out=out, parallel=parallel, address=address, tracking_uri=tracking_uri)
    written = cli_analysis.conclude_sweep(console, out, plan.sweep_id, tracking_uri)
    if not result.completed or not written:
        failed = sum(record.state == "FAILED" for record in result.records)
        console.print(f"[red]No front:[/red] {result.completed} trials completed, {failed} failed.")
        raise typer.Exit(1)


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
    record = run_trial(parsed, out=out, on_epoch=progress.epoch)
    progress.finished(record)
    if record.state != "COMPLETED":
        raise typer.Exit(1)


@app.command()
def space(
    space: Annotated[str, typer.Argument(help="Space file, or the name of a shipped space.")],
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials as JSON.")] = False,
) -> None:
    """Print the trials of a space without running them."""
    from pipelines.plan import plan_sweep
    from pipelines.progress import describe

    loaded = load_space(find_space(space))
    plan = plan_sweep(loaded, overrides=_overrides(settings))
    if as_json:
        typer.echo(json.dumps([t.model_dump(mode="json") for t in plan.trials], indent=1))
        return
    console = Console(highlight=False)
    console.print(f"{len(plan.trials)} trials, {plan.dropped} repeats dropped. {plan.question}", soft_wrap=True)
    for config in plan.trials:
        console.print(f"  {config.trial_id}  {describe(config)}", soft_wrap=True)


@app.command()
def submit(
    space: Annotated[str, typer.Argument(help="Space file, or the name of a shipped space.")],
    address: Annotated[str, typer.Option(help="Ray dashboard, http://HEAD:8265.")],
    out: Out = "results",
    follow: Annotated[bool, typer.Option(help="Stream the job's log and return its exit code.")] = False,
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
    code = submit_sweep(path, out=out, address=address, overrides=overrides, follow=follow)
    raise typer.Exit(code)


def _overrides(settings: list[str] | None, **named: str | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set: expected KEY=VALUE, got {setting!r}")
        values[key] = yaml.safe_load(value)
    return values | {key: value for key, value in named.items() if value is not None}


def _yaml_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path}: expected a readable YAML file, got {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected the keys of a trial, got {values!r}")
    return values


def main() -> None:
    """Entry point: a setting that cannot be ends in one line and exit code 2."""
    try:
        app()
    except (ConfigError, SpaceError) as error:
        print(f"joulemoe: {error}", file=sys.stderr)
        sys.exit(2)


__all__ = ["Space", "app", "main"]

if __name__ == "__main__":
    main()
