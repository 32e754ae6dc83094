"""Corpora: what is read, how it is split, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.config import ConfigError, TrialConfig
from pipelines.data import embedded_documents, load_corpus

WORDS = "the quick brown fox jumps over the lazy dog and runs away again. "


def corpus_of(tiny: dict[str, Any], **changes: Any) -> Any:
    return load_corpus(TrialConfig.parse(tiny | changes))


def test_the_embedded_corpus_has_two_balanced_domains_and_is_deterministic(tiny: dict[str, Any]) -> None:
    corpus = corpus_of(tiny)
    assert corpus.domains == ("code", "english")
    characters = {d: sum(len(x.text) for x in embedded_documents() if x.domain == d) for d in corpus.domains}
    assert characters["code"] == pytest.approx(characters["english"], rel=0.01)
    for split in corpus.splits.values():
        assert split.blocks_NS.shape[1] == 64
        assert set(split.domain_N.tolist()) == {0, 1}
    assert corpus_of(tiny).fingerprint == corpus.fingerprint


def test_splits_do_not_share_documents() -> None:
    seen: dict[str, str] = {}
    for document in embedded_documents():
        assert seen.setdefault(document.text, document.split or "") == document.split


def test_bytes_per_token_is_that_of_the_text(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS * 400)
    split = corpus_of(tiny, data=str(tmp_path / "a.txt"), tokenizer="embedded").splits["train"]
    assert 1.0 < split.bytes_per_token < 8.0


def test_parquet_keeps_its_splits_and_domains(tiny: dict[str, Any], tmp_path: Path) -> None:
    rows = [(split, domain, WORDS * 60) for split in ("train", "validation") for domain in ("x", "y")]
    table = pa.table({"split": [r[0] for r in rows], "domain": [r[1] for r in rows], "text": [r[2] for r in rows]})
    pq.write_table(table, tmp_path / "c.parquet")
    corpus = corpus_of(tiny, data=str(tmp_path / "c.parquet"), tokenizer="embedded")
    assert corpus.domains == ("x", "y")
    assert torch.equal(corpus.splits["train"].blocks_NS, corpus.splits["validation"].blocks_NS)
    assert "test" not in corpus.splits


def test_a_glob_names_several_files(tiny: dict[str, Any], tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(WORDS * 300)
    one = corpus_of(tiny, data=str(tmp_path / "a.txt"), tokenizer="embedded").splits["train"].tokens
    both = corpus_of(tiny, data=str(tmp_path / "*.txt"), tokenizer="embedded").splits["train"].tokens
    assert both == pytest.approx(2 * one, rel=0.05)


def test_real_corpus_with_gpt2_tokens(tiny: dict[str, Any], shared_data: Path) -> None:
    corpus = corpus_of(tiny, data=str(shared_data / "corpus.parquet"), tokenizer=str(shared_data / "gpt2-tokenizer"))
    assert corpus.vocab_size == 50257
    assert corpus.domains == ("encyclopedia", "news", "reviews", "speeches", "web")
    assert 4.0e6 < sum(split.tokens for split in corpus.splits.values()) < 4.4e6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "data: expected a text file, a glob, a Parquet file or a hub data set"),
        (lambda p: p.write_text(""), "data: expected text, got an empty file"),
        (lambda p: p.write_text("too short"), "expected at least one block of 64 tokens in the train split"),
        (lambda p: p.write_bytes(b"\xff\xfe\xfd" * 100), "data: expected UTF-8 text"),
    ],
)
def test_text_that_cannot_be_used_is_named(tiny: dict[str, Any], tmp_path: Path, make: Any, said: str) -> None:
    path = tmp_path / "a.txt"
    make(path)
    with pytest.raises(ConfigError) as caught:
        corpus_of(tiny, data=str(path), tokenizer="embedded")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_without_text_is_named(tiny: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match=r"expected a column 'text' .* got body"):
        corpus_of(tiny, data=str(tmp_path / "c.parquet"), tokenizer="embedded")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": [1, 2]}, "expected strings in the column 'text'"),
        ({"text": ["x"], "split": ["holdout"]}, "expected splits train, validation, test"),
    ],
)
def test_parquet_that_cannot_be_used_is_named(
    tiny: dict[str, Any], tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match=said):
        corpus_of(tiny, data=str(tmp_path / "c.parquet"), tokenizer="embedded")


@pytest.mark.parametrize("data", ["nofile.json", "./no", "no*.txt"])
def test_a_missing_file_is_named_before_the_tokenizer(tiny: dict[str, Any], data: str) -> None:
    with pytest.raises(ConfigError, match=r"data: .* where no file is"):
        corpus_of(tiny, data=data)


def test_a_cache_that_cannot_be_written_is_named(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JOULEMOE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="JOULEMOE_CACHE: expected a folder that can be written"):
        corpus_of(tiny)


def test_own_data_needs_a_tokenizer(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    with pytest.raises(ConfigError, match="pass --tokenizer PATH"):
        corpus_of(tiny, data=str(tmp_path / "a.txt"))


def test_the_first_tokens_are_spread_over_the_split(tiny: dict[str, Any]) -> None:
    split = corpus_of(tiny).splits["train"]
    few = split.first(64 * 10)
    assert few.tokens == 640
    assert set(few.domain_N.tolist()) == {0, 1}
    assert split.first(None).tokens == split.tokens
