"""Search spaces: YAML files, one per question, and the loader that turns them into values."""

from tune_spaces.loader import (
    Choice,
    Domain,
    Grid,
    IntRange,
    LogUniform,
    Space,
    SpaceError,
    Uniform,
    find_space,
    load_space,
    shipped_spaces,
)

__all__ = [
    "Choice",
    "Domain",
    "Grid",
    "IntRange",
    "LogUniform",
    "Space",
    "SpaceError",
    "Uniform",
    "find_space",
    "load_space",
    "shipped_spaces",
]
