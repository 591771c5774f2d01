"""Load huggingface_hub, ask whether the hub's name resolves, and say in a few words what an error of it means."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from urllib.parse import urlparse

from ..errors import InputError
from .extras import needs

# Seconds that the hub may take to answer a question, and to take a part of an upload; huggingface_hub itself waits
# for ever.
QUESTION_SECONDS, UPLOAD_SECONDS = 10.0, 60.0
NOT_THE_HUB = "what answers is not the hub, perhaps a proxy that wants a login"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What the hub says of a repository at a revision: its visibility and the names of its files."""

    private: bool
    files: tuple[str, ...]


class NotTheHubError(OSError):
    """Something answered, with status 200 but not as the hub does."""


def library(what: str) -> ModuleType:
    """Import huggingface_hub, without its log lines, for `what`.

    Raises InputError naming the extra it comes with, and where HF_ENDPOINT is no address.
    """
    try:
        import huggingface_hub
        from huggingface_hub.constants import ENDPOINT
        from huggingface_hub.utils import logging  # loaded by name only
    except ImportError:
        raise InputError(f"{what} {needs('huggingface_hub')}") from None
    if not _is_web_address(ENDPOINT):  # the address itself may hold a password
        raise InputError(f"{what}: HF_ENDPOINT is no address of a hub; write https://HOST or unset it.")
    logging.set_verbosity_error()
    return huggingface_hub


def _is_web_address(address: str) -> bool:
    try:
        parts = urlparse(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def without_login(address: str) -> str:
    """Return an address without the user and password that may stand before its host."""
    return re.sub(r"^(\w+://)?.*@", r"\1", address)


def read_repository(hub: ModuleType, repo: str, revision: str | None = None) -> Repository:
    """Ask the hub about a repository. Raises what `hub_errors` names."""
    with answers_of_the_hub():
        found = hub.HfApi().model_info(repo, revision=revision, timeout=QUESTION_SECONDS)
        return Repository(private=bool(found.private), files=tuple(each.rfilename for each in found.siblings or ()))


@contextlib.contextmanager
def answers_of_the_hub() -> Iterator[None]:
    """Make NotTheHubError of what huggingface_hub raises on an answer that it cannot read."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotTheHubError(NOT_THE_HUB) from error


def limit_waiting(hub: ModuleType) -> None:
    """End each request of an upload that gets no answer for UPLOAD_SECONDS; before 1.0 there is no such setting."""
    session = hub.utils.get_session()
    if hasattr(session, "timeout"):
        session.timeout = UPLOAD_SECONDS


def hub_errors() -> tuple[type[Exception], ...]:
    """Everything huggingface_hub raises for a name, a network, a token or an answer that is not as it should be.

    Errors of the network are `HTTPError` of its HTTP library from version 1.0 on and `OSError` before, a failed
    upload is a `RuntimeError`, a proxy that needs a further library an `ImportError`.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    http = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return (EntryNotFoundError, http, ImportError, OSError, RuntimeError, ValueError)


def is_network_error(error: BaseException) -> bool:
    """Whether the hub gave no answer, or one that says nothing of what was asked.

    That is a status of 500 and above, 408 (too slow), 429 (too many questions), or a proxy that wants a login.
    """
    status = status_of(error)
    if status is None:
        return not isinstance(error, ValueError)
    return status >= 500 or status in (407, 408, 429)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the answer that an error is about; None where there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def explain(error: BaseException) -> str:
    """Say in a few words, for a line of ours, what an error of huggingface_hub means."""
    names, status = {kind.__name__ for kind in type(error).__mro__}, status_of(error)
    if "LocalEntryNotFoundError" in names:
        return explain(error.__cause__) if error.__cause__ else "the hub does not answer, and it is not in the cache"
    if status is None and (local := _explain_local(error, names)):
        return local
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
    if status == 407:
        return "the proxy wants a login (407)"
    if status is not None:
        return f"the hub answers {status}"
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # a failed upload of one file
        return explain(error.__cause__)
    return f"the hub does not answer, {type(error).__name__}"


def _explain_local(error: BaseException, names: set[str]) -> str:
    """Say what is wrong on this side, or with what stands between; empty for any other error."""
    text = textwrap.shorten(str(error), 240, placeholder=" ...")
    if isinstance(error, (NotTheHubError, json.JSONDecodeError)) or "FileMetadataError" in names:
        return NOT_THE_HUB
    if "HFValidationError" in names:
        return f"the hub allows no such name ({text})"
    if isinstance(error, UnicodeEncodeError):
        return "HF_TOKEN holds a character that no token has"
    if isinstance(error, (ImportError, ValueError)):
        return f"the hub cannot be asked ({text}); see HF_ENDPOINT, HTTPS_PROXY and ALL_PROXY"
    if not isinstance(error, OSError):
        return ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk with the cache of downloads is full; HF_HOME names another folder"
    if error.errno is not None and error.filename is not None:
        return f"the cache of downloads cannot be used ({error.strerror}: {error.filename}); HF_HOME names another"
    if isinstance(error, FileNotFoundError):
        return "a file of certificates does not exist; see SSL_CERT_FILE"
    return "the download was cut short; run again" if str(error).startswith("Consistency check failed") else ""


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
