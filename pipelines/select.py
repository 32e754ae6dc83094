"""Choosing rows with expressions such as `router=topk,top_k=2` or `router=energy|pid,energy_lambda>0`."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import hygiene

_TERM = re.compile(r"^\s*(\w+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*$")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One condition: a column, how it compares, and the values of which one must fit."""

    column: str
    sign: str
    values: tuple[str, ...]


def parse(expression: str) -> tuple[Term, ...]:
    """Read comma-separated conditions that must all hold.

    `=` and `!=` take alternatives separated by `|`; `none` is null. `<`, `<=`, `>`, `>=` compare numbers.

    Raises:
        ValueError: a condition that does not read `COLUMN SIGN VALUE`.
    """
    terms = []
    for part in expression.split(","):
        match = _TERM.match(part)
        if match is None or not match[3]:
            raise ValueError(f"expression: expected COLUMN=VALUE (or <, <=, >, >=, !=), got {part!r}")
        terms.append(Term(column=match[1], sign=match[2], values=tuple(v.strip() for v in match[3].split("|"))))
    return tuple(terms)


def matching(table: pa.Table, expression: str) -> np.ndarray:
    """Which rows satisfy an expression, as a boolean mask.

    Raises:
        ValueError: a malformed expression, an unknown column, or a number expected and not got.
    """
    keep = np.ones(table.num_rows, dtype=bool)
    for term in parse(expression):
        if term.column not in table.column_names:
            raise ValueError(f"expression: expected one of {', '.join(table.column_names)}; got {term.column!r}")
        keep &= _holds(table[term.column], term)
    return keep


def columns(expression: str) -> list[str]:
    """The columns that an expression looks at."""
    return [term.column for term in parse(expression)]


def _holds(column: pa.ChunkedArray, term: Term) -> np.ndarray:
    kind = column.type
    numeric = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    if term.sign in _COMPARE:
        if not numeric:
            raise ValueError(f"expression: expected a numeric column before {term.sign}, got {term.column!r}")
        with np.errstate(invalid="ignore"):
            return np.asarray(_COMPARE[term.sign](hygiene.numbers(column), _number(term.values[0], term.column)))
    found = np.zeros(len(column), dtype=bool)
    null = column.is_null().to_numpy()
    for value in term.values:
        if value.lower() in ("none", "null"):
            found |= null
        elif numeric:
            found |= np.isclose(hygiene.numbers(column), _number(value, term.column), rtol=1e-9, atol=0.0)
        else:
            text = column.cast(pa.string())
            found |= np.array([item == value for item in text.to_pylist()], dtype=bool)
    return ~found if term.sign == "!=" else found


def _number(text: str, column: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expression: {column}: expected a number, got {text!r}") from None
