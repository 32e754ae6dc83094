"""A real S3 API on loopback, which counts and can refuse what is put."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow.fs as pafs
import pytest
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "joules"
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class QuietHandler(WSGIRequestHandler):
    """No line per request."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing."""


@dataclasses.dataclass
class ObjectStore:
    """Moto's S3 behind a counter that can refuse requests, as a busy store does."""

    app: Any
    port: int = 0
    puts: Counter[str] = dataclasses.field(default_factory=Counter)
    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    multipart: int = 0
    refuse: str | None = None  # refuse the first PUT of every object whose key contains this
    away: bool = False  # refuse every PUT
    on_put: Callable[[], Any] = lambda: None  # called before a PUT is answered

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """A request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.multipart += "upload" in environ["QUERY_STRING"]
        if method == "PUT" and path.count("/") > 1:
            once = self.refuse is not None and self.refuse in path and not self.refused[path]
            if once or self.away:
                self.refused[path] += 1
                start("503 Slow Down", [("Content-Length", "0"), ("Connection", "close")])
                return [b""]
            self.puts[path] += 1
            self.on_put()
        return self.app(environ, start)

    def uri(self, folder: str) -> str:
        """OUT on this store."""
        return f"s3://{BUCKET}/{folder}?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """An S3 server with an empty bucket, and what a client needs in its environment."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    with pytest.MonkeyPatch.context() as patch:
        for key, value in KEYS.items():
            patch.setenv(key, value)
        store = ObjectStore(DomainDispatcherApplication(create_backend_app))
        server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=QuietHandler)
        store.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            pafs.FileSystem.from_uri(store.uri("x") + "&allow_bucket_creation=true")[0].create_dir(BUCKET)
            yield store
        finally:
            server.shutdown()
            thread.join()
