"""The reference study's tables and figures, from its Parquet alone:

    python -m benchmarks.study docs/study-h100/data --out docs/study-h100

writes `tables.md` and PNG and SVG figures into the folder given. Which space makes which stage:
`tune_spaces/study/*.yaml`, and `python -m benchmarks.study_members` for stage members; test time comes from
`adapt.json` and `opening.json` beside the Parquet (`--out` of benchmarks/adapt.py and benchmarks/opening.py). A stage
that did not run says so, and the others stand. Every number is computed here; a test holds the committed text to its
data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import study_controls, study_long, study_phases, study_sections, study_test_time
from benchmarks.study_rows import Study, load
from benchmarks.study_text import Section
from pipelines import figures

SECTIONS: tuple[Callable[[Study], Section], ...] = (
    study_sections.repeatability,
    study_sections.front,
    study_sections.members,
    study_sections.epochs,
    study_controls.controls,
    study_long.long,
    study_phases.phases,
    study_test_time.adapting,
    study_test_time.opening,
    study_phases.modelled,
    study_phases.collapse,
    study_sections.cost,
)


def sections(study: Study) -> list[Section]:
    """All sections, in the order in which they are read."""
    return [section(study) for section in SECTIONS]


def page(study: Study, found: list[Section]) -> str:
    """The sections as Markdown."""
    words = " (modelled joules)" if study.context.modelled else ""
    lines = ["<!-- Written by `python -m benchmarks.study`: do not edit. -->", "# Tables of the reference study", ""]
    lines += [f"Trials on {study.context}."]
    lines += [f"{note[0].upper()}{note[1:]}." for note in study.notes]
    left = [f"* {stage}: {', '.join(words)}" for stage, words in study.left_out.items() if words]
    lines += ["", "Left out:", "", *left] if left else []
    for section in found:
        lines += ["", f"## {section.title}{words if section.ran else ''}", "", "\n\n".join(section.text)]
        for figure in section.figures:
            lines += ["", f"![{figure.alt}]({figure.id}.png)"]
    return "\n".join(lines) + "\n"


def write(folder: Path, out: Path) -> None:
    """Recompute everything and write it."""
    study = load(folder)
    found = sections(study)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(page(study, found), encoding="utf-8")
    for section in found:
        for figure in section.figures:
            figures.save(figure, out)
        print(f"{section.title}: {'done' if section.ran else 'not run'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that `joulemoe sweep --out` wrote, of all stages")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables.md and the figures")
    arguments = parser.parse_args()
    try:
        write(arguments.data, arguments.out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
