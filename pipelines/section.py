"""A section of the report as a value: words, figures, and the table beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pipelines.chart import Figure

#: More rows than this make a page that nobody scrolls; the command line prints them all.
ROWS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table of text. `keys` are what the page's filters look at, one mapping per row, or none."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    keys: tuple[Mapping[str, str], ...] = ()
    links: tuple[str, ...] = ()

    def shown(self) -> list[tuple[tuple[str, ...], Mapping[str, str], str]]:
        """The first rows, each with its keys and its link."""
        keys = self.keys or tuple({} for _ in self.rows)
        links = self.links or tuple("" for _ in self.rows)
        return list(zip(self.rows, keys, links, strict=True))[:ROWS]

    @property
    def hidden(self) -> int:
        """Rows that are not shown."""
        return max(0, len(self.rows) - ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, paragraphs, figures, tables. `open_tables`: show the tables at once, not behind a summary."""

    id: str
    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    code: str = ""
    open_tables: bool = False
    paper: bool = False
