"""The space loader: forms it takes, forms it refuses, and what it says then."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune_spaces import (
    Choice,
    Grid,
    IntRange,
    LogUniform,
    SpaceError,
    Uniform,
    dump_space,
    find_space,
    load_space,
    parse_space,
    shipped_spaces,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def test_every_kind_of_domain_is_read(tmp_path: Path) -> None:
    space = load_space(
        write(
            tmp_path,
            """
question: which?
trial:
  router: energy
  energy_lambda: {grid: [0, 1]}
  top_k: {choice: [1, 2]}
  temperature: {uniform: [0.5, 2]}
  learning_rate: {loguniform: [1e-4, 1e-2]}
  epochs: {int: [1, 4]}
sweep: {seeds: 3}
""",
        )
    )
    assert space.fixed == {"router": "energy"}
    assert space.domains == {
        "energy_lambda": Grid((0, 1)),
        "top_k": Choice((1, 2)),
        "temperature": Uniform(0.5, 2),
        "learning_rate": LogUniform(1e-4, 1e-2),
        "epochs": IntRange(1, 4),
    }
    assert space.sweep == {"seeds": 3}
    assert not space.is_grid


def test_conditions_drop_keys_and_repeats(tmp_path: Path) -> None:
    space = load_space(
        write(
            tmp_path,
            """
trial:
  regularizer: {grid: [none, cv2]}
  regularizer_weight: {grid: [0.1, 0.2], when: {regularizer: cv2}}
""",
        )
    )
    assert list(space.grid_points()) == [
        {"regularizer": "none"},
        {"regularizer": "cv2", "regularizer_weight": 0.1},
        {"regularizer": "cv2", "regularizer_weight": 0.2},
    ]


def test_a_condition_on_a_key_that_does_not_apply_itself_fails_in_any_order(tmp_path: Path) -> None:
    space = load_space(
        write(
            tmp_path,
            """
trial:
  a: {grid: [1, 2], when: {b: x}}
  b: {grid: [x], when: {c: [u, v]}}
  c: {grid: [u, w, v]}
  d: {uniform: [0, 1], when: {a: 2}}
""",
        ).with_suffix(".yaml")
    )
    assert space.resolve({"a": 1, "b": "x", "c": "w", "d": 0.5}) == {"c": "w"}
    assert space.resolve({"a": 2, "b": "x", "c": "u", "d": 0.5}) == {"a": 2, "b": "x", "c": "u", "d": 0.5}


def test_a_cases_keys_are_tried_together(tmp_path: Path) -> None:
    space = load_space(
        write(
            tmp_path,
            """
trial:
  router: energy
  top_k: 2
  case: {grid: [{top_k: 1}, {router: random}, {}]}
  epochs: {grid: [1, 2]}
  price: {grid: [joules], when: {router: energy}}
""",
        )
    )
    assert list(space.grid_points()) == [
        {"router": "energy", "top_k": 1, "epochs": 1, "price": "joules"},
        {"router": "energy", "top_k": 1, "epochs": 2, "price": "joules"},
        {"router": "random", "top_k": 2, "epochs": 1},
        {"router": "random", "top_k": 2, "epochs": 2},
        {"router": "energy", "top_k": 2, "epochs": 1, "price": "joules"},
        {"router": "energy", "top_k": 2, "epochs": 2, "price": "joules"},
    ]
    assert parse_space("again", dump_space(space)).domains == space.domains


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trial: {case: {grid: [1]}}", "case: expected a grid or choice of mappings {key: value}, got 1"),
        ("trial: {case: {uniform: [1, 2]}}", "case: expected a grid or choice of mappings"),
        ("trial: {top_k: {gird: [1]}}", "top_k: expected one of grid, choice, uniform, loguniform, int"),
        ("trial: {top_k: {grid: []}}", "top_k.grid: expected a list of at least one value"),
        ("trial: {top_k: {uniform: [2, 1]}}", "top_k.uniform: expected low < high, got [2, 1]"),
        ("trial: {top_k: {loguniform: [0, 1]}}", "top_k.loguniform: expected 0 < low < high"),
        ("trial: {top_k: {int: [1, 2.5]}}", "top_k.int: expected integers"),
        ("trial: {top_k: {uniform: [1]}}", "top_k.uniform: expected [low, high]"),
        ("trial: {a: {grid: [1], when: {b: 1}}}", "a.when: expected a key of this trial, got 'b'"),
        ("trial: {a: {grid: [1], when: 3}}", "a.when: expected {other_key: value or list}"),
        (
            "trial: {r: {grid: [x, y]}, a: {grid: [1], when: {r: z}}}",
            "a.when.r: expected a value that r takes (x, y), got 'z'",
        ),
        ("trial: {r: x, a: {grid: [1], when: {r: [x, z]}}}", "a.when.r: expected a value that r takes (x), got 'z'"),
        ("trial: {r: {int: [1, 3]}, a: {grid: [1], when: {r: 4}}}", "a.when.r: expected a value that r takes"),
        ("trial: {case: {grid: [{r: x}]}, a: {grid: [1], when: {r: y}}}", "a.when.r: expected a value that r takes"),
        ("trial: {a: {grid: [1], when: {a: 1}}}", "a.when: expected keys that do not depend on 'a', got a circle"),
        ("trial: {a: {grid: [1], when: {b: 1}}, b: {grid: [1], when: {a: 1}}}", "got a circle"),
        (
            "trial: {c: {grid: [1], when: {a: 1}}, a: {grid: [1], when: {b: 1}}, b: {grid: [1], when: {a: 1}}}",
            "got a circle",
        ),
        ("trial: {case: {grid: [{a: 1}]}, b: {grid: [1], when: {case: 1}}}", "b.when: expected a key of this trial"),
        ("trail: {a: 1}", "space: unknown key 'trail'"),
        ("trial: {}", "trial: expected the keys of a trial"),
        ("trial: {a: 1}\nsweep: {sed: 1}", "sweep: unknown key 'sed'"),
        ("trial: {a: 1}\nsweep: 4", "sweep: expected keys, got 4"),
        ("trial: {a: 1}\nsweep: {seeds: 2.5}", "sweep.seeds: expected a whole number of at least 1, got 2.5"),
        ("trial: {a: 1}\nsweep: {max_joules: x}", "sweep.max_joules: expected a number above 0, got 'x'"),
        ("trial: {a: 1}\nsweep: {objectives: 3}", "sweep.objectives: expected a list of columns, got 3"),
        ("- 1", "expected keys 'trial'"),
        ("a: [", "expected YAML"),
        ("trial:\n  a: 1\n  b: 2\n  a: 3", "a: expected a key once in a mapping, got it twice (lines 2 and 4)"),
        ("trial: {case: {grid: [{r: x}, {s: 1, s: 1}]}}", "s: expected a key once in a mapping, got it twice"),
    ],
)
def test_a_wrong_form_is_named_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpaceError) as caught:
        load_space(write(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_are_merged_in_may_be_given_anew(tmp_path: Path) -> None:
    text = """
trial:
  a: {grid: [{in: &first {x: 1, y: 1}}, {in: {same: &second {<<: *first, y: 2}}}]}
  b: {grid: [{<<: *second, x: 3}]}
"""
    space = load_space(write(tmp_path, text))
    assert space.domains["b"] == Grid(({"x": 3, "y": 2},))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"nowhere\.yaml: expected a readable YAML file"):
        load_space(tmp_path / "nowhere.yaml")


def test_a_sampled_domain_has_no_grid(tmp_path: Path) -> None:
    space = load_space(write(tmp_path, "trial: {temperature: {uniform: [1, 2]}}"))
    with pytest.raises(SpaceError, match="temperature: expected grid values"):
        list(space.grid_points())


def test_shipped_spaces_are_found_by_name() -> None:
    assert find_space("quickstart") == shipped_spaces()["quickstart.yaml"]
    assert find_space("tune_spaces/quickstart.yaml").exists()


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_shipped_spaces_load_and_say_their_question(name: str) -> None:
    assert load_space(shipped_spaces()[name]).question


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(bytes(range(200, 256)))
    with pytest.raises(SpaceError, match="expected a readable YAML file"):
        load_space(tmp_path / "s.yaml")
