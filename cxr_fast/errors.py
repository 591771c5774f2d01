"""Errors a user can mend: one or two lines, what is wrong and which flag or command mends it."""

from __future__ import annotations


class CxrFastError(Exception):
    """Base of every error the command line shows without a traceback.

    `exit_code` is what the process ends with: 2 for a wrong request or input unless a subclass says otherwise.
    """

    exit_code = 2


class InputError(CxrFastError):
    """The request or the input is wrong."""


class SchemaError(CxrFastError):
    """A file of ours that this version does not know how to read."""


class DivergedError(InputError):
    """Training left the finite numbers: the learning rate is too large for these films."""


class DeviceError(CxrFastError):
    """The device asked for cannot be had; never answered by a silent CPU run."""


class ParityError(CxrFastError):
    """The exported graph and the trained model disagree; nothing was kept."""


class Interrupted(CxrFastError):
    """Stopped by SIGINT or SIGTERM; the message says how to resume."""

    exit_code = 130


class ImageError(CxrFastError):
    """One image file that cannot become pixels.

    `reason` is a short stable code for tables (`missing`, `empty`, `truncated`, `not_an_image`, ...);
    the message is for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.reason, str(self))
