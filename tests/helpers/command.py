"""The command line on the profile in FOLDER/data.json, for tests that need processes: command.py FOLDER COMMAND ..."""

import json
import sys
from pathlib import Path

from ouroboros import cli
from ouroboros.experiment.profile import parse_profile

root = Path(sys.argv[1])
cli.load_profile = lambda name: parse_profile(json.loads((root / "data.json").read_text()), "test.yaml")
sys.exit(cli.main(sys.argv[2:], root))
