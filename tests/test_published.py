"""What is published of recordings: no folders of the machine that made them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.without_folders import clean_json, clean_table

DOCS = Path(__file__).parent.parent / "docs"
_FOLDER = re.compile(r'"/[A-Za-z0-9_.-]+/')


def test_no_recording_in_docs_names_a_folder() -> None:
    tables = sorted(DOCS.rglob("*.parquet"))
    assert tables
    for path in tables:
        assert not [text for text in _texts(path) if _FOLDER.search(f'"{text}"')], path
    for path in DOCS.rglob("*.json"):
        assert not _FOLDER.search(path.read_text(encoding="utf-8")), path


def _texts(path: Path) -> set[str]:
    table = pq.read_table(path, partitioning=None)
    texts = [column for column in table.columns if pa.types.is_string(column.type)]
    return {value for column in texts for value in column.unique().to_pylist() if value}


def test_names_stay_and_folders_go(tmp_path: Path) -> None:
    config = json.dumps({"base": "/a/b/gpt2", "data": "embedded", "out": "/kept/as/it/is"})
    table = pa.table({"base": ["/a/b/gpt2", "random", None], "config_json": [config, None, "{}"], "x": ["/y/z"] * 3})
    table = table.replace_schema_metadata({"schema_version": "5"})
    path, document = tmp_path / "t.parquet", tmp_path / "d.json"
    pq.write_table(table, path)
    document.write_text(json.dumps({"set": {"data": "/a/c.parquet"}, "list": [{"tokenizer": "/a/t"}]}))
    assert clean_table(path)
    assert clean_json(document)
    again = pq.read_table(path)
    assert again["base"].to_pylist() == ["gpt2", "random", None]
    assert json.loads(again["config_json"][0].as_py()) == {"base": "gpt2", "data": "embedded", "out": "/kept/as/it/is"}
    assert again["x"].to_pylist() == ["/y/z"] * 3
    assert again.schema.equals(table.schema, check_metadata=True)
    assert json.loads(document.read_text()) == {"set": {"data": "c.parquet"}, "list": [{"tokenizer": "t"}]}
    assert not clean_table(path)
    assert not clean_json(document)
