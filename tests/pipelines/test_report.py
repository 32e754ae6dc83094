"""The report: what it says, that names cannot break it, and that it works in a browser without a network."""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines import chart, figures, svg
from pipelines.records import PowerRecord, Store
from pipelines.report import Bill, watch, write_report
from pipelines.results import load
from pipelines.sections_absorption import absorption_section
from pipelines.sections_energy import power_section
from tests.pipelines import synthetic
from tests.pipelines.browser import open_browser
from tests.pipelines.synthetic import SWEEP, trial

EVIL = '<script>alert("x")</script>&\'"'


def rows() -> list:
    """A sweep with everything a report shows: two routers, dense, seeds, failures, convergence."""
    whole = [
        dataclasses.replace(row, converged_at=2 if row.top_k == 1 else None, energy_flags=["late sample"])
        for row in synthetic.sweep()
    ]
    dense = {"router": "dense", "top_k": None, "energy_lambda": None, "num_experts": None, "expert_widths": None}
    nothing = dict.fromkeys(
        ("regularizer", "regularizer_weight", "temperature", "effective_experts", "routing_agreement")
    )
    for s in range(3):
        loss = 3.52 + 0.002 * s
        whole.append(
            trial(
                f"dense-s{s}",
                config_fingerprint="dense",
                seed=s,
                train_energy_j=140.0 + s,
                eval_loss_nats=loss,
                eval_bits_per_byte=0.4 * loss,
                **dense,
                **nothing,
            )
        )
    return [*whole, trial("bad", state="FAILED", error=EVIL, eval_loss_nats=None), trial("cut", censored=True)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    store = synthetic.write(out, rows())
    whole = {"s_per_step": 0.033, "steps": 303, "mean_power_w": 688.0, "mean_temperature_c": 57.0, "flags": ["late"]}
    boards = ("GPU-00000000-1111-2222-3333-444444444444", "GPU-99999999-1111-2222-3333-444444444444")
    for i, board in enumerate(boards):
        for j, position in enumerate(("start", "end")):
            at = synthetic.START + dt.timedelta(hours=j, seconds=i)
            joules = (1 + 0.03 * i + 0.01 * j) * 1e-4
            more = {"j_per_token_uncertainty": 2e-7, "started_at": at}
            synthetic.write_anchors(store, synthetic.anchor(board, position, joules, **more, **whole))
    links = {"k1-l0-s0": "http://127.0.0.1:5000/#/experiments/1/runs/abc"}
    bill = Bill(decode_tokens=1e6, price_per_kwh=0.3, co2_g_per_kwh=400.0)
    return write_report(out, SWEEP, links=links, bill=bill, papers="none")[0]


class _Outline(HTMLParser):
    """Balanced tags, ids, and the addresses that the page would load."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.unlabelled: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.loads += [str(values[name]) for name in ("src", "srcset") if values.get(name)]
        if tag == "link":
            self.loads.append(str(values.get("href")))
        if tag == "svg" and not values.get("aria-label"):
            self.unlabelled.append(str(values.get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return None

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def outline(text: str) -> _Outline:
    parser = _Outline()
    parser.feed(text)
    assert parser.open == []
    return parser


def test_the_page_is_whole_and_loads_nothing(page: Path) -> None:
    text = page.read_text()
    found = outline(text)
    assert len(found.ids) == len(set(found.ids))
    assert found.loads == []
    assert found.unlabelled == []
    assert "url(" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    "words",
    [
        "not dominated",
        "What is saved at equal loss",
        "Experts against the dense model",
        "bit per byte",
        "Loss against training time",
        "Effective experts over training",
        "Load per expert",
        "Measured − modelled",
        "the same work takes 3.0% more joules",
        "The anchor workload took 32,000 J beside them",
        "throttled from",
        "Agreement with λ = 0",
        "Has the gate learnt the price away?",
        "λ undone per layer",
        "Decisions that flip at λ → 0",
        "load, compile, warm-up 1",
        "kWh",
        "left out: 1 × FAILED (bad)",
        "left out: 1 × censored (ended early) (cut)",
        "late sample",
        "joulemoe pareto",
        "(ringed)",
        "http://127.0.0.1:5000/#/experiments/1/runs/abc",
    ],
)
def test_the_page_says(page: Path, words: str) -> None:
    assert words in page.read_text()


def test_the_report_says_what_epochs_are(page: Path, tmp_path: Path) -> None:
    assert "Each number of epochs is a trial of its own (cosine)." in page.read_text()
    synthetic.write(tmp_path, synthetic.anytime())
    text = write_report(tmp_path, SWEEP, papers="none")[0].read_text()
    outline(text)
    assert "Epochs are points of one trial (anytime)" in text
    assert "a trial of its own" not in text
    results = load(tmp_path, SWEEP)
    assert results.by_points
    assert {row["epochs"] for row in results.front.rows()} == {1, 2}
    assert "1 epoch" in text
    assert "Seconds are known of whole trials only" in text
    assert "Compared are the points that anytime trials passed through" in text
    assert "Decoding is measured at the end of a trial only" in text


def test_names_from_data_are_escaped(tmp_path: Path) -> None:
    evil = [
        trial("a", router=EVIL, gpu_name=EVIL, host=EVIL, price_profile=EVIL, error=None),
        trial("b", router="topk", regularizer=EVIL, train_energy_j=90.0, eval_loss_nats=3.9, gpu_name=EVIL),
        trial("c", state="FAILED", error=EVIL, eval_loss_nats=None, gpu_name=EVIL),
    ]
    synthetic.write(tmp_path, evil)
    text = write_report(tmp_path, SWEEP, links={"a": 'javascript:"x"'}, papers="none")[0].read_text()
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "&lt;script&gt;alert" in text
    outline(text)


def test_modelled_joules_are_called_modelled(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [dataclasses.replace(row, energy_source="modelled") for row in synthetic.sweep()])
    text = write_report(tmp_path, SWEEP, papers="none")[0].read_text()
    assert "modelled joules" in text
    assert "modelled, not measured" in text
    titles = re.findall(r'class="mid title"[^>]*>([^<]*)<', text)
    energies = [title for title in titles if "(J" in title]
    assert len(energies) >= 4
    assert all("modelled" in title for title in energies)


def test_sources_are_never_added_up(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [trial("a"), trial("b"), trial("m", energy_source="modelled")])
    text = write_report(tmp_path, SWEEP, papers="none")[0].read_text()
    assert "270 J (counter) and 135 J (modelled)" in text
    assert "some modelled" in text


def test_nothing_is_drawn_where_nothing_is_modelled(tmp_path: Path) -> None:
    """Training, a pause, training: the modelled line has a gap, the measured one has none, however many samples."""
    for samples, most in ((60, 60), (4000, 500)):
        row = trial(f"n{samples}", sweep_id=f"s{samples}")
        store = synthetic.write(tmp_path, [row])
        store.write(PowerRecord, synthetic.power(row, samples), sweep_id=row.sweep_id, trial_id=row.trial_id, attempt=0)
        section = power_section(load(tmp_path, row.sweep_id))
        assert section is not None
        lines = section.figures[0].lines
        assert [line.tip for line in lines] == ["measured", "modelled", "modelled"]
        assert lines[1].x[0] >= 5.0
        assert lines[1].x[-1] < 20.0
        assert lines[2].x[0] >= 22.5
        assert sum(len(line.x) for line in lines) <= 2 * most


def test_a_sweep_without_a_front_gets_a_page_that_says_why(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [trial(state="FAILED", error="out of memory", eval_loss_nats=None, train_energy_j=None)])
    text = write_report(tmp_path, SWEEP, papers="none")[0].read_text()
    assert "No front yet" in text
    assert "1 × FAILED" in text
    assert "out of memory" in text


def test_a_bare_trial_is_enough(tmp_path: Path) -> None:
    """Only trials, one row, no curves, no power, CPU."""
    store = Store(tmp_path)
    row = trial(gpu_name=None, gpu_uuid=None, energy_source="modelled", power_limit_w=None, decode_j_per_token=None)
    store.write(type(row), [row], sweep_id=SWEEP, trial_id="t0", attempt=0)
    outline(write_report(tmp_path, SWEEP, papers="none")[0].read_text())


def test_the_audit_shows_what_is_left_of_lambda_in_each_layer(tmp_path: Path) -> None:
    """λ = 0.6, of which the second layer took two thirds back; a trial without a price has no audit."""
    synthetic.write(tmp_path, [trial("free"), trial("priced", router="energy", energy_lambda=0.6)])
    section = absorption_section(load(tmp_path, SWEEP))
    assert section is not None
    (sheet,) = section.sheets
    assert [row[1] for row in sheet.rows] == ["priced", "priced"]
    cells = [[float(cell) for cell in row[2:]] for row in sheet.rows]
    assert cells[0] == pytest.approx([0, 0.6, 0.06, 0.06, 0.54, 1.0, 1.0, 0.3])
    assert cells[1] == pytest.approx([1, 0.6, 0.4, 0.4, 0.2, 1.0, 2.0, 0.1])
    lines, heat = section.figures
    assert isinstance(lines, chart.Chart)
    assert isinstance(heat, chart.Heat)
    assert [line.y[-1] for line in lines.lines] == pytest.approx([0.06, 0.4, 0.6])
    assert heat.values == (pytest.approx((0.3, 0.3, 0.3)), pytest.approx((0.3, 0.2, 0.1)))


def test_without_a_price_there_is_no_audit(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [trial("free")])
    assert absorption_section(load(tmp_path, SWEEP)) is None


def test_an_unknown_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one that has trials"):
        write_report(tmp_path, "nope")


def test_figures_for_papers(tmp_path: Path) -> None:
    synthetic.write(tmp_path, synthetic.sweep((1, 2, 2)))
    few = write_report(tmp_path, SWEEP)
    assert {path.name for path in few} >= {"front.png", "front.svg", "seconds.png", "curves.svg"}
    assert (tmp_path / "report" / SWEEP / "front.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_follows_a_running_sweep(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [trial("a")])
    pages = watch(tmp_path, SWEEP, every_s=5.0, sleep=lambda _: None)
    text = next(pages).read_text()
    assert "1 trials have ended" in text
    assert 'http-equiv="refresh" content="5"' in text
    synthetic.write(tmp_path, [trial("b", train_energy_j=50.0, eval_loss_nats=4.0)])
    assert "2 trials have ended" in next(pages).read_text()


def test_colours_and_shapes_tell_configurations_apart(tmp_path: Path) -> None:
    synthetic.write(tmp_path, rows())
    look = load(tmp_path, SWEEP).look
    seen = {
        (look.colour(row), look.shape(row))
        for row in ({"energy_lambda": v, "top_k": k} for v in look.lambdas for k in (1, 2))
    }
    assert len(seen) == 2 * len(look.lambdas)
    assert look.shape({"top_k": None}) not in {shape for _, shape in seen}


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_figure_is_the_same_to_the_byte_every_time(tmp_path: Path) -> None:
    one = chart.Chart(
        id="a", title="A", alt="One point.", x=chart.Axis(title="x"), y=chart.Axis(title="y"),
        points=(chart.Point(x=1.0, y=2.0, tip="p"),),
    )  # fmt: skip
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        written.append([path.read_bytes() for path in figures.save(one, tmp_path / name)])
    assert written[0] == written[1]


def test_the_ramps_rise_in_luminance_so_that_grey_keeps_their_order() -> None:
    css = (Path(svg.__file__).parent / "templates" / "report.css").read_text()
    ramps = [figures.RAMP]
    ramps += [tuple(re.findall(r"--c\d: (#\w{6})", part)) for part in css.split(":root")[1:]]
    assert len(ramps) == 4
    for ramp in ramps:
        grey = [_luminance(colour) for colour in ramp]
        assert len(grey) == chart.COLOURS
        assert grey == sorted(grey)


def test_axes_have_few_round_ticks() -> None:
    assert chart.Scale(low=0, high=3, start=0, end=1, whole=True).ticks() == [0, 1, 2, 3]
    assert chart.Scale(low=1, high=1e6, start=0, end=1, log=True).ticks() == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]
    assert chart.extent([], chart.Axis(title="")) == (0.0, 1.0)
    assert [chart.tick_text(v) for v in (0, 0.25, 1500, 20_000, 3e6)] == ["0", "0.25", "1500", "20k", "3M"]


# --- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(page: Path) -> Iterator[Any]:
    """The report in Chromium, with everything that it asked for or complained about."""
    with open_browser() as browser:
        found = browser.new_page(viewport={"width": 1000, "height": 900})
        found.complaints, found.asked = [], []
        found.on("console", lambda message: found.complaints.append(message.text))
        found.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.on("request", lambda request: found.asked.append(request.url))
        found.goto(page.as_uri())
        yield found
        assert found.complaints == []
        assert found.asked == [page.as_uri()]


@pytest.mark.browser
def test_hover_shows_the_configuration(tab: Any) -> None:
    tip = tab.locator("#tip")
    assert tip.is_hidden()
    tab.locator("#front .mark[data-router]").last.hover()
    assert tip.is_visible()
    for words in ("top-", "λ=", "training energy", "seeds", "on the front with probability", "trial k"):
        assert words in tip.inner_text()
    tab.keyboard.press("Escape")
    assert tip.is_hidden()


@pytest.mark.browser
def test_the_keyboard_reaches_the_same_words(tab: Any) -> None:
    mark = tab.locator("#front .mark[data-router]").first
    mark.focus()
    assert tab.locator("#tip").is_visible()
    assert mark.get_attribute("aria-label") == tab.locator("#tip").inner_text()
    tab.keyboard.press("Escape")


@pytest.mark.browser
def test_filters_act_on_every_figure_and_table(tab: Any) -> None:
    def shown(selector: str) -> int:
        return tab.locator(f"{selector}:not(.off)").count()

    marks, lines = shown("#front .mark[data-router]"), shown("#curves .line[data-router]")
    tab.select_option("select[data-filter=router]", "energy")
    assert 0 < shown("#front .mark[data-router]") < marks
    assert 0 < shown("#curves .line[data-router]") < lines
    assert shown("#front tbody tr") == shown("#front .mark[data-router]")
    assert "configurations shown" in tab.locator(".filters output").inner_text()
    tab.select_option("select[data-filter=member]", "front")
    assert tab.locator("#front .mark.weak[data-router]:not(.off)").count() == 0
    tab.click(".filters button")
    tab.wait_for_function(f"document.querySelectorAll('#front .mark[data-router]:not(.off)').length === {marks}")


@pytest.mark.browser
def test_a_point_leads_to_its_run(tab: Any) -> None:
    link = tab.locator("#front a[href*='/runs/abc']").first
    assert link.get_attribute("rel") == "noopener noreferrer"


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (1000, "dark"), (390, "light"), (390, "dark")])
def test_nothing_overflows_and_text_can_be_read(tab: Any, width: int, scheme: str) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (
        tab.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in (("p.facts", "color"), ("body", "backgroundColor"))
    )
    values = [_luminance("#" + "".join(f"{int(v):02x}" for v in re.findall(r"\d+", c)[:3])) for c in (ink, paper)]
    assert (max(values) + 0.05) / (min(values) + 0.05) >= 4.5  # WCAG AA
    tab.set_viewport_size({"width": 1000, "height": 900})
    tab.emulate_media(color_scheme="light")


@pytest.mark.browser
def test_paper_shows_the_tables(tab: Any) -> None:
    tab.emulate_media(media="print")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("details:not([open])").count() == 0
    assert tab.locator(".filters").is_hidden()
    assert tab.locator("#front table").is_visible()
    tab.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert tab.locator("details:not([open])").count() > 0
    tab.emulate_media(media="screen")
