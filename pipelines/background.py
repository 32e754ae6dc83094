"""Work that others need not wait for: one thread that does what it is given, in order."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger("joulemoe")
_END_S = 120.0


class Background:
    """Runs calls one after the other beside the caller. An error is logged and does not stop the next call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._queue: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def post(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Have a call made soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._thread.start()
        self._queue.put(lambda: call(*args, **kwargs))

    def close(self, timeout_s: float = _END_S) -> bool:
        """Wait until all is done; False where it is not by then. Safe to call twice."""
        if self._thread is None:
            return True
        self._queue.put(None)
        self._thread.join(timeout_s)
        done = not self._thread.is_alive()
        self._thread = None
        return done

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception:
                log.exception("%s failed", self.name)
