"""The program `racecore`: parse the command line, run one command, return its exit code.

0 done, 1 failed, 2 bad usage or input, 130 interrupted. Wrong arguments and files give one message
without a traceback; a traceback means a bug in racecore.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from racecore._version import __version__
from racecore.commands import attend, demo, doctor, scale
from racecore.commands.bad_input import BadInputError
from racecore.errors import BackendUnavailableError

__all__ = ["main"]

_DESCRIPTION = """\
RACE attention over millions of tokens, forward and backward, in linear time (arXiv 2510.04008)."""
_EPILOG = """\
New here?       racecore demo
Does it work?   racecore doctor
Your files:     racecore attend --query q.npy --key k.npy --value v.npy --out o.npy
How fast?       racecore scale --tokens 75_000_000

`racecore COMMAND --help` explains a command.
Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; None means those of this process.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        Raised by argparse, with code 2 for arguments it does not know and 0 after ``--help`` or
        ``--version``.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        with _termination_as_exit():
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _end(args.command, "interrupted", 130)
    except BadInputError as error:
        return _end(args.command, f"error: {error}", 2)
    except MemoryError as error:
        return _end(
            args.command, f"error: not enough memory: {error or 'the system refused more'}", 1
        )
    except BrokenPipeError:
        # `racecore doctor | head`: the reader has closed the pipe. Python would fail again when it
        # flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, BackendUnavailableError) as error:
        return _end(args.command, f"error: {error}", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="racecore",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"racecore {__version__}")
    commands: Any = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in (attend, demo, doctor, scale):
        command.add_parser(commands)
    return parser


def _end(command: str, message: str, code: int) -> int:
    print(f"racecore {command}: {message}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _termination_as_exit() -> Iterator[None]:
    """Let SIGTERM (batch systems, `timeout`) raise an exception as Ctrl-C does, so that files are
    closed and temporary ones removed.
    """

    def leave(number: int, frame: object) -> NoReturn:
        """Raise an exception in the main thread."""
        raise SystemExit(128 + number)

    # Python delivers signals to the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
