"""What the user is told when something stands in the way."""

import errno
import importlib.util
import os
import re

from safetensors import SafetensorError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class InputError(ValueError):
    """Bad input. The message is one line: file, field, value, and how to mend it; `cli` prints it and exits with 2."""


class Busy(InputError):
    """Another process makes the run that was asked for."""


class Preempted(Exception):
    """The run was asked to stop and its state is saved. The message is one line; `cli` exits with AGAIN.

    `signal` is the signal that asked.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


AGAIN = 75  # exit code: run the same command again (EX_TEMPFAIL of BSD's sysexits.h)


def unwritable(error: OSError | SafetensorError) -> str:
    """One line saying that the system lets nothing be written. Raises the error again if it is of another kind."""
    if "No usable temporary directory" in str(error):  # said by tempfile where every disk is full, as of a missing file
        return "the folder for temporary files: can't be written (full or read-only); free some space, or set TMPDIR"
    number = getattr(error, "errno", None) or int((re.findall(r"\(os error (\d+)\)", str(error)) or [0])[0])
    if number not in UNWRITABLE:
        raise error
    return (f"{getattr(error, 'filename', None) or 'a file of results/ or .cache/'}: can't be written "
            f"({os.strerror(number)}); free some space there, or make the folder writable, then run the same command "
            "again")


def require(package: str, purpose: str) -> None:
    """Raises InputError where a package of the lock isn't installed; `purpose` follows "which"."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"package '{package}', which {purpose}, isn't installed; pip install -r requirements.lock")


def first_line(error: Exception) -> str:
    """An error's message, or its kind where there is none, on one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
