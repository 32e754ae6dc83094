"""What sections of the reference study are made of: text, tables, numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from pipelines.chart import Figure

NOT_RUN = "Not run."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, paragraphs of Markdown under it, and figures."""

    title: str
    text: tuple[str, ...]
    figures: tuple[Figure, ...] = ()

    @property
    def ran(self) -> bool:
        """False where the stage is missing."""
        return self.text != (NOT_RUN,)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def text(value: float | None, digits: int = 4, *, unit: str = "") -> str:
    """A number, or a dash where it is not known."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}{unit}"


def total(values: Iterable[float | None]) -> float | None:
    """A sum; None where nothing is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
