"""Exit codes of the command line, as scripts know them from qemu-img. Numpy-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qcowkit.errors import QcowkitError

SUCCESS = 0
FAILURE = 1

# compare: 0 same, 1 different.
COMPARE_SAME = 0
COMPARE_DIFFERENT = 1
COMPARE_OPEN = 2
COMPARE_STATUS = 3
COMPARE_READ = 4

# check: 0 clean, 1 the check itself failed.
CHECK_CORRUPT = 2
CHECK_LEAKS = 3
CHECK_UNSUPPORTED = 63

# inspect: 0 safe.
INSPECT_UNSAFE = 1
INSPECT_NO_IMAGE = 2

# Bad usage of a verb that qemu-img does not have; its own verbs keep its 1.
USAGE = 2

# A process that a signal ended, as shells count it.
SIGNAL_BASE = 128


class ExitError(Exception):
    """End the command with `code` and one line on standard error."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


@contextmanager
def failing_as(code: int) -> Iterator[None]:
    """Give the errors of the library raised within another exit code than 1."""
    try:
        yield
    except QcowkitError as error:
        raise ExitError(code, str(error)) from error
