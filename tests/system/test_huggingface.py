"""What an error of the hub, or of what stands before it, is called; an address without its password."""

from __future__ import annotations

import errno
import os

import pytest

from cxr_fast.system import huggingface

CACHE = "/home/anna/hub"
MENDED = {
    NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), CACHE): f"(Not a directory: {CACHE}); HF_HOME",
    FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), CACHE): f"(File exists: {CACHE}); HF_HOME",
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), CACHE): f"(Permission denied: {CACHE}); HF_HOME",
    OSError(errno.EROFS, os.strerror(errno.EROFS), CACHE): f"(Read-only file system: {CACHE}); HF_HOME",
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)): "is full; HF_HOME",
    OSError("Consistency check failed: file should be of size 9 but has size 5 (x)."): "the download was cut short",
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)): "SSL_CERT_FILE",
    UnicodeEncodeError("ascii", "hf_\xe4", 3, 4, "ordinal not in range(128)"): "HF_TOKEN holds a character",
    ValueError("Unknown scheme for proxy URL URL('foo://127.0.0.1:9')"): "Unknown scheme for proxy URL",
    ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."): "the 'socksio' package",
    ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"): "the hub does not answer, ConnectionRefusedError",
    huggingface.NotTheHubError("x"): "what answers is not the hub",
}


@pytest.mark.parametrize(("error", "said"), MENDED.items(), ids=lambda value: str(value)[:24])
def test_an_error_is_named_by_what_is_wrong(error: Exception, said: str) -> None:
    assert said in (found := huggingface.explain(error))
    assert "\n" not in found


def test_a_long_text_ends_with_a_whole_word() -> None:
    words = [f"word{i}" for i in range(200)]
    found = huggingface.explain(ValueError(" ".join(words)))
    shown = found.partition("(")[2].partition(" ...)")[0].split()
    assert shown == words[: len(shown)]
    assert len(found) < 400


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://huggingface.co", "https://huggingface.co"),
        ("http://anna:PASS@hub.example:80/x", "http://hub.example:80/x"),
        ("http://anna:PA/SS@W@hub.example", "http://hub.example"),
        ("anna:PASS@hub.example", "hub.example"),
    ],
)
def test_an_address_is_shown_without_its_password(address: str, shown: str) -> None:
    assert huggingface.without_login(address) == shown
