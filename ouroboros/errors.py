"""What the user is told when the input is wrong."""


class InputError(ValueError):
    """Bad input. The message is one line: file, field, value, and how to mend it; `cli` prints it and exits with 2."""
