"""The reference study's second look at its front: a space of the front's members and their neighbours, with more seeds.

    python -m benchmarks.study_members study --sweep front --out members.yaml
    joulemoe sweep members.yaml --out study --sweep-id members --base study-base --tokenizer PATH --data corpus.parquet

Members are not dominated in validation loss and joules of training. Neighbours differ from a member by one step of λ or
of top-k, all else equal. Beside them stands K = 2 at λ = 0, against which all are paired. Seeds are ones that the front
has not seen, so that the luck that put a configuration on the front is not counted again; judge by the test split.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.study_rows import baseline, widths_word
from pipelines.boards import with_anchors
from pipelines.config import TrialConfig
from pipelines.pareto import Front, pareto_front
from pipelines.records import Store, TrialRecord

#: Each takes half a minute to compile, for forty seconds of trials.
MOST_SHAPES = 6
#: Given on the command line of every stage, or no part of the experiment.
_NOT_IN_THE_SPACE = ("base", "tokenizer", "data", "seed", "threads")
#: What a compilation depends on, the slowest first; λ is a tensor.
_SHAPE = ("router", "regularizer", "regularizer_weight", "expert_width_factors", "num_experts", "top_k")
_STEPS = ("energy_lambda", "top_k")
_DEFAULTS = TrialConfig().model_dump(mode="json")
Config = Mapping[str, Any]


def choose(
    configs: Sequence[Config], joules: np.ndarray, loss: np.ndarray, on_front: np.ndarray, most: int
) -> list[int]:
    """Rows to run again: the baseline and, of `most`, members (evenly along the front where they are too many), then
    neighbours, those that lie least above the front first; no more than MOST_SHAPES shapes.

    Neighbours end at an odd number in all: an even one on two or four boards gives all seeds of a configuration to one.
    """
    members = [int(i) for i in np.flatnonzero(on_front)[np.argsort(joules[on_front])]]
    if len(members) > most:
        members = [members[i] for i in np.linspace(0, len(members) - 1, most).round().astype(int)]

    def above(i: int) -> float:
        return float(loss[i] - min((loss[m] for m in members if joules[m] <= joules[i]), default=loss[i]))

    near = {j for i in members for j in neighbours(configs, i)} - set(members)
    base = baseline(configs)
    found, shapes = list[int](), set[str]()
    ends = [*members[:1], *members[-1:]]  # first, so that what is one shape too many lies between them
    for i in [base, *ends, *members, *sorted(near, key=lambda i: (above(i), joules[i]))]:
        shape = "" if i is None else repr([configs[i][key] for key in _SHAPE])
        if i is None or i in found or len(found) > most or len(shapes | {shape}) > MOST_SHAPES:
            continue
        found.append(i)
        shapes.add(shape)
    even_out = len(found) % 2 == 0 and found[-1] in near
    return found[:-1] if even_out else found


def neighbours(configs: Sequence[Config], at: int) -> set[int]:
    """Rows one step of λ or of top-k away, up or down, all else equal."""
    found = set()
    for key in _STEPS:
        rest = {name: value for name, value in configs[at].items() if name not in (key, "seed")}
        line = [i for i, config in enumerate(configs) if rest.items() <= config.items()]
        line.sort(key=lambda i: configs[i][key])
        place = line.index(at)
        found |= {*line[max(0, place - 1) : place], *line[place + 1 : place + 2]}
    return found


def space_of(configs: Sequence[Config], *, seeds: int, first_seed: int) -> dict[str, Any]:
    """The document of a space of these configurations: one case each, trials of one shape side by side."""
    keys = [key for key in _DEFAULTS if key not in _NOT_IN_THE_SPACE]
    varied = [key for key in keys if len({repr(config[key]) for config in configs}) > 1]
    fixed = {key: configs[0][key] for key in keys if key not in varied and configs[0][key] != _DEFAULTS[key]}
    slow = [key for key in _SHAPE if key in varied]
    order = [*slow, *(key for key in varied if key not in (*slow, "energy_lambda")), "energy_lambda"]
    cases = sorted(
        ({key: config[key] for key in order if key in varied} for config in configs),
        key=lambda case: [(repr(type(value)), value) for value in case.values()],
    )
    trial = fixed | {"seed": first_seed} | ({"case": {"grid": cases}} if varied else {})
    return {
        "question": "Which members of the front stay undominated on text and seeds that did not choose them?",
        "trial": trial,
        "sweep": {"seeds": seeds, "anchor": False},
    }


def front_of(folder: Path, sweep: str) -> tuple[Front, list[Config]]:
    """The front of a sweep (its id, or what its id begins with), and the settings of each of its configurations.

    Raises:
        ValueError: no trial of it may stand on a front.
    """
    store = Store(folder)
    table = with_anchors(store.read(TrialRecord), store, None)
    mine = [name == sweep or name.startswith(f"{sweep}-") for name in table["sweep_id"].to_pylist()]
    front = pareto_front(table.filter(mine), bootstrap=0)
    if not len(front):
        raise ValueError(f"sweep: expected a sweep with completed trials in {folder}, got {sweep!r}")
    known = dict(zip(table["trial_id"].to_pylist(), table["config_json"].to_pylist(), strict=True))
    settings = [yaml.safe_load(known[str(name).split()[0]]) for name in front.configs["trial_id"].to_pylist()]
    return front, settings


def write(folder: Path, sweep: str, out: Path, *, seeds: int, most: int) -> None:
    """Choose, and write the space."""
    front, configs = front_of(folder, sweep)
    chosen = choose(configs, front.mean_NM[:, 0], front.mean_NM[:, 1], front.on_front_N, most)
    highest = max(config["seed"] for config in configs)
    document = space_of([configs[i] for i in chosen], seeds=seeds, first_seed=highest + 1)
    told = f"# Members of the front of sweep {sweep} and their neighbours; by `python -m benchmarks.study_members`.\n"
    body = yaml.safe_dump(document, sort_keys=False, width=120, default_flow_style=None, allow_unicode=True)
    out.write_text(told + body, encoding="utf-8")
    for i in chosen:
        config, place = configs[i], "member" if front.on_front_N[i] else "beside"
        widths = widths_word(config["expert_width_factors"] or [1.0] * (config["num_experts"] or 8))
        print(
            f"{place}: {config['router']}, K={config['top_k']}, λ={config['energy_lambda']:g}, {widths},"
            f" {config['regularizer']}: {front.mean_NM[i, 0]:.1f} J, {front.mean_NM[i, 1]:.4f} nat"
        )
    print(f"{out}: {len(chosen)} configurations × {seeds} seeds; the front has {len(front)} members")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that `joulemoe sweep --out` wrote")
    parser.add_argument("--sweep", default="front", help="sweep id, or what it begins with")
    parser.add_argument("--out", type=Path, required=True, help="YAML of the space")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--most", type=int, default=8, help="configurations beside the baseline")
    arguments = parser.parse_args()
    try:
        write(arguments.data, arguments.sweep, arguments.out, seeds=arguments.seeds, most=arguments.most)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
