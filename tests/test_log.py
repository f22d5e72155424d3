"""A raw log is read as it was written, or not at all."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import manifest, write_run

from ouroboros.errors import InputError
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import load_profile
from ouroboros.log import NoLog, WorkingLog, read_manifest, read_run, read_runs, working_rows, write_atomic
from ouroboros.log import write_run as write_rows

ROOT = Path(__file__).resolve().parents[1]
SPEC = RunSpec("static", 4, 4, "corrected", 0)
SMOKE = load_profile("smoke")
ROWS = [{"update": 0, "split": "heldout", "metric": "curve/loss_t+1", "value": 0.1},
        {"update": 1, "split": "train", "metric": "loss", "value": 2.5},
        {"update": 2, "split": "train", "metric": "loss", "value": 1 / 3},
        {"update": 2, "split": "heldout", "metric": "curve/loss_t+1", "value": 1e-17},
        {"update": 2, "split": "heldout", "metric": "block_losses_t+1", "value": [0.1, 1 / 3]}]


@pytest.fixture
def path(tmp_path):
    return write_run(tmp_path, SMOKE, SPEC, 4.0)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "runs" / f"{SPEC.id}.jsonl"
    write_rows(path, manifest(SPEC, SMOKE), ROWS)
    return path


def refused(path, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        read_run(path)
    assert "\n" not in str(error.value) and path.name in str(error.value)


def sealed(path, edit) -> None:
    """The log with its objects changed by `edit` and a seal that fits again: what only validation can refuse."""
    objects = [json.loads(line) for line in path.read_text().splitlines()]
    objects[0].pop("seal")
    edit(objects)
    lines = [json.dumps(each) for each in objects]
    import hashlib

    seal = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    lines[0] = f'{lines[0][:-1]}, "seal": "{seal}"}}'
    path.write_text("".join(f"{line}\n" for line in lines))


def test_what_is_written_is_read_to_the_last_bit(small):
    run = read_run(small)
    assert run.series["train", "loss"] == ([1, 2], [2.5, 1 / 3])
    assert run.series["heldout", "curve/loss_t+1"] == ([0, 2], [0.1, 1e-17])
    assert run.last("heldout", "block_losses_t+1") == [0.1, 1 / 3]
    assert sorted(map(str, run.log.to_dict("records"))) == sorted(map(str, ROWS))
    assert run.manifest["series"] == 3 and read_manifest(small) == run.manifest


def test_a_series_that_is_not_there_is_named(small):
    run = read_run(small)
    assert run.last("train", "moon", 0.5) == 0.5
    with pytest.raises(InputError, match="no series of split 'train', metric 'moon'"):
        run.last("train", "moon")


def test_a_running_run_has_rows_on_disk_and_no_log(tmp_path):
    log = WorkingLog(tmp_path / "unfinished" / "run")
    log.row(1, "train", "loss", 2.5)
    assert working_rows(tmp_path / "unfinished" / "run" / "rows.jsonl") == [
        {"update": 1, "split": "train", "metric": "loss", "value": 2.5}]
    assert read_runs(tmp_path) == {}
    (tmp_path / "unfinished" / "run" / "rows.jsonl").write_text('{"update": 1, "split": "a"}\n{"upd')
    assert len(working_rows(tmp_path / "unfinished" / "run" / "rows.jsonl")) == 1  # the last one is half a row


def test_a_working_log_starts_empty_or_goes_on_from_the_rows_that_are_kept(tmp_path):
    def rows_of(log) -> int:
        assert len(working_rows(log.path)) == log.rows
        return log.rows

    log = WorkingLog(tmp_path)
    for update in (1, 2, 3):
        log.row(update, "train", "loss", 2.5)
    assert rows_of(log) == 3
    again = WorkingLog(tmp_path, fresh=False)
    assert again.keep(2) and rows_of(again) == 2
    again.row(3, "train", "loss", 2.5)
    assert rows_of(again) == 3
    assert not again.keep(4) and rows_of(again) == 0  # it has fewer than the checkpoint says: from the start
    again.row(1, "train", "loss", 2.5)
    assert rows_of(WorkingLog(tmp_path)) == 0
    other = NoLog()  # counts alike
    assert other.keep(2) and other.rows == 2
    other.row(3, "train", "loss", 2.5)
    assert other.rows == 3


def test_a_finished_run_leaves_its_log_alone(tmp_path):
    log = WorkingLog(tmp_path / "unfinished" / SPEC.id)
    log.row(1, "train", "loss", 2.5)
    (tmp_path / "unfinished" / SPEC.id / "checkpoint.safetensors").write_text("state")
    log.finish(tmp_path / "runs" / f"{SPEC.id}.jsonl", manifest(SPEC, SMOKE))
    assert not (tmp_path / "unfinished" / SPEC.id).exists()
    assert list(read_runs(tmp_path)) == [SPEC.id]


def test_a_quantity_measured_twice_at_an_update_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="heldout loss is measured twice at update 1"):
        write_rows(tmp_path / "x.jsonl", manifest(SPEC, SMOKE),
                   [{"update": 1, "split": "heldout", "metric": "loss", "value": value} for value in (1.0, 2.0)])
    assert not (tmp_path / "x.jsonl").exists()


@given(st.data())
def test_any_changed_byte_is_caught(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "runs" / f"{SPEC.id}.jsonl"
    write_rows(path, manifest(SPEC, SMOKE), ROWS)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    path.write_bytes(bytes(content))
    with pytest.raises(InputError) as error:
        read_run(path)
    assert "\n" not in str(error.value)


@given(st.integers(min_value=0))
def test_a_log_cut_anywhere_is_caught(tmp_path_factory, place):
    path = tmp_path_factory.mktemp("log") / "runs" / f"{SPEC.id}.jsonl"
    write_rows(path, manifest(SPEC, SMOKE), ROWS)
    content = path.read_bytes()
    path.write_bytes(content[:place % len(content)])
    with pytest.raises(InputError):
        read_run(path)


@pytest.mark.parametrize("edit", [
    lambda lines: lines[:-1], lambda lines: lines[:1], lambda lines: [lines[0], *lines[2:], lines[1]],
    lambda lines: [*lines, lines[-1]], lambda lines: lines[1:], lambda lines: [],
    lambda lines: [*lines, '{"split":"dev","metric":"loss_t+1","updates":[9],"values":[1.0]}\n'],
])
def test_removed_added_and_swapped_lines_are_caught(path, edit):
    path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))
    refused(path, "restore it from its commit|format|restore")


@pytest.mark.parametrize("changes, said", [
    ({"format": 4}, "field 'format': 4 is unknown; this version reads 5"),
    ({"status": "fine"}, "field 'status': 'fine' is unknown"),
    ({"seed": ...}, "field 'seed' is missing"),
    ({"clean": "yes"}, "field 'clean': 'yes' is of the wrong type"),
    ({"seed": True}, "field 'seed': True is of the wrong type"),
    ({"run": "controller-d1"}, "field 'run': 'controller-d1' isn't the file's name"),
    ({"series": 2}, "3 series, the manifest says 2"),
])
def test_a_sealed_manifest_that_is_wrong_is_refused(small, changes, said):
    def edit(objects):
        objects[0] = {name: value for name, value in (objects[0] | changes).items() if value is not ...}

    sealed(small, edit)
    refused(small, said)


@pytest.mark.parametrize("changes, said", [
    ({"values": ["2.5", 0.3]}, "line 3: field 'values': a finite number"),
    ({"values": [True, 0.3]}, "line 3: field 'values': a finite number"),
    ({"values": [2.5]}, "line 3: field 'values': a finite number, or a list of them, is wanted for each of 2 updates"),
    ({"values": [[2.5, None], 0.3]}, "line 3: field 'values'"),
    ({"values": 2.5}, "line 3: field 'values': 2.5 is of the wrong type"),
    ({"updates": [2, 1]}, "line 3: field 'updates': whole numbers in rising order"),
    ({"updates": [1, 1]}, "line 3: field 'updates'"),
    ({"updates": [1.0, 2.0]}, "line 3: field 'updates'"),
    ({"updates": [-1, 2]}, "line 3: field 'updates'"),
    ({"updates": [], "values": []}, "line 3: field 'updates'"),
    ({"split": 1}, "line 3: field 'split': 1 is of the wrong type"),
    ({"split": "heldout", "metric": "curve/loss_t+1"}, "line 3: a second series of split 'heldout'"),
])
def test_a_sealed_series_that_is_wrong_is_refused(small, changes, said):
    sealed(small, lambda objects: objects[2].update(changes))
    refused(small, said)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_refused(small, number):
    import hashlib

    first, *rest = small.read_text().replace("2.5", number).splitlines(keepends=True)
    first = first[:first.index(', "seal"')]
    seal = hashlib.sha256((first + "}\n" + "".join(rest)).encode()).hexdigest()
    small.write_text(f'{first}, "seal": "{seal}"}}\n' + "".join(rest))
    refused(small, "line 3: ")


def test_other_encodings_are_refused(small):
    text = small.read_text()
    for encoding in ("utf-16", "utf-8-sig"):
        small.write_bytes(text.encode(encoding))
        refused(small, "line 1: not a JSON object")


def test_a_folder_in_a_logs_place_and_a_log_that_is_not_there_are_named(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    refused(tmp_path / "folder.jsonl", "can't be read")
    refused(tmp_path / "none.jsonl", "no such log")


def test_a_renamed_log_is_refused(path):
    path.rename(path.with_name("static-d8-r8-corrected-s0.jsonl"))
    with pytest.raises(InputError, match="isn't the file's name"):
        read_runs(path.parents[1])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]
