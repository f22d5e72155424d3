"""What the user is told when the input is wrong."""


class InputError(ValueError):
    """Bad input. The message is one line: file, field, value, and how to mend it; `cli` prints it and exits with 2."""


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and its state is saved. The message is one line; `cli` exits with AGAIN."""


AGAIN = 75  # exit code: run the same command again (EX_TEMPFAIL of BSD's sysexits.h)
