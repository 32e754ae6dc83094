"""What must hold of a sweep before anything runs: every value that it may draw is checked once, and its search fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.config import ConfigError, TrialConfig
from pipelines.records import TrialRecord, arrow_schema
from tune_spaces import CASE, Choice, Domain, Grid, Space

#: Points of lists up to which an adaptive search has all of them checked; beyond, every value once.
WHOLE = 2000


def check_search(space: Space, search: str, *, adaptive: bool, objectives: Sequence[str]) -> None:
    """Raises ConfigError where a search cannot do what it is asked for."""
    if not adaptive:
        return
    if CASE in space.domains:
        raise ConfigError(f"search: expected grid or random for a space with {CASE!r}, got {search!r}")
    if not space.domains:
        raise ConfigError(f"search: expected a space with domains for {search}, got fixed values only")
    if "seed" in space.domains:
        raise ConfigError(f"seed: expected one value with search {search}, got a domain; --seeds N makes replicates")
    if search == "cost-aware" and len(objectives) != 2:
        raise ConfigError(f"objectives: expected two for search cost-aware, got {len(objectives)}")


def check_objectives(objectives: Sequence[str]) -> None:
    """Raises ConfigError for an objective that is no column of numbers, or has no direction that there is."""
    schema = arrow_schema(TrialRecord)
    for axis in objectives:
        name, _, direction = str(axis).partition(":")
        if name not in schema.names or direction not in ("", "min", "max"):
            raise ConfigError(f"objectives: expected a column of trials (and :min or :max), got {axis!r}")
        kind = schema.field(name).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise ConfigError(f"objectives: expected a column of numbers, got {axis!r}")
    if not 2 <= len(objectives) <= 3:
        raise ConfigError(f"objectives: expected two or three, got {len(objectives)}")


def check_values(space: Space, *, adaptive: bool) -> None:
    """Every listed value and both ends of every range make a trial; an adaptive search may meet any point of them.

    Raises:
        ConfigError: the first value that cannot be.
    """
    values = {key: ends_of(domain) for key, domain in space.domains.items()}
    whole = adaptive and math.prod(len(v) for v in values.values()) <= WHOLE
    for point in _products(values) if whole else _each_once(space, values):
        TrialConfig.parse(space.resolve(point))


def ends_of(domain: Domain) -> tuple[Any, ...]:
    """The values of a list, each once, or the ends of a range."""
    if not isinstance(domain, Grid | Choice):
        return (domain.low, domain.high)
    return tuple(v for i, v in enumerate(domain.values) if v not in domain.values[:i])


def _products(values: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(values, point, strict=True)) for point in itertools.product(*values.values()))


def _each_once(space: Space, values: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    first = {key: listed[0] for key, listed in values.items()}
    for key, listed in values.items():
        for value in listed:
            yield _applying(space, key, {**first, key: value}, values)


def _applying(space: Space, key: str, point: dict[str, Any], values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The point with the values under which a key applies."""
    for other, allowed in space.conditions.get(key, {}).items():
        if other in values and point[other] not in allowed:
            taken = next((v for v in values[other] if v in allowed), allowed[0])
            point = {**point, other: taken}
        elif other not in values and CASE in values:
            fitting = (case for case in values[CASE] if isinstance(case, Mapping) and case.get(other) in allowed)
            point = {**point, CASE: next(fitting, point[CASE])}
        point = _applying(space, other, point, values)
    return point
