"""Take the folders of the machine out of recordings that are to be published: `benchmarks/without_folders.py DATA`.

What stays of a path in the key `data`, `tokenizer` or `base` is its last part, from which an experiment's id is made.
JSON files beside the tables are treated alike. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KEYS = ("data", "tokenizer", "base")


def name_of(value: Any) -> Any:
    """The last part of an absolute path; anything else as it is."""
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def cleaned(value: Any) -> Any:
    """A JSON document without folders under `KEYS`, at any depth."""
    if isinstance(value, dict):
        return {k: name_of(v) if k in KEYS and isinstance(v, str) else cleaned(v) for k, v in value.items()}
    return [cleaned(v) for v in value] if isinstance(value, list) else value


def clean_table(path: Path) -> bool:
    """Rewrite one Parquet file where it names folders; whether it did."""
    table = pq.read_table(path, partitioning=None)
    before = table
    for index, field in enumerate(table.schema):
        values = table[index].to_pylist() if field.name in (*KEYS, "config_json") else []
        if field.name == "config_json":
            new = [v and json.dumps(cleaned(json.loads(v)), sort_keys=True) for v in values]
        else:
            new = [name_of(v) for v in values]
        if new != values:
            table = table.set_column(index, field, pa.array(new, field.type))
    if table is not before:
        pq.write_table(table, path)
    return table is not before


def clean_json(path: Path) -> bool:
    """Rewrite one JSON file where it names folders; whether it did."""
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    if (new := cleaned(document)) == document:
        return False
    path.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    return True


def main() -> None:
    """Clean every table and JSON file under a folder, and say which changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for path in sorted(folder.rglob("*")):
        if (path.suffix == ".parquet" and clean_table(path)) or (path.suffix == ".json" and clean_json(path)):
            print(path)


if __name__ == "__main__":
    main()
