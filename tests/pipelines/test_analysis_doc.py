"""docs/analysis.md does what it says: every command and every Python block runs on a (synthetic) sweep."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipelines import cli_analysis
from tests.pipelines import synthetic

PAGE = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [part.split("```")[0] for part in PAGE.split(f"```{language}\n")[1:]]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    synthetic.write(tmp_path / "results", synthetic.sweep((2, 2, 3)))
    return tmp_path / "results"


def test_the_python_blocks_run(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    found = [block for block in blocks("python") if "mlflow" not in block]
    assert len(found) >= 6
    for block in found:
        exec(compile(block, "docs/analysis.md", "exec"), scope)
    assert "topk" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_run(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    cli_analysis.register(app)
    runner = CliRunner()
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 12
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "joulemoe"
        done = runner.invoke(app, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}: {done.output}"
        assert done.output.strip()
