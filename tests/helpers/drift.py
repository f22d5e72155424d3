"""Every committed output changed in one place after another: does `verify` name file and place?

    drift.py        derives everything once, then tries all changes; `make audit-verify`

test_drift.py tries a sample of them without deriving.
"""

import csv
import io
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ouroboros import reproduce
from ouroboros.analysis.results import load_results

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")  # in names and hashes too
WORD = re.compile(r"[^\W\d]+")
VERDICTS = re.compile(r"\b(holds|fails|undecided|equivalent|within the margin|by construction|not \w+|no runs)\b")


def other(token: str) -> str:
    """The token changed: a number in its fifth digit (or its last, or its first if it is small), a word by a letter."""
    mantissa = re.match(r"[-+\d.]*", token)[0]
    places = [place for place, character in enumerate(mantissa) if character.isdigit()]
    if not places:
        return token + "x"
    first = next((place for place in places if mantissa[place] != "0"), places[-1])
    small = 0 < abs(float(token)) < 1e-4
    place = first if small else ([p for p in places if p >= first][:5] or places)[-1]
    return token[:place] + str((int(token[place]) + 1) % 10) + token[place + 1:]


def spoilt(text: str, match: re.Match | None) -> str:
    a, b = match.span() if match else (len(text), len(text))
    return text[:a] + other(text[a:b]) + text[b:]


def changes(kind: str, text: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """(place as verify names it, what makes the text with that place changed): each cell of a table; of other texts
    each number, and each line's first word and its verdict."""
    if kind == ".csv" and text.strip():
        rows = list(csv.reader(io.StringIO(text)))
        lines = [*map(written, rows)]
        for row, cells in enumerate(rows):
            for column, cell in enumerate(cells):
                changed = spoilt(cell, ([*NUMBER.finditer(cell)] or [None])[-1])
                line = written([*cells[:column], changed, *cells[column + 1:]])
                head = rows[0][column] if row else changed
                yield f"row {row}, column '{head}': ", partial(replaced, lines, row, line, "")
        return
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not reproduce.PICTURE.search(line):
            for match in filter(None, [*NUMBER.finditer(line), WORD.search(line), VERDICTS.search(line)]):
                yield f"line {number + 1}: ", partial(replaced, lines, number, spoilt(line, match), "\n")


def replaced(lines: list[str], number: int, line: str, between: str) -> str:
    """A text's lines, one of them another."""
    return between.join([*lines[:number], line, *lines[number + 1:]])


def written(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def outputs(root: Path) -> list[Path]:
    """Every derived text of every profile with committed logs, and those of several; relative to the root."""
    found = {path for profile in reproduce.committed(root) for path in reproduce._outputs(root, profile)
             if path.suffix not in (".png", ".pdf")}
    return [*sorted(found), Path(reproduce.LOGS), Path(reproduce.SCALES)]


PICTURES = {  # what is done to a picture and its sidecar
    "a picture's byte": lambda picture, sidecar: (picture[:99] + bytes([picture[99] ^ 1]) + picture[100:], sidecar),
    "a picture's hashes": lambda picture, sidecar: (picture, re.sub(
        rb'((?:png|pdf)": ")(.)', lambda found: found[1] + (b"1" if found[2] == b"0" else b"0"), sidecar)),
}


def picture_fault(picture: Path, folder: Path, spoil) -> str | None:
    """What is said of a copy of a picture that was spoilt, or whose sidecar was."""
    folder.mkdir(exist_ok=True)
    contents = spoil(picture.read_bytes(), picture.with_suffix(".json").read_bytes())
    for suffix, content in zip((picture.suffix, ".json"), contents):
        (folder / picture.name).with_suffix(suffix).write_bytes(content)
    return reproduce._picture_fault(folder / picture.name)


def main(root: Path) -> int:
    tried, missed = Counter(), []
    profiles = reproduce.committed(root)
    results = {profile: load_results(profile, root) for profile in profiles}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        for profile in profiles:
            reproduce.derive(results[profile], root, out)
            missed += [f"unchanged, but {path}: {said}" for path, said in reproduce._differences(profile, root, out)]
        shown = reproduce._of_readme(results, root)
        for path, page in reproduce.shared_pages(shown, results, root).items():
            reproduce.write_atomic(out / path, page)
        for path in outputs(root):
            committed, derived = ((folder / path).read_text(encoding="utf-8") for folder in (root, out))
            for place, changed in changes(path.suffix, committed):
                tried[path.suffix] += 1
                if not (reproduce._difference(path.suffix, changed(), derived) or "").startswith(place):
                    missed.append(f"{path}: {place}")
        for path in (path for profile in profiles for path in reproduce._outputs(root, profile)):
            if path.suffix in (".png", ".pdf"):
                for name, spoil in PICTURES.items():
                    tried[name] += 1
                    missed += [] if picture_fault(root / path, out / "copy", spoil) else [f"{path}: {name}"]
    text, block = (root / "README.md").read_text(encoding="utf-8"), reproduce.readme_block(*shown)
    begin, end = text.index(reproduce.BEGIN) + len(reproduce.BEGIN), text.index(reproduce.END)
    for place, changed in changes(".md", text[begin:end]):
        tried["README"] += 1
        whole = text[:begin] + changed() + text[end:]
        if not reproduce._same_text(whole, reproduce._readme_with(block, whole)):
            missed.append(f"README.md: {place}")
    print(f"changes tried: {dict(tried)}, {tried.total()} in all; not named: {len(missed)}", *missed, sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[2]))
