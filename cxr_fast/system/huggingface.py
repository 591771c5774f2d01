"""Load huggingface_hub, ask whether the hub's name resolves, and say in a few words what an error of it means."""

from __future__ import annotations

import os
import socket
from types import ModuleType
from urllib.parse import urlparse

from ..errors import InputError
from .extras import needs


def library(what: str) -> ModuleType:
    """Import huggingface_hub, without its log lines, for `what`. Raises InputError naming the extra it comes with."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import logging  # loaded by name only
    except ImportError:
        raise InputError(f"{what} {needs('huggingface_hub')}") from None
    logging.set_verbosity_error()
    return huggingface_hub


def hub_errors() -> tuple[type[Exception], ...]:
    """Everything huggingface_hub raises for a name, a network, a token or an answer that is not as it should be.

    Errors of the network are `HTTPError` of its HTTP library from version 1.0 on and `OSError` before, a failed
    upload is a `RuntimeError`.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    http = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return (EntryNotFoundError, http, OSError, RuntimeError, ValueError)


def is_network_error(error: BaseException) -> bool:
    """Whether the hub gave no answer, or only that it is out of order (status 500 and above)."""
    status = status_of(error)
    if status is None:
        return not isinstance(error, ValueError)
    return status >= 500


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the answer that an error is about; None where there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def explain(error: BaseException) -> str:
    """Say in a few words, for a line of ours, what an error of huggingface_hub means."""
    names, status = {kind.__name__ for kind in type(error).__mro__}, status_of(error)
    if "LocalEntryNotFoundError" in names:
        return explain(error.__cause__) if error.__cause__ else "the hub does not answer, and it is not in the cache"
    if isinstance(error, ValueError) and status is None:  # of a name, before anything was asked
        return f"the hub allows no such name ({' '.join(str(error).split())[:120]})"
    if "GatedRepoError" in names:
        return "it is gated: ask for access on its page, then set HF_TOKEN"
    if "RepositoryNotFoundError" in names:
        return "no such repository, or it is private and HF_TOKEN does not open it"
    if "RevisionNotFoundError" in names:
        return "it has no such revision"
    if "RemoteEntryNotFoundError" in names:
        return "it has no such file"
    if status == 401:
        return "the hub does not know this token; set HF_TOKEN or run `hf auth login`"
    if status == 403:
        return "the token may not do this; it needs the right to write there"
    if status is not None:
        return f"the hub answers {status}"
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # a failed upload of one file
        return explain(error.__cause__)
    return f"the hub does not answer, {type(error).__name__}"


def hub_resolves() -> bool:
    """Whether the hub's name resolves.

    Without asking this first, huggingface_hub 1.x retries for 24 s before it gives up; its `etag_timeout` (2 s was
    tried) does not shorten that.
    """
    from huggingface_hub.constants import ENDPOINT

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlparse(ENDPOINT).hostname, None)
    except OSError:
        return False
    return True
