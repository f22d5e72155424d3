"""The committed logs of `tiny-first` were converted from an older format: what they were can be had from them again."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from ouroboros.analysis.results import base_run
from ouroboros.log import Run
from ouroboros.provenance import no_old_commits

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def convert():
    """results/tiny-first/convert.py, a script beside the logs."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "results/tiny-first/convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(tiny_first):
    return {**tiny_first.runs, "base": base_run(tiny_first.profile, ROOT)}


@pytest.fixture(scope="module")
def rebuilt(runs, tiny_first, convert):
    """{run: (manifest, log) as they were}; from the checkout, whose history has the locks of old manifests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {name: convert.rebuilt(path(tiny_first, name)) for name in runs}


def path(tiny_first, name: str) -> Path:
    profile = tiny_first.profile
    return profile.base_folder(ROOT) / "base.jsonl" if name == "base" else profile.run_path(name, ROOT)


def sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def test_every_log_keeps_the_hashes_of_what_it_was(runs):
    for name, run in runs.items():
        told = run.manifest["converted"]
        assert set(told) == {"format", "profile", "log_sha256", "manifest_sha256"}, name
        assert told["format"] in (1, 2, 3, 4) and told["profile"] == "tiny"
    for field in ("log_sha256", "manifest_sha256"):  # no two were one file
        assert len({run.manifest["converted"][field] for run in runs.values()}) == len(runs) == 563


def test_every_old_log_is_rebuilt_to_the_byte(runs, rebuilt):
    for name, run in runs.items():
        assert sha256(rebuilt[name][1]) == run.manifest["converted"]["log_sha256"], name


def test_every_old_manifest_is_rebuilt_to_the_byte(runs, rebuilt):
    if why := no_old_commits(ROOT):
        pytest.skip(f"the locks of old commits are wanted: {why}")
    for name, run in runs.items():
        assert sha256(rebuilt[name][0]) == run.manifest["converted"]["manifest_sha256"], name


def test_a_log_of_which_a_value_was_lost_is_not_rebuilt(runs, tiny_first, convert, monkeypatch):
    run = runs["cut-any-s0"]
    key = next(iter(run.series))
    monkeypatch.setattr(convert, "read_run", lambda _: Run(run.manifest, {k: found for k, found in
                                                                                  run.series.items() if k != key}))
    assert sha256(convert.rebuilt(path(tiny_first, "cut-any-s0"))[1]) != run.manifest["converted"]["log_sha256"]
