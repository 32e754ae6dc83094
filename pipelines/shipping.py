"""Lines that are appended to a file here, kept on an object store in parts (`beats` reads them).

It is imported by a process that should be small and start at once, so it takes nothing heavy in before it must.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from typing import Any

#: A part that has so many bytes is full: the next one begins.
PART_BYTES = 1 << 17


@dataclasses.dataclass(frozen=True)
class Place:
    """Where lines are appended.

    Attributes:
        path: a file of this machine.
        out: URI of the object store that they are sent to; None where the file itself is kept.
        key: folder of the parts, below `out`.
    """

    path: str
    out: str | None = None
    key: str = ""


class Shipper:
    """A thread that sends on what was appended, so that a slow store delays nobody. A store that is away gets it later.

    Args:
        place: what to send, and where to.
        retry_s: seconds until it is tried again.
    """

    def __init__(self, place: Place, *, retry_s: float) -> None:
        self.place, self.retry_s = place, retry_s
        self._sent = 0
        self._root: tuple[Any, str] | None = None
        self._new, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to send."""
        self._new.set()

    def end(self, patience_s: float) -> bool:
        """Send what is left; once all of it is there the file goes. Returns whether it is.

        `patience_s`: how long the store may take, or be away.
        """
        self._ended.set()
        self._new.set()
        self._thread.join(patience_s)
        whole = not self._thread.is_alive()
        if whole:
            os.unlink(self.place.path)
        return whole

    def _run(self) -> None:
        while True:
            self._new.wait()
            self._new.clear()
            last = self._ended.is_set()
            with contextlib.suppress(Exception):
                self._send()
                if last:
                    return
                continue
            time.sleep(self.retry_s)
            self._new.set()

    def _send(self) -> None:
        """Put every part that has grown."""
        if self._root is None:
            from pipelines.parquet import filesystem

            assert self.place.out is not None
            self._root = filesystem(self.place.out)
        fs, root = self._root
        part = self._sent // PART_BYTES
        with open(self.place.path, "rb") as file:
            while True:
                file.seek(part * PART_BYTES)
                data = file.read(PART_BYTES)
                end = part * PART_BYTES + len(data)
                if end > self._sent:
                    with fs.open_output_stream(f"{root}/{self.place.key}/{part:05d}.jsonl") as sink:
                        sink.write(data)
                    self._sent = end
                if len(data) < PART_BYTES:  # what is appended meanwhile belongs to this part: the next time
                    return
                part += 1
