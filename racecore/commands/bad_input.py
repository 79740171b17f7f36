"""The exception that commands raise for wrong arguments and files, and checks of integers."""

from __future__ import annotations

import argparse

__all__ = ["BadInputError", "natural_int", "positive_int"]


class BadInputError(Exception):
    """Wrong arguments or files; the message has what was expected, what was given, the remedy."""


def positive_int(text: str) -> int:
    """Convert an argument; argparse turns the exception into a message and exit code 2."""
    number = natural_int(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected a positive integer, got 0")
    return number


def natural_int(text: str) -> int:
    """Convert an argument that may also be 0; 65_536 and 65,536 are legal."""
    digits = text.replace(",", "").replace("_", "")
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(digits)
