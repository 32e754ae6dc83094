"""Token blocks to train and evaluate on: a hub data set, text files, Parquet, or the embedded default.

Shape legend: N blocks, S tokens per block (seq_len).
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.config import ConfigError, TrialConfig
from pipelines.hub import OFFLINE_OPTIONS, first_line, prepare_hub

EMBEDDED = "embedded"
SPLITS = ("train", "validation", "test")
EMBEDDED_VOCAB = 512
_CACHE_VERSION = "1"
_HUB_ROWS = 1000  # rows of a hub data set that make one document: they are lines of running text
_MANY = 20  # documents from which on whole documents are dealt to the splits
_TEXT_ENDINGS = (".txt", ".parquet", ".md", ".json", ".jsonl", ".csv", ".tsv", ".gz", ".log")
END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text with the split and domain it belongs to; `split` None leaves the choice to us."""

    text: str
    split: str | None
    domain: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Blocks of one split.

    Attributes:
        blocks_NS: token ids, int32.
        domain_N: index into `Corpus.domains` of each block.
        bytes_per_token: UTF-8 bytes of text per token, for bits per byte.
    """

    blocks_NS: torch.Tensor
    domain_N: torch.Tensor
    bytes_per_token: float

    @property
    def tokens(self) -> int:
        """Tokens in all blocks."""
        return self.blocks_NS.numel()

    def first(self, max_tokens: int | None) -> TokenSplit:
        """At most `max_tokens` tokens, spread evenly over the split so that every domain stays."""
        rows, seq_len = self.blocks_NS.shape
        keep = rows if max_tokens is None else max(1, min(rows, max_tokens // seq_len))
        index = torch.linspace(0, rows - 1, keep).round().long()
        return dataclasses.replace(self, blocks_NS=self.blocks_NS[index], domain_N=self.domain_N[index])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenised splits, and a fingerprint over every token id in them."""

    splits: Mapping[str, TokenSplit]
    domains: tuple[str, ...]
    vocab_size: int
    fingerprint: str
    end_id: int | None


def load_corpus(config: TrialConfig) -> Corpus:
    """The corpus of a trial, tokenised once and cached.

    Raises:
        ConfigError: the data or the tokenizer cannot be had, or the text is shorter than one block.
    """
    if config.data != EMBEDDED:
        _files(config.data)  # a missing file is named before anything else
    tokenizer_key = config.tokenizer or (EMBEDDED if config.data == EMBEDDED else config.base)
    if tokenizer_key == "random":
        raise ConfigError(
            "tokenizer: expected a hub name or a folder for data of one's own, got nothing; pass --tokenizer PATH"
            " (or --tokenizer embedded)"
        )
    tokenizer = _embedded_tokenizer() if tokenizer_key == EMBEDDED else _load_tokenizer(tokenizer_key)
    key = _digest(_CACHE_VERSION, source_key(config.data), tokenizer.to_str(), str(config.seq_len))
    path = cache_dir() / f"corpus-{key}.npz"
    if not path.exists():
        _write_atomically(path, _tokenise(_documents(config.data), tokenizer, config.seq_len))
    return _read(path, tokenizer, config)


def cache_dir() -> Path:
    """Where tokenised corpora are kept: JOULEMOE_CACHE, else the user's cache folder."""
    root = os.environ.get("JOULEMOE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "joulemoe"
    )
    return Path(root)


def _read(path: Path, tokenizer: Tokenizer, config: TrialConfig) -> Corpus:
    with np.load(path) as arrays:
        meta = json.loads(str(arrays["meta"]))
        splits = {
            split: TokenSplit(
                blocks_NS=torch.from_numpy(arrays[f"{split}_blocks"]),
                domain_N=torch.from_numpy(arrays[f"{split}_domain"]),
                bytes_per_token=meta["bytes_per_token"][split],
            )
            for split in SPLITS
            if f"{split}_blocks" in arrays
        }
    for split in ("train", "validation"):
        if split not in splits or not len(splits[split].blocks_NS):
            raise ConfigError(
                f"data: expected at least one block of {config.seq_len} tokens in the {split} split of {config.data},"
                " got less; use more text or a smaller seq_len"
            )
    return Corpus(
        splits=splits,
        domains=tuple(meta["domains"]),
        vocab_size=tokenizer.get_vocab_size(),
        fingerprint=meta["fingerprint"],
        end_id=tokenizer.token_to_id(END_OF_TEXT),
    )


# --- documents -------------------------------------------------------------------------------------


def source_key(data: str) -> str:
    """What tells whether the text behind `data` changed."""
    if data == EMBEDDED:
        import sys

        return f"{EMBEDDED} {sys.version}"
    files = _files(data)
    return "\n".join(f"{f} {os.path.getsize(f)} {os.stat(f).st_mtime_ns}" for f in files) if files else f"hub {data}"


def _files(data: str) -> list[str]:
    """The files that `data` names; none where it is the name of a hub data set."""
    matches = [data] if os.path.isfile(data) else glob.glob(data, recursive=True)
    found = sorted(f for f in matches if os.path.isfile(f))
    looks_like_a_path = data.startswith((".", "/", "~")) or data.lower().endswith(_TEXT_ENDINGS)
    if not found and (looks_like_a_path or any(sign in data for sign in "*?[") or os.path.isdir(data)):
        raise ConfigError(
            f"data: expected a text file, a glob, a Parquet file or a hub data set, got {data!r}, where no file is"
        )
    if found and not any(map(os.path.getsize, found)):
        raise ConfigError(f"data: expected text, got an empty file: {data}")
    return found


def _documents(data: str) -> list[Document]:
    if data == EMBEDDED:
        return embedded_documents()
    files = _files(data)
    if not files:
        return _hub_documents(data)
    documents: list[Document] = []
    for file in files:
        documents += _parquet_documents(file) if file.endswith(".parquet") else [_text_document(file)]
    if not any(d.text.strip() for d in documents):
        raise ConfigError(f"data: expected text, got an empty file: {data}")
    return documents


def _text_document(file: str) -> Document:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data: expected UTF-8 text in {file}, got {error}") from None
    return Document(text=text, split=None, domain="text")


def _parquet_documents(file: str) -> list[Document]:
    try:
        schema = pq.read_schema(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data: expected a Parquet file, got {file}: {' '.join(str(error).split())}") from None
    if "text" not in schema.names:
        raise ConfigError(f"data: expected a column 'text' in {file}, got {', '.join(schema.names)}")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
        raise ConfigError(f"data: expected strings in the column 'text' of {file}, got {kind}")
    columns = [name for name in ("text", "split", "domain") if name in schema.names]
    rows = pq.read_table(file, columns=columns).to_pylist()
    strange = sorted({str(r["split"]) for r in rows if r.get("split") and _split_name(r["split"]) not in SPLITS})
    if strange:
        raise ConfigError(f"data: expected splits {', '.join(SPLITS)} in {file}, got {strange[0]!r}")
    return [
        Document(text=row["text"] or "", split=_split_name(row.get("split")), domain=row.get("domain") or "text")
        for row in rows
    ]


def _split_name(name: str | None) -> str | None:
    alias = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
    return None if name is None else alias.get(name, name)


def _hub_documents(data: str) -> list[Document]:
    prepare_hub()
    import datasets

    name, _, subset = data.partition(":")
    try:
        loaded = datasets.load_dataset(name, subset or None)
    except Exception as error:
        raise ConfigError(
            f"data: the hub data set {data!r} cannot be had ({first_line(error)}); {OFFLINE_OPTIONS}"
        ) from None
    documents = []
    for split, rows in loaded.items():
        if "text" not in rows.column_names:
            raise ConfigError(f"data: expected a column 'text' in {data}, got {', '.join(rows.column_names)}")
        texts = rows["text"]
        documents += [
            Document(text="".join(texts[i : i + _HUB_ROWS]), split=_split_name(split), domain=name)
            for i in range(0, len(texts), _HUB_ROWS)
        ]
    return documents


def embedded_documents() -> list[Document]:
    """English and code that every Python carries: its documentation topics and its standard library.

    The same number of characters of each: every source file gives its head. Deterministic for a Python version.
    """
    import sysconfig
    from pydoc_data import topics

    english = [topics.topics[name] for name in sorted(topics.topics)]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    share = sum(map(len, english)) / max(1, sum(map(len, sources)))
    code = [source[: round(len(source) * share)] for source in sources]
    return [
        Document(text=text, split=_split_of(text), domain=domain)
        for domain, texts in (("english", english), ("code", code))
        for text in texts
    ]


def _split_of(text: str) -> str:
    """A split by the text's own hash: a document stays where it is when others come or go."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


# --- tokens ----------------------------------------------------------------------------------------


def _embedded_tokenizer() -> Tokenizer:
    """A byte-level BPE over the embedded text, trained once and cached."""
    documents = embedded_documents()
    key = _digest(_CACHE_VERSION, str(EMBEDDED_VOCAB), *(d.text for d in documents))
    path = cache_dir() / f"bpe-{key}.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=EMBEDDED_VOCAB,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator((d.text for d in documents if d.split == "train"), trainer)
        _replace(path, tokenizer.to_str().encode())
    return Tokenizer.from_file(str(path))


def _load_tokenizer(name: str) -> Tokenizer:
    if not os.path.isdir(name):
        if name.startswith((".", "/", "~")):
            raise ConfigError(f"tokenizer: expected a folder, got {name!r}, which does not exist")
        prepare_hub()
    import transformers

    plain = os.path.isdir(name) and os.path.exists(os.path.join(name, "vocab.json"))
    try:
        if plain and not os.path.exists(os.path.join(name, "config.json")):
            return transformers.GPT2TokenizerFast.from_pretrained(name).backend_tokenizer
        return transformers.AutoTokenizer.from_pretrained(name, use_fast=True).backend_tokenizer
    except Exception as error:
        raise ConfigError(f"tokenizer: {name!r} cannot be had ({first_line(error)}); {OFFLINE_OPTIONS}") from None


def _tokenise(documents: Sequence[Document], tokenizer: Tokenizer, seq_len: int) -> dict[str, npt.NDArray[Any]]:
    documents = _dealt(documents)
    domains = sorted({d.domain for d in documents})
    arrays: dict[str, npt.NDArray[Any]] = {}
    bytes_per_token: dict[str, float] = {}
    streams = _streams(documents, tokenizer)
    for split in SPLITS:
        blocks, labels = [], []
        n_tokens = n_bytes = 0
        for index, domain in enumerate(domains):
            ids, text_bytes = streams.get((split, domain), (np.empty(0, np.int32), 0))
            block = ids[: len(ids) // seq_len * seq_len].reshape(-1, seq_len)
            blocks.append(block)
            labels.append(np.full(len(block), index, np.int64))
            n_tokens, n_bytes = n_tokens + len(ids), n_bytes + text_bytes
        if n_tokens:
            arrays[f"{split}_blocks"] = np.concatenate(blocks).astype(np.int32)
            arrays[f"{split}_domain"] = np.concatenate(labels)
            bytes_per_token[split] = n_bytes / n_tokens
    fingerprint = _digest(*(arrays[k].tobytes() for k in sorted(arrays)))
    meta = {"domains": domains, "bytes_per_token": bytes_per_token, "fingerprint": fingerprint}
    arrays["meta"] = np.array(json.dumps(meta))
    return arrays


def _dealt(documents: Sequence[Document]) -> Sequence[Document]:
    """Where many documents have no split, each goes whole into one, so that no text straddles two."""
    if sum(d.split is None for d in documents) < _MANY:
        return documents
    return [d if d.split is not None else dataclasses.replace(d, split=_split_of(d.text)) for d in documents]


def _streams(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> dict[tuple[str, str], tuple[npt.NDArray[np.int32], int]]:
    """Token stream and text bytes of each (split, domain), documents joined by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces: dict[tuple[str, str], list[npt.NDArray[np.int32]]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for document, ids in zip(documents, _encode(documents, tokenizer), strict=True):
        stream = np.asarray([*ids, end] if end is not None else ids, np.int32)
        for split, part, size in _cut(document, stream):
            key = (split, document.domain)
            pieces.setdefault(key, []).append(part)
            sizes[key] = sizes.get(key, 0) + size
    return {key: (np.concatenate(parts), sizes[key]) for key, parts in pieces.items()}


def _cut(document: Document, stream: npt.NDArray[np.int32]) -> Iterable[tuple[str, npt.NDArray[np.int32], int]]:
    """A document goes whole into its split; one without a split is cut 90 : 5 : 5 in reading order."""
    size = len(document.text.encode())
    if document.split is not None:
        return [(document.split, stream, size)]
    edges = [0, int(len(stream) * 0.9), int(len(stream) * 0.95), len(stream)]
    parts = [stream[a:b] for a, b in itertools.pairwise(edges)]
    return [
        (split, part, round(size * len(part) / max(1, len(stream)))) for split, part in zip(SPLITS, parts, strict=True)
    ]


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[int]]:
    encodings = tokenizer.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


# --- small tools -----------------------------------------------------------------------------------


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _write_atomically(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    with tempfile.TemporaryFile() as buffer:
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        buffer.seek(0)
        _replace(path, buffer.read())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"JOULEMOE_CACHE: expected a folder that can be written, got {path.parent}: {reason}"
        ) from None
