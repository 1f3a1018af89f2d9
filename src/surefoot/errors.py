"""What Surefoot raises when it cannot go on, and the small checks that raise it.

Every message is one sentence that names the argument, the value and the mend. The command line turns any
`SurefootError` into that sentence and exit code 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


class SurefootError(Exception):
    """Base of every error that is the input's fault and not the library's."""


class InvalidInput(SurefootError, ValueError):
    """An argument, file or model that cannot be used as given."""


class Refused(SurefootError):
    """A combination that would give a wrong answer: treatments that exclude each other, a model of the wrong kind."""


class UnsupportedOp(SurefootError, TypeError):
    """A node of the model for which no sound rule is known."""


class MissingExtra(SurefootError, ImportError):
    """An optional library that this call needs; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: pip install 'surefoot[{extra}]'.")


def check(condition: bool, message: str) -> None:
    """Raise `InvalidInput(message)` unless `condition`."""
    if not condition:
        raise InvalidInput(message)


def check_positive(name: str, value: float) -> None:
    check(math.isfinite(value) and value > 0, f"{name} must be positive and finite, got {value!r}.")


def check_non_negative(name: str, value: float) -> None:
    check(math.isfinite(value) and value >= 0, f"{name} must be zero or positive and finite, got {value!r}.")


def check_at_least(name: str, value: int, least: int) -> None:
    check(int(value) == value and value >= least, f"{name} must be an integer of at least {least}, got {value!r}.")


def check_open_unit(name: str, value: float) -> None:
    check(0.0 < value < 1.0, f"{name} must lie strictly between 0 and 1, got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    check(value in choices, f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
