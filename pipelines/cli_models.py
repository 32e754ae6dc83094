"""Commands on checkpoints: make one with experts, judge it, walk λ on it, adapt it under a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from pipelines.config import ConfigError, TrialConfig
from pipelines.console import standard_output
from pipelines.hub import first_line
from tune_spaces import RepeatedKeyError, read_yaml

if TYPE_CHECKING:
    from pipelines.adapting import Window
    from pipelines.checkpoint import Loaded
    from pipelines.data import TokenSplit
    from pipelines.scan import ScanPoint

Checkpoint = Annotated[str, typer.Argument(help="Folder of a saved model.")]
Data = Annotated[str, typer.Option(help="Hub data set, text file or glob, or Parquet; default: the embedded text.")]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer: hub name or folder; default: the checkpoint's own.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences per batch.")]
Length = Annotated[int | None, typer.Option("--seq-len", min=8, help="Tokens per sequence.")]
EvalTokens = Annotated[int | None, typer.Option(min=1, help="At most so many tokens of a split.")]
Seconds = Annotated[float | None, typer.Option(min=0.01, help="How long to measure each phase.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE: a key of the trial; repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    app.command()(upcycle)
    app.command("eval")(evaluate)
    app.command()(scan)
    app.command()(adapt)


def upcycle(
    base: Annotated[str, typer.Argument(help="Dense GPT-2: hub name or folder.")],
    out: Annotated[str, typer.Argument(help="New folder for the model with experts.")],
    experts: Annotated[int, typer.Option(min=1, help="Number of experts, each a whole copy.")] = 8,
    widths: Annotated[str | None, typer.Option(help="Widths relative to the dense FFN: 1,1,0.5,0.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")] = 2,
    router: Annotated[str, typer.Option(help="Router.")] = "energy",
    noise: Annotated[float, typer.Option(min=0, help="Noise that tells copies apart; 0 is exact.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Turn the feed-forward networks of a dense GPT-2 into experts."""
    import transformers

    from moe import upcycle as make
    from pipelines.checkpoint import check_new_folder
    from pipelines.model import moe_config_of

    values: dict[str, Any] = {"base": base, "router": router, "top_k": top_k, "upcycle_noise": noise, "seed": seed}
    if widths is None:
        values["num_experts"] = experts
    else:
        values["expert_width_factors"] = _numbers("widths", widths)
    config = TrialConfig.parse(values)
    check_new_folder(out)
    transformers.utils.logging.disable_progress_bar()
    try:
        kind = transformers.AutoConfig.from_pretrained(base).model_type
        dense = transformers.GPT2LMHeadModel.from_pretrained(base) if kind == "gpt2" else None
    except Exception as error:
        raise ConfigError(f"base: expected a dense GPT-2, got {base} ({first_line(error)})") from None
    if dense is None:  # its experts would be taken for missing weights, and drawn at random
        raise ConfigError(f"base: expected a dense GPT-2, got {base} (model_type {kind})")
    model = make(dense, moe_config_of(config, dense.config), noise=noise, seed=seed)
    model.save_pretrained(out)
    _copy_tokenizer(base, out)
    total, active = sum(p.numel() for p in model.parameters()), model.num_active_parameters()
    typer.echo(f"{out}: {total / 1e6:.1f} M parameters, of which {active / 1e6:.1f} M work for a token")


def evaluate(
    checkpoint: Checkpoint,
    split: Annotated[str, typer.Option(help="validation, test or train.")] = "validation",
    data: Data = "embedded",
    tokenizer: Tokenizer = None,
    batch: Batch = None,
    seq_len: Length = None,
    max_eval_tokens: EvalTokens = None,
    seconds: Seconds = None,
    settings: Settings = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Compare routers with the oracle, at 2·E forwards per MoE layer.")
    ] = False,
    against: Annotated[str | None, typer.Option(help="Compare routers with those of this checkpoint.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss, joules per token by phase and routing metrics of a checkpoint."""
    from pipelines.evaluation import evaluate as judge
    from pipelines.evaluation import measure_decode, measure_prefill
    from pipelines.model import opening_at, set_prices

    values = _values(data, tokenizer, batch, seq_len, max_eval_tokens, seconds, settings)
    with _loaded(checkpoint, values) as (loaded, monitor):
        if split not in loaded.corpus.splits:
            raise ConfigError(f"split: expected one of {', '.join(sorted(loaded.corpus.splits))}, got {split!r}")
        text = loaded.corpus.splits[split].first(loaded.config.max_eval_tokens)
        found = judge(loaded.model, text, loaded.config, loaded.hardware)
        rows: dict[str, Any] = {"loss_nats": found.loss_nats, "bits_per_byte": found.bits_per_byte}
        accuracy = _routing_accuracy(loaded, text, oracle=oracle, against=against)
        arguments = (loaded.config, loaded.hardware, monitor)
        if loaded.prices is not None:
            set_prices(loaded.model, loaded.prices["prefill"])
        rows["prefill_j_per_token"] = measure_prefill(loaded.model, text, *arguments).j_per_token
        if loaded.prices is not None:
            set_prices(loaded.model, loaded.prices["decode"])
        for size in loaded.config.decode_batches:
            with opening_at(loaded.model, loaded.config, loaded.hardware, size):
                decode = measure_decode(loaded.model, text, size, *arguments)
            rows[f"decode_j_per_token_b{size}"] = decode.j_per_token
        rows["energy_source"] = monitor.source
    names = (
        "routing_diversity", "effective_experts", "load_cv", "max_violation", "dead_experts", "open_experts",
        "mean_selected_width", "router_margin", "logit_std", "price_flip_fraction", "unpriced_agreement",
        "domain_specialisation",
    )  # fmt: skip
    if found.routing is not None:
        rows |= {name: getattr(found.routing, name) for name in names} | accuracy
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    sheet = Table(title=f"{checkpoint}, {split}", title_justify="left", show_header=False)
    for name, value in rows.items():
        sheet.add_row(name, _text(value) + _modelled(name, rows["energy_source"]))
    standard_output().print(sheet)


def _routing_accuracy(loaded: Loaded, text: TokenSplit, *, oracle: bool, against: str | None) -> dict[str, Any]:
    """Agreement with the oracle and with another checkpoint's routers, mean and by layer, where it was asked for."""
    from pipelines.checkpoint import load_routers
    from pipelines.evaluation import agreement_by_layer, oracle_by_layer
    from pipelines.trial_rows import mean_of

    layers: dict[str, list[float | None]] = {}
    if (oracle or against) and loaded.config.is_dense:
        raise ConfigError("oracle, against: expected a checkpoint with experts, got a dense one")
    try:
        if oracle:
            layers["oracle_agreement"] = oracle_by_layer(loaded.model, text, loaded.config, loaded.hardware)
        if against:
            other = load_routers(against, loaded)
            layers["other_agreement"] = agreement_by_layer(loaded.model, other, text, loaded.hardware)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    means = {name: mean_of(values) for name, values in layers.items()}
    return means | {f"layer_{name}": values for name, values in layers.items()}


def scan(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder for the curve, the numbers and the suggested space.")] = Path(
        "scan"
    ),
    lambdas: Annotated[str | None, typer.Option(help="λ, comma-separated; default: 1e-5 to 100, two a decade.")] = None,
    data: Data = "embedded",
    tokenizer: Tokenizer = None,
    batch: Batch = None,
    seq_len: Length = None,
    max_eval_tokens: EvalTokens = None,
    seconds: Seconds = None,
    settings: Settings = None,
) -> None:
    """Walk λ upwards without training, until diversity or loss breaks; suggest a range for a space.

    The column "open" counts distinct experts that compute at a position of an evaluation batch (--batch sequences),
    mean over positions and layers: what a decode step of as many sequences reads.
    """
    from pipelines.scan import LAMBDAS, sequences_of, verdict, write_scan
    from pipelines.scan import scan as walk

    asked = LAMBDAS if lambdas is None else _numbers("lambdas", lambdas)
    values = _values(data, tokenizer, batch, seq_len, max_eval_tokens, seconds, settings)
    with _loaded(checkpoint, values) as (loaded, monitor):
        modelled = " (modelled)" if monitor.source == "modelled" else ""
        typer.echo(f"open: distinct experts that compute at a position of {sequences_of(loaded)} sequences")
        typer.echo(
            f"       λ    loss  diversity  agreement   open  prefill, decode [mJ/token]{modelled}, training (modelled)"
        )
        found = walk(loaded, monitor, asked, on_point=lambda point: typer.echo(_scan_line(point)))
        paths = write_scan(found, loaded, out)
    typer.echo(f"Ended because {found.stopped}.")
    typer.echo(verdict(found))
    typer.echo("Written: " + ", ".join(map(str, paths)))


def adapt(
    checkpoint: Checkpoint,
    budget: Annotated[
        float | None, typer.Option("--budget-j-per-token", min=0, help="Joules per token, adapting included.")
    ] = None,
    share: Annotated[
        float | None, typer.Option("--budget-share", min=0, max=1, help="Share of the range; 0: E_min, 1: E at λ = 0.")
    ] = None,
    data: Data = "embedded",
    out: Annotated[str, typer.Option(help="Folder (or URI) for the results.")] = "results",
    chunk: Annotated[int | None, typer.Option(min=1, help="Sequences per chunk.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to stream.")] = 30,
    window: Annotated[
        float, typer.Option("--window", min=0.05, help="Seconds of a window; below 1 s readings are rough.")
    ] = 1.0,
    dither: Annotated[int, typer.Option(min=0, help="Windows with dithered shares, to learn prices from.")] = 0,
    use_learnt: Annotated[
        bool, typer.Option("--use-learnt", help="Put join prices learnt from --dither on the routers, if trusted.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Run a budget below the reachable range too.")] = False,
    tokenizer: Tokenizer = None,
    seq_len: Length = None,
    settings: Settings = None,
) -> None:
    """Stream text under a joule budget: λ follows measured joules, the routers learn from what they have seen."""
    from pipelines.adapt import AdaptPlan
    from pipelines.adapt import adapt as run

    if (budget is None) == (share is None):
        raise ConfigError("budget: expected --budget-j-per-token or --budget-share, got both or neither")
    plan = AdaptPlan(
        budget_j_per_token=budget,
        budget_share=share,
        windows=windows,
        window_s=window,
        dither_windows=dither,
        use_learnt=use_learnt,
        force=force,
    )
    values = _values(data, tokenizer, chunk, seq_len, None, None, settings)
    with _loaded(checkpoint, values, full_precision=False) as (loaded, monitor):
        if monitor.source == "modelled":
            typer.echo("Joules are modelled from CPU time: no energy counter can be read here.")
        try:
            found = run(loaded, monitor, plan, out=out, say=typer.echo, on_window=_window_printer())
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None
    known = [w for w in found.windows if w.j_per_token is not None]
    if known:
        mean = sum(w.measurement.energy_j or 0.0 for w in known) / sum(w.tokens for w in known)
        off = mean / found.budget_j_per_token - 1
        typer.echo(
            f"Mean {1e3 * mean:.4g} mJ/token, {off:+.2%} off the budget; loss {found.record.eval_loss_nats:.4f}."
        )
    typer.echo(_cost_of_adapting(found.windows))
    typer.echo(f"Written: {out}, trial {found.record.trial_id}")


def _cost_of_adapting(windows: Sequence[Window]) -> str:
    """What the updates took, in time and joules; the cost model's joules of the chunks beside those measured."""
    updating = sum(w.update_s for w in windows) / sum(w.measurement.duration_s for w in windows)
    pairs = [(w.update_energy_j, w.measurement.energy_j) for w in windows]
    update_j, all_j = sum(u for u, _ in pairs if u is not None), sum(e for _, e in pairs if e is not None)
    text = f"Updates took {updating:.1%} of the time"
    if all_j > 0:
        word = " (modelled)" if any(w.measurement.source == "modelled" for w in windows) else ""
        text += f" and, by it, {update_j:.4g} of {all_j:.4g} J{word}, which are in the windows"
    modelled = [(w.modelled_j, w.measurement.energy_j) for w in windows]
    both = [(m, e) for m, e in modelled if m is not None and e is not None]
    if both:
        model_j, measured_j = sum(m for m, _ in both), sum(e for _, e in both)
        text += f"; modelled, chunks alone: {model_j:.4g} J, {model_j / measured_j - 1:+.1%} off the measured"
    return text + "."


def _window_printer() -> Callable[[Window, float], None]:
    head = ["window  mJ/token  off budget  modelled  updates [J]       λ    loss  events"]

    def show(window: Window, budget: float) -> None:
        if head:
            typer.echo(head.pop())
        energy, modelled_j, update_j = window.j_per_token, window.modelled_j, window.update_energy_j
        joules = "       –           –" if energy is None else f"{1e3 * energy:8.4g}  {energy / budget - 1:+10.1%}"
        modelled = "–" if modelled_j is None else f"{1e3 * modelled_j / window.tokens:.4g}"
        updates = "–" if update_j is None else f"{update_j:.4g}"
        events = ", ".join(window.events)
        typer.echo(
            f"{window.index:6d}  {joules}  {modelled:>8}  {updates:>11}  {window.energy_lambda:6.3f}"
            f"  {window.loss_nats:6.4f}  {events}"
        )

    return show


def _scan_line(point: ScanPoint) -> str:
    def milli(value: float | None) -> str:
        return "–" if value is None else f"{1e3 * value:.4g}"

    agreement = "–" if point.agreement is None else f"{point.agreement:.3f}"
    return (
        f"{point.energy_lambda:8.3g}  {point.loss_nats:6.4f}  {point.routing_diversity:9.2f}  {agreement:>9}"
        f"  {point.position_open_experts:5.2f}  {milli(point.prefill_j_per_token)}, {milli(point.decode_j_per_token)},"
        f" {milli(point.modelled_train_j_per_token)}"
    )


@contextmanager
def _loaded(checkpoint: str, values: dict[str, Any], *, full_precision: bool = True) -> Iterator[tuple[Loaded, Any]]:
    """The checkpoint and a monitor. Without `full_precision` a GPU computes in the weights' own bf16."""
    import torch

    from hwcost import EnergyMonitor
    from pipelines.checkpoint import load_checkpoint

    if not full_precision and torch.cuda.is_available() and values.get("device") != "cpu":
        values = {"dtype": "pure_bf16"} | values
    with EnergyMonitor.for_assigned_devices() as monitor:
        yield load_checkpoint(checkpoint, values, monitor), monitor


def _values(
    data: str,
    tokenizer: str | None,
    batch: int | None,
    seq_len: int | None,
    max_eval_tokens: int | None,
    seconds: float | None,
    settings: list[str] | None,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "data": data, "tokenizer": tokenizer, "batch_size": batch, "seq_len": seq_len,
        "max_eval_tokens": max_eval_tokens, "measure_seconds": seconds,
    }  # fmt: skip
    return {key: value for key, value in (values | settings_of(settings)).items() if value is not None}


def settings_of(settings: Sequence[str] | None) -> dict[str, Any]:
    """What `--set KEY=VALUE` says, values read as YAML; text that is none (a glob such as *.txt) stays text.

    Raises:
        ConfigError: no `=`, or a key given twice in a mapping.
    """
    values: dict[str, Any] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set: expected KEY=VALUE, got {setting!r}")
        try:
            values[key] = read_yaml(value)
        except RepeatedKeyError as error:
            raise ConfigError(f"--set {key}: {error}") from None
        except yaml.YAMLError:
            values[key] = value
    return values


def _numbers(key: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{key}: expected numbers separated by commas, got {text!r}") from None


def _copy_tokenizer(base: str, out: str) -> None:
    """Put the base's tokenizer beside the model, where it has one."""
    import transformers

    try:
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(out)
    except Exception as error:
        typer.echo(f"tokenizer: {base} has none to copy ({type(error).__name__}); pass --tokenizer later", err=True)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _modelled(name: str, source: str | None) -> str:
    return " modelled" if source == "modelled" and "_j_" in name else ""
