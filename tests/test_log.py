"""A raw log is read as it was written, or not at all."""

import json

import pytest
from synthetic import write_run

from ouroboros.errors import InputError
from ouroboros.experiment import RunSpec, load_profile
from ouroboros.log import ROW_FIELDS, RunLog, read_run, read_runs, write_atomic

SPEC = RunSpec("static", 4, 8, "corrected", 0)


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path, load_profile("smoke"), SPEC, 4.0)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))


def test_what_is_written_is_read(tmp_path):
    log = RunLog(tmp_path / "run")
    log.row(1, 1024, "train", "loss", 2.5)
    log.row(1, 1024, "heldout", "block_losses_t+1", [0.1, 1 / 3])
    # rows are on disk before the run ends, and a run that never ends has no manifest
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert read_runs(tmp_path) == {}
    log.finish(json.loads((write_run(tmp_path, load_profile("smoke"), SPEC, 1.0) / "manifest.json").read_text()))
    run = read_run(tmp_path / "run")
    assert list(run.log) == list(ROW_FIELDS)
    assert run.log["value"].tolist() == [2.5, [0.1, 1 / 3]]  # to the last bit
    assert run.manifest["rows"] == 2


def test_a_folder_without_a_manifest_is_an_interrupted_run(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="manifest.json: missing; an interrupted run"):
        read_run(folder)
    assert read_runs(folder.parents[1]) == {}


def test_a_run_made_again_is_unfinished_until_it_ends(folder):
    RunLog(folder)
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("change", [
    lambda text: text[:len(text) // 2],  # truncated, within a row
    lambda text: "".join(text.splitlines(keepends=True)[:-1]),  # truncated, between rows
    lambda text: text.replace("4.0", "3.0", 1),  # edited
    lambda text: text + '{"update": 9, "tokens": 9, "split": "dev", "metric": "loss_t+1", "value": 1.0}\n',
])
def test_a_truncated_or_edited_log_is_refused(folder, change):
    path = folder / "log.jsonl"
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match="log.jsonl: .*restore it from its commit") as error:
        read_run(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, said", [
    ({"format": 5}, "field 'format': 5 is unknown; this version reads 1, 2, 3, 4"),
    ({"status": "fine"}, "field 'status': 'fine' is unknown"),
    ({"seed": ...}, "field 'seed' is missing"),
    ({"clean": "yes"}, "field 'clean': 'yes' is of the wrong type"),
    ({"seed": True}, "field 'seed': True is of the wrong type"),
])
def test_an_edited_manifest_is_refused(folder, changes, said):
    edit_manifest(folder, **changes)
    with pytest.raises(InputError, match="manifest.json: " + said):
        read_run(folder)


def test_a_manifest_that_is_not_json_is_refused(folder):
    (folder / "manifest.json").write_text('{"format": 1,')
    with pytest.raises(InputError, match="manifest.json: not a JSON object"):
        read_run(folder)


@pytest.mark.parametrize("row, said", [
    ({"update": 1, "tokens": 1, "split": "dev", "metric": "loss"}, "line 1: field 'value' is missing"),
    ({"update": 1, "tokens": 1, "split": "dev", "metric": "loss", "value": "2"}, "line 1: field 'value': '2' is of"),
])
def test_a_sealed_row_of_another_format_is_refused(tmp_path, folder, row, said):
    manifest = json.loads((folder / "manifest.json").read_text())
    log = RunLog(tmp_path / "run")
    log._file.write(json.dumps(row) + "\n")
    log.rows = 1
    log.finish(manifest)
    with pytest.raises(InputError, match=said):
        read_run(tmp_path / "run")


def test_a_renamed_folder_is_refused(folder):
    folder.rename(folder.parent / "static-d8-r8-corrected-s0")
    with pytest.raises(InputError, match="isn't the folder's name"):
        read_runs(folder.parents[1])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]
