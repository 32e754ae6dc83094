"""The README's snippets run on the sweep that it shows; its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from pipelines.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs_on_the_shown_sweep(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results").symlink_to(ROOT / "docs" / "data" / "h200-first-sweep")
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 3


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_commands_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in re.findall(r"joulemoe ([a-z]+)\b", README):
        if name not in ("sweep", "finds"):
            assert name in commands, name
