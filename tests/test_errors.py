"""Every error of ours is one line and an exit code on the command line, and survives a process boundary."""

from __future__ import annotations

import pickle

import click
import pytest
from click.testing import CliRunner

from cxr_fast import errors
from cxr_fast.cli.options import Group

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CxrFastError)]


def make(kind: type[errors.CxrFastError]) -> errors.CxrFastError:
    return kind("truncated", "a.png: too short") if issubclass(kind, errors.ImageError) else kind("a.png: too short")


def run(error: BaseException) -> tuple[int, str]:
    @click.group(cls=Group)
    def main() -> None: ...

    @main.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(main, ["fail"])
    return result.exit_code, result.output


def test_only_an_interruption_ends_with_something_else_than_2() -> None:
    assert len(KINDS) >= 7
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    assert codes.pop("Interrupted") == 130
    assert set(codes.values()) == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_shows_the_message_and_no_traceback(kind: type[errors.CxrFastError]) -> None:
    assert run(make(kind)) == (kind.exit_code, "error: a.png: too short\n")


def test_an_error_that_is_not_ours_is_not_hidden() -> None:
    code, output = run(ZeroDivisionError("a bug"))
    assert (code, output) == (1, "")


def test_ctrl_c_ends_with_130() -> None:
    code, output = run(KeyboardInterrupt())
    assert code == 130
    assert output.startswith("interrupted; ")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_a_process_boundary_whole(kind: type[errors.CxrFastError]) -> None:
    error = pickle.loads(pickle.dumps(make(kind)))
    assert type(error) is kind
    assert str(error) == "a.png: too short"
    if isinstance(error, errors.ImageError):
        assert error.reason == "truncated"
