"""A committed output with one cell, number, verdict, hash or byte changed is named with its place.

Here a sample, each file's own places in turn; `make audit-verify` derives everything and tries them all.
"""

from pathlib import Path

import drift
import pytest

from ouroboros import reproduce

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = drift.outputs(ROOT)
SAMPLED = 12  # places of each file


def sample(number: int, kind: str, text: str) -> list[tuple[str, str]]:
    """Places that are spread over a file, other ones in each."""
    found = list(drift.changes(kind, text))
    step = max(1, len(found) // SAMPLED)
    return [(place, changed()) for place, changed in found[number % step::step]]


@pytest.mark.parametrize("kind, least", [(".csv", 500), (".md", 500), (".ipynb", 200), (".json", 250)])
def test_a_changed_place_is_named(kind, least):
    tried = 0
    for number, path in enumerate(path for path in OUTPUTS if path.suffix == kind):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert reproduce._difference(kind, text, text) is None
        for place, changed in sample(number, kind, text):
            tried += 1
            said = reproduce._difference(kind, changed, text)
            assert said and said.startswith(place), f"{path}: {place} {said}"
    assert tried >= least


def test_every_changed_verdict_is_named():
    for profile in reproduce.committed(ROOT):
        path = ROOT / "results" / profile / "claims.md"
        text = path.read_text(encoding="utf-8")
        verdicts = [*drift.VERDICTS.finditer(text)]
        assert len(verdicts) > 30
        for match in verdicts:
            line = text.count("\n", 0, match.start()) + 1
            assert reproduce._difference(".md", drift.spoilt(text, match), text).startswith(f"line {line}: ")


def test_every_changed_number_of_the_readmes_verdicts_is_named():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index(reproduce.BEGIN):text.index(reproduce.END) + len(reproduce.END)]
    first, tried = text[:text.index(block)].count("\n"), 0
    for place, change in drift.changes(".md", block):
        changed = change()
        if reproduce.BEGIN in changed and reproduce.END in changed:  # else the marks are what is named
            whole, tried = text.replace(block, changed), tried + 1
            line = first + int(place.split()[1][:-1])
            assert reproduce._same_text(whole, reproduce._readme_with(block, whole)).startswith(f"line {line}: ")
    assert tried > 60


@pytest.mark.parametrize("what", drift.PICTURES)
def test_a_changed_picture_or_hash_of_one_is_named(what, tmp_path):
    pictures = [ROOT / path for path in OUTPUTS if path.suffix == ".json"]
    assert len(pictures) >= 24
    for sidecar in pictures:
        for kind in (".png", ".pdf"):
            assert reproduce._picture_fault(sidecar.with_suffix(kind)) is None
            assert drift.picture_fault(sidecar.with_suffix(kind), tmp_path, drift.PICTURES[what])
