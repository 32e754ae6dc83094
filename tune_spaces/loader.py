"""Read a space file. A space says what each trial is (fixed values) and what varies (domains):

    question: How much loss does a joule buy?
    trial:
      router: energy                                # fixed
      energy_lambda: {grid: [0, 0.3, 1]}            # every value
      top_k: {choice: [1, 2]}                       # sampled from a list
      learning_rate: {loguniform: [1.0e-4, 1.0e-3]} # sampled from a range
      regularizer: {grid: [none, load_balance]}
      regularizer_weight: {grid: [0.01, 0.1], when: {regularizer: [load_balance]}}
    sweep:
      seeds: 2

A `when` keeps a key only in trials whose other keys have one of the named values (which must be among those that
they take; no circles). The loader knows the file's form; what the keys of `trial` mean is `pipelines.config`'s.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


class SpaceError(ValueError):
    """A space file that cannot be read: one line with the key, what was expected and what was got."""


class RepeatedKeyError(yaml.YAMLError):
    """A mapping that gives a key twice, of which YAML would take the last without a word."""


class _OnceLoader(yaml.SafeLoader):
    """Safe YAML in which a key stands once in its mapping; keys that `<<` merges in may be given anew."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            before = first.setdefault((key.tag, key.value), key)
            if before is not key:
                lines = f"lines {before.start_mark.line + 1} and {key.start_mark.line + 1}"
                raise RepeatedKeyError(f"{key.value}: expected a key once in a mapping, got it twice ({lines})")
        return node


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every one of these values is tried."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of these values is drawn."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number is drawn evenly from [low, high]."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """A number is drawn from [low, high], evenly in its logarithm."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class IntRange:
    """An integer is drawn evenly from low to high, both included."""

    low: int
    high: int


Domain = Grid | Choice | Uniform | LogUniform | IntRange
Conditions = Mapping[str, tuple[Any, ...]]

_LISTS: dict[str, type[Grid] | type[Choice]] = {"grid": Grid, "choice": Choice}
_RANGES: dict[str, type[Uniform] | type[LogUniform] | type[IntRange]] = {
    "uniform": Uniform,
    "loguniform": LogUniform,
    "int": IntRange,
}
KINDS = (*_LISTS, *_RANGES)
#: A domain whose values are mappings: keys that are tried together, where a product of grids would try too much.
CASE = "case"
SWEEP_KEYS = (
    "search",
    "scheduler",
    "seeds",
    "samples",
    "parallel",
    "objectives",
    "max_joules",
    "max_hours",
    "stop_when_hypervolume_stalls",
    "anchor",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """A search space: fixed values, domains, the conditions under which a domain applies, and sweep defaults."""

    name: str
    question: str
    fixed: Mapping[str, Any]
    domains: Mapping[str, Domain]
    conditions: Mapping[str, Conditions]
    sweep: Mapping[str, Any]

    @property
    def is_grid(self) -> bool:
        """True where every domain is a list to be tried in full."""
        return all(isinstance(domain, Grid) for domain in self.domains.values())

    def grid_points(self) -> Iterator[dict[str, Any]]:
        """The trials of a grid in file order (last key fastest), each once.

        Raises:
            SpaceError: a domain is sampled, so there is no grid.
        """
        for key, domain in self.domains.items():
            if not isinstance(domain, Grid):
                raise SpaceError(
                    f"{key}: expected grid values for a grid search, got {type(domain).__name__.lower()};"
                    " use --search random"
                )
        seen: list[dict[str, Any]] = []
        axes = [domain.values for domain in self.domains.values() if isinstance(domain, Grid)]
        for values in itertools.product(*axes):
            point = self.resolve(dict(zip(self.domains, values, strict=True)))
            if point not in seen:
                seen.append(point)
                yield point

    def resolve(self, sampled: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's keys from sampled values: fixed ones added, a case's keys put in their place, and those whose
        condition does not hold dropped."""
        point = {**self.fixed, **sampled}
        point |= point.pop(CASE, None) or {}
        for key, conditions in self.conditions.items():
            if any(point.get(other) not in allowed for other, allowed in conditions.items()):
                point.pop(key, None)
        return point


def read_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        yaml.YAMLError: it is no YAML; of these `RepeatedKeyError` where a mapping gives a key twice, in one line.
    """
    return yaml.load(text, Loader=_OnceLoader)


def load_space(path: str | Path) -> Space:
    """Read and check a space file.

    Raises:
        SpaceError: the file is missing or its form is wrong; one line that names the key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpaceError(f"space {path}: expected a readable YAML file, got {reason}") from None
    try:
        document = read_yaml(text)
    except RepeatedKeyError as error:
        raise SpaceError(f"space {path}: {error}") from None
    except yaml.YAMLError as error:
        raise SpaceError(f"space {path}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise SpaceError(f"space {path}: expected keys 'trial', 'question', 'sweep', got {_name(document)}")
    space = parse_space(path.stem, document)
    _check_conditions(space)
    return space


def dump_space(space: Space) -> dict[str, Any]:
    """The document that `parse_space` reads as this space."""
    trial: dict[str, Any] = dict(space.fixed)
    names: dict[type, str] = {kind: name for name, kind in (_LISTS | _RANGES).items()}
    for key, domain in space.domains.items():
        values = list(domain.values) if isinstance(domain, Grid | Choice) else [domain.low, domain.high]
        when = {other: list(allowed) for other, allowed in space.conditions.get(key, {}).items()}
        trial[key] = {names[type(domain)]: values, **({"when": when} if when else {})}
    return {"question": space.question, "trial": trial, "sweep": dict(space.sweep)}


def parse_space(name: str, document: Mapping[str, Any]) -> Space:
    """Check a space that was read.

    Raises:
        SpaceError: its form is wrong; one line that names the key.
    """
    _only(document, ("question", "trial", "sweep"), where="space")
    trial, sweep = document.get("trial"), document.get("sweep") or {}
    if not isinstance(trial, dict) or not trial:
        raise SpaceError(f"trial: expected the keys of a trial, got {_name(trial)}")
    if not isinstance(sweep, dict):
        raise SpaceError(f"sweep: expected keys, got {_name(sweep)}")
    _only(sweep, SWEEP_KEYS, where="sweep")
    _check_sweep(sweep)
    fixed: dict[str, Any] = {}
    domains: dict[str, Domain] = {}
    conditions: dict[str, Conditions] = {}
    for key, value in trial.items():
        if isinstance(value, dict):
            domains[key], when = _domain(key, value)
            if when:
                conditions[key] = when
        else:
            fixed[key] = value
    in_cases = _keys_of_cases(domains.get(CASE))
    for key, when in conditions.items():
        for other in when:
            if other == CASE or (other not in trial and other not in in_cases):
                raise SpaceError(f"{key}.when: expected a key of this trial, got {other!r}")
    return Space(
        name=name,
        question=str(document.get("question") or ""),
        fixed=fixed,
        domains=domains,
        conditions=_in_order(conditions),
        sweep=sweep,
    )


def _keys_of_cases(cases: Domain | None) -> set[str]:
    """Keys that some case sets.

    Raises:
        SpaceError: a case is not a mapping of keys to values.
    """
    if cases is None:
        return set()
    values = cases.values if isinstance(cases, Grid | Choice) else (cases,)
    for value in values:
        if not isinstance(value, dict):
            raise SpaceError(f"{CASE}: expected a grid or choice of mappings {{key: value}}, got {_name(value)}")
    return {key for value in values for key in value}


def _check_conditions(space: Space) -> None:
    """Raises SpaceError where a condition names a value that its key never takes."""
    for key, when in space.conditions.items():
        for other, allowed in when.items():
            _check_allowed(space, key, other, allowed)


def _in_order(conditions: Mapping[str, Conditions]) -> dict[str, Conditions]:
    """Conditions such that what a key waits for is decided before it.

    Raises:
        SpaceError: a key waits for itself.
    """
    ordered: dict[str, Conditions] = {}

    def add(key: str, above: tuple[str, ...]) -> None:
        if key in above:
            raise SpaceError(f"{key}.when: expected keys that do not depend on {key!r}, got a circle")
        for other in conditions.get(key, {}):
            add(other, (*above, key))
        if key in conditions:
            ordered[key] = conditions[key]

    for key in conditions:
        add(key, ())
    return ordered


def _check_allowed(space: Space, key: str, other: str, allowed: tuple[Any, ...]) -> None:
    domain, listed = space.domains.get(other), list[Any]()
    if other in space.fixed:
        listed.append(space.fixed[other])
    if isinstance(domain, Grid | Choice):
        listed += domain.values
    cases = space.domains.get(CASE)
    if isinstance(cases, Grid | Choice):
        listed += [case[other] for case in cases.values if other in case]
    if other in space.conditions or (other not in space.fixed and domain is None):
        listed.append(None)  # where it does not apply
    for value in allowed:
        in_range = isinstance(domain, Uniform | LogUniform | IntRange) and _in_range(domain, value)
        if value not in listed and not in_range:
            values = ", ".join(map(str, listed)) or str(domain)
            raise SpaceError(f"{key}.when.{other}: expected a value that {other} takes ({values}), got {_name(value)}")


def _in_range(domain: Uniform | LogUniform | IntRange, value: Any) -> bool:
    number = _number(value)
    return number is not None and domain.low <= number <= domain.high


def _check_sweep(sweep: Mapping[str, Any]) -> None:
    for key in ("seeds", "samples", "parallel", "stop_when_hypervolume_stalls"):
        value = sweep.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise SpaceError(f"sweep.{key}: expected a whole number of at least 1, got {_name(value)}")
    for key in ("max_joules", "max_hours"):
        value = sweep.get(key)
        if value is not None and (_number(value) or 0) <= 0:
            raise SpaceError(f"sweep.{key}: expected a number above 0, got {_name(value)}")
    if not isinstance(sweep.get("anchor", True), bool):
        raise SpaceError(f"sweep.anchor: expected true or false, got {_name(sweep['anchor'])}")
    if not isinstance(sweep.get("objectives") or [], list):
        raise SpaceError(f"sweep.objectives: expected a list of columns, got {_name(sweep['objectives'])}")


def _domain(key: str, value: Mapping[str, Any]) -> tuple[Domain, Conditions]:
    kinds = [kind for kind in value if kind != "when"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise SpaceError(
            f"{key}: expected one of {', '.join(KINDS)} (and 'when'), got {', '.join(map(str, kinds)) or 'nothing'}"
        )
    kind, arguments = kinds[0], value[kinds[0]]
    domain: Domain
    if kind in _LISTS:
        if not isinstance(arguments, list) or not arguments:
            raise SpaceError(f"{key}.{kind}: expected a list of at least one value, got {_name(arguments)}")
        domain = _LISTS[kind](tuple(arguments))
    else:
        domain = _range(key, kind, arguments)
    return domain, _conditions(key, value.get("when"))


def _range(key: str, kind: str, arguments: Any) -> Domain:
    bounds = [_number(a) for a in arguments] if isinstance(arguments, list) else []
    if len(bounds) != 2 or None in bounds:
        raise SpaceError(f"{key}.{kind}: expected [low, high], got {_name(arguments)}")
    low, high = bounds
    if not low < high or (kind == "loguniform" and low <= 0):
        rule = "0 < low < high" if kind == "loguniform" else "low < high"
        raise SpaceError(f"{key}.{kind}: expected {rule}, got [{low}, {high}]")
    if kind == "int" and not (isinstance(low, int) and isinstance(high, int)):
        raise SpaceError(f"{key}.int: expected integers, got [{low}, {high}]")
    return _RANGES[kind](low, high)


def _conditions(key: str, when: Any) -> Conditions:
    if when is None:
        return {}
    if not isinstance(when, dict) or not when:
        raise SpaceError(f"{key}.when: expected {{other_key: value or list}}, got {_name(when)}")
    return {other: tuple(v) if isinstance(v, list) else (v,) for other, v in when.items()}


def _only(mapping: Mapping[str, Any], allowed: tuple[str, ...], *, where: str) -> None:
    for key in mapping:
        if key not in allowed:
            raise SpaceError(f"{where}: unknown key {key!r}; expected one of {', '.join(allowed)}")


def _number(value: Any) -> Any:
    """The number that a YAML value stands for (YAML 1.1 reads 1e-4 as text), or None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _name(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]


def shipped_spaces() -> dict[str, Path]:
    """Spaces that come with the package, by the path under `tune_spaces/`."""
    folder = Path(__file__).parent
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.yaml"))}


def find_space(path: str) -> Path:
    """A path as given or, where there is no such file, the shipped space of that name."""
    if Path(path).exists():
        return Path(path)
    name = path.removeprefix("tune_spaces/")
    return shipped_spaces().get(name if name.endswith(".yaml") else f"{name}.yaml", Path(path))
