"""docs/analysis.md does what it says: every command and every Python block runs on a (synthetic) sweep."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipelines import cli_analysis
from tests.pipelines import synthetic

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "analysis.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [part.split("```")[0] for part in PAGE.split(f"```{language}\n")[1:]]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    synthetic.write(tmp_path / "results", synthetic.sweep((2, 2, 3)))
    shutil.copytree(DOCS / "data", tmp_path / "docs" / "data")
    return tmp_path / "results"


def shown_by(words: list[str]) -> str:
    app = typer.Typer()
    cli_analysis.register(app)
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_worked_example_is_what_the_commands_say(results: Path) -> None:
    """The numbers of the page are those of the committed result set."""
    out = "docs/data/h200-first-sweep"
    printed = "".join(shown_by(["pareto", out]).split())
    example = PAGE.split("```text\n")[1].split("```")[0].splitlines()
    for line in example[1:]:
        assert "".join(line.split()) in printed, line
    quotes = [part.split("\n\n")[0].replace("\n> ", " ") for part in PAGE.split("\n\n> ")[1:]]
    sides = [("energy_lambda=0", "energy_lambda>0"), ("top_k=2", "top_k=1")]
    for quote, (baseline, candidate) in zip(quotes, sides, strict=True):
        answer = shown_by(["compare", out, "--baseline", baseline, "--candidate", candidate])
        assert " ".join(quote.split()) in " ".join(answer.split())


def test_the_python_blocks_run(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    found = [block for block in blocks("python") if "mlflow" not in block]
    assert len(found) >= 6
    for block in found:
        exec(compile(block, "docs/analysis.md", "exec"), scope)
    assert "topk" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_run(results: Path) -> None:
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 12
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "joulemoe"
        assert shown_by(words[1:]).strip(), line
