"""The model hub: asked once whether it answers, so that a host without it hears so at once and not after retries."""

from __future__ import annotations

import functools
import logging
import os
import socket
from urllib.parse import urlsplit

_TIMEOUT_S = 5.0
OFFLINE_OPTIONS = (
    "pass --base PATH, --tokenizer PATH and --data PATH (text, glob or Parquet), or --base random and --data embedded"
)


@functools.cache
def prepare_hub() -> bool:
    """Whether the hub answers; where it does not, its libraries look into their cache only."""
    for name in ("huggingface_hub", "httpx", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("", "0", "FALSE", "NO", "OFF"):
        return False
    import huggingface_hub.constants as constants

    endpoint = urlsplit(constants.ENDPOINT)
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    try:
        if not proxied:
            port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
            socket.create_connection((endpoint.hostname or "", port), timeout=_TIMEOUT_S).close()
        return True
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        return False


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 160 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
