"""A corpus for pretraining without a network: a Parquet corpus, and the text of the packages that are installed.

Reads a Parquet file with columns domain, split, text and the .py, .pyi, .rst, .md and .txt files under site-packages
and the standard library, and writes one Parquet file with the same columns; the packages' text is the domain `python`:

    python benchmarks/mixed_corpus.py corpus.parquet --out mixed.parquet --max-bytes 250000000

The order is that of the hash of a file's text, so it does not depend on where packages lie, and a cap on bytes takes an
even sample of them all. A text goes whole into one split, by the same hash; texts that occur twice, or stand in the
corpus already, are taken once. Files that differ by a line (vendored copies) may still stand on both sides: the loss on
this domain is a sign of progress, and no trial of the study is judged by it.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ENDINGS = (".py", ".pyi", ".rst", ".md", ".txt")
DOMAIN = "python"
#: Of 64 texts one is held out for validation and one for testing.
_SHARES = {0: "validation", 1: "test"}
_SMALLEST, _LARGEST = 200, 2_000_000  # bytes: empty __init__ files teach nothing, the largest are tables of data
_SCHEMA = pa.schema([("domain", pa.string()), ("split", pa.string()), ("text", pa.string())])


def package_files(roots: Sequence[Path]) -> Iterator[Path]:
    """Text files under the folders that this Python imports from."""
    for root in roots:
        for path in root.rglob("*"):
            if path.suffix in ENDINGS and path.is_file():
                yield path


def installed() -> list[Path]:
    """Folders of the standard library and of installed packages, none inside another."""
    found = sorted({Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")})
    return [path for path in found if not any(other in path.parents for other in found)]


def digest(text: str) -> bytes:
    """What orders a text and deals it to a split: itself, whatever its file is called."""
    return hashlib.sha256(text.strip().encode()).digest()


def read(path: Path) -> str | None:
    """A file's text; None where it is no UTF-8, too small or too large."""
    try:
        if not _SMALLEST <= path.stat().st_size <= _LARGEST:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def sample(paths: Iterable[Path], known: set[bytes], max_bytes: int) -> list[dict[str, str]]:
    """Rows of at most `max_bytes` bytes of text, each text once and none that is known."""
    texts: dict[bytes, str] = {}
    for path in paths:
        text = read(path)
        if text is not None and (key := digest(text)) not in known:
            texts.setdefault(key, text)
    rows, left = [], max_bytes
    for key in sorted(texts):
        left -= len(texts[key].encode())
        if left < 0:
            break
        rows.append({"domain": DOMAIN, "split": _SHARES.get(key[-1] % 64, "train"), "text": texts[key]})
    return rows


def fingerprint(rows: Iterable[dict[str, str]]) -> str:
    """Hash of all rows in order."""
    whole = hashlib.sha256()
    for row in rows:
        for name in _SCHEMA.names:
            whole.update(row[name].encode() + b"\0")
    return whole.hexdigest()[:16]


def mix(corpus: Path, out: Path, roots: Sequence[Path], max_bytes: int) -> str:
    """Write the mixed corpus; returns what it holds, in words."""
    rows = pq.read_table(corpus, columns=_SCHEMA.names).cast(_SCHEMA).to_pylist()
    more = sample(package_files(roots), {digest(row["text"]) for row in rows}, max_bytes)
    pq.write_table(pa.Table.from_pylist([*rows, *more], schema=_SCHEMA), out, compression="zstd")
    size = sum(len(row["text"].encode()) for row in more)
    held = sum(row["split"] != "train" for row in more)
    return (
        f"{out}: {len(rows)} texts of {corpus.name}, {len(more)} of domain {DOMAIN} ({size / 1e6:.1f} MB, {held} held"
        f" out), fingerprint {fingerprint([*rows, *more])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="Parquet with columns domain, split, text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-bytes", type=int, default=250_000_000, help="of text from packages")
    parser.add_argument("--root", type=Path, action="append", help="folder to read instead of installed packages")
    arguments = parser.parse_args()
    print(mix(arguments.corpus, arguments.out, arguments.root or installed(), arguments.max_bytes))


if __name__ == "__main__":
    main()
