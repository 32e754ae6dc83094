"""Search spaces: YAML files, one per question, and the loader that turns them into values."""

from tune_spaces.loader import (
    CASE,
    Choice,
    Domain,
    Grid,
    IntRange,
    LogUniform,
    RepeatedKeyError,
    Space,
    SpaceError,
    Uniform,
    dump_space,
    find_space,
    load_space,
    parse_space,
    read_yaml,
    shipped_spaces,
)

__all__ = [
    "CASE",
    "Choice",
    "Domain",
    "Grid",
    "IntRange",
    "LogUniform",
    "RepeatedKeyError",
    "Space",
    "SpaceError",
    "Uniform",
    "dump_space",
    "find_space",
    "load_space",
    "parse_space",
    "read_yaml",
    "shipped_spaces",
]
