"""Writes the hashes of every file that an index has of the locked versions, which pip then insists on.

    lock_hashes.py INDEX        the address of a package index that answers in JSON (PEP 691), as .../simple

requirements.lock -> .requirements.hashes, docs/site/site.lock -> docs/site/site.hashes. torch is left out: its builds
of one version, for a CPU or for CUDA, come from different places, and bring other packages.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
HASHED = {"requirements.lock": ".requirements.hashes", "docs/site/site.lock": "docs/site/site.hashes"}
UNHASHED = ("torch",)
HEAD = "# The hashes of every file of {}'s versions; made by tests/helpers/lock_hashes.py.\n"


def version_of(file: str) -> Version | None:
    """The version of a wheel or source archive; nothing of another file."""
    try:
        return (parse_wheel_filename if file.endswith(".whl") else parse_sdist_filename)(file)[1]
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None


def entry(index: str, pin: str) -> str:
    """A line of a lock with the hashes of its files."""
    name, version = pin.split("==")
    asked = Request(f"{index.rstrip('/')}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urlopen(asked, timeout=60) as answer:
        files = json.load(answer)["files"]
    hashes = sorted(file["hashes"]["sha256"] for file in files if version_of(file["filename"]) == Version(version))
    if not hashes:
        raise SystemExit(f"{pin}: the index has no file of it")
    return " \\\n".join([pin, *(f"    --hash=sha256:{found}" for found in hashes)]) + "\n"


def main(index: str) -> None:
    for lock, hashed in HASHED.items():
        pins = [line for line in (ROOT / lock).read_text().splitlines()
                if "==" in line and line.partition("==")[0] not in UNHASHED]
        with ThreadPoolExecutor(8) as pool:
            entries = pool.map(lambda pin: entry(index, pin), pins)
            (ROOT / hashed).write_text(HEAD.format(lock) + "".join(entries))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
