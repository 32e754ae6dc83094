"""docs/energy.md does what it says: its Python blocks run, and the flags of its tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "energy.md").read_text(encoding="utf-8")


def test_the_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]
    assert len(blocks) >= 2
    scope: dict[str, Any] = {"train": lambda: sum(range(10_000))}
    for block in blocks:
        exec(compile(block, "docs/energy.md", "exec"), scope)
    assert "'train': LedgerEntry(" in capsys.readouterr().out
    assert scope["cost"].energy_j > 0


def test_every_flag_of_the_fault_table_is_one_of_the_codes() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hwcost").glob("*.py"))
    table = PAGE.split("## Faults and their outcomes")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 28
    flags = {flag for row in rows for flag in re.findall(r"`([a-z]+_[a-z_]+)(?::[^`]*)?`", row.rsplit(" | ", 1)[1])}
    assert len(flags) >= 20
    composed = {"power_not_finite": "_not_finite"}  # {field}_not_finite
    assert {flag for flag in flags if composed.get(flag, flag) not in source} == set()
