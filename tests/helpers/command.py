"""The command line on the profile in FOLDER/data.json, for tests that need processes: command.py FOLDER COMMAND ...

Several, with a comma between them, are given one after the other; it exits with the largest of their codes.
"""

import itertools
import json
import sys
from pathlib import Path

from ouroboros import cli
from ouroboros.experiment.profile import parse_profile


def given(folder: str, *arguments: str) -> int:
    cli.load_profile = lambda name: parse_profile(json.loads((Path(folder) / "data.json").read_text()), "test.yaml")
    return cli.main(arguments, Path(folder))


if __name__ == "__main__":
    commands = [[*words] for comma, words in itertools.groupby(sys.argv[1:], lambda word: word == ",") if not comma]
    sys.exit(max(given(*words) for words in commands))
