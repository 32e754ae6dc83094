"""What all tests share: an own cache for tokenised text, one thread, and where optional data lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tensors of tests are tiny: on a busy machine a second thread costs ten times what it saves. Read as torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests never read or write the user's cache."""
    before = os.environ.get("JOULEMOE_CACHE")
    os.environ["JOULEMOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["JOULEMOE_CACHE"]
    else:
        os.environ["JOULEMOE_CACHE"] = before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Text and tokenizer beside the checkout, for tests of real data; they skip where it is not."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not (folder / "corpus.parquet").exists():
        pytest.skip("needs ../shared/data/corpus.parquet beside the checkout")
    return folder
