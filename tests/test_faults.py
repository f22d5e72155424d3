"""Killed, out of space, read-only: a command says so in one line or goes on, and no log is lost."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nbformat
import pytest
from conftest import profile_data
from kills import left
from synthetic import write

from ouroboros import cli, reproduce
from ouroboros.errors import InputError
from ouroboros.log import write_atomic
from ouroboros.training.pretraining import pretrain
from ouroboros.training.run import execute
from ouroboros.training.sweep import Worker

SCRIPT = Path(__file__).parent / "helpers" / "kills.py"
RUN = "controller-d2-r4-corrected-s0"


def test_base_and_sweep_killed_at_random_moments_end_the_same(text, tmp_path):
    """`make audit-kill` is the long form. Two workers and one that reads what is there end them at once."""
    data = profile_data(text, siblings={})
    data["plan"] = [{"purpose": "rate", "arms": ["controller"], "depths": [2], "seeds": [9], "rates": [1e-3, 1e-2]},
                    {"arms": ["full", "cut", "controller"], "depths": [1], "seeds": [0]}]
    (tmp_path / "data.json").write_text(json.dumps(data))
    kills = int(os.environ.get("KILLS", 4))
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), str(kills), "1"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900 + 60 * kills)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert sum(found["kills"].values()) >= kills and not found["differ"] and found["files"] > found["runs"]


@pytest.fixture
def disk(tmp_path_factory):
    """A function that puts a copy of a folder on a disk of its own, of so many bytes more than it takes."""
    mounted = []

    def mount(root: Path, free: int) -> Path:
        folder = tmp_path_factory.mktemp("disk")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        shutil.copytree(root, folder, dirs_exist_ok=True)
        fill(folder, free)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, free: int) -> None:
    room = os.statvfs(folder)
    (folder / "filler").write_bytes(b"\0" * max(0, room.f_bavail * room.f_bsize - free))


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def refused(arguments: list[str], folder: Path, capfd) -> None:
    """The command ends in one line that says why."""
    capfd.readouterr()
    assert cli.main(arguments, folder) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("note: ", "Loading", "\r"))]
    assert len([line for line in err if line.startswith("error: ")]) == 1, err
    assert "can't be written (" in err[-1] and "Traceback" not in "".join(err), err


@pytest.fixture
def cli_profile(profile, monkeypatch):
    monkeypatch.setattr(cli, "load_profile", lambda name: profile)
    return profile


@pytest.mark.parametrize("free", [0, 8 << 10, 24 << 10])
def test_a_run_on_a_full_disk_says_so_and_ends_as_ever_once_there_is_room(free, cli_profile, disk, root, capfd):
    folder = disk(root, free)
    before = left(folder)
    refused(["run", RUN], folder, capfd)
    assert left(folder) == before
    (folder / "filler").unlink()
    assert cli.main(["run", RUN], folder) == 0
    execute(cli_profile, RUN, root, progress=False)
    assert left(folder) == left(root)


@pytest.mark.parametrize("free", [0, 16 << 10])
def test_a_base_on_a_full_disk_says_so(free, cli_profile, disk, root, capfd):
    folder = disk(root, free)
    logs = {name: content for name, content in left(folder).items() if name.endswith(".jsonl")}
    refused(["base"], folder, capfd)
    assert {name: content for name, content in left(folder).items() if name.endswith(".jsonl")} == logs
    (folder / "filler").unlink()
    assert cli.main(["base"], folder) == 0 and (cli_profile.base_folder(folder) / "base.jsonl").exists()


def test_a_read_only_folder_is_said_by_run_base_and_worker(cli_profile, disk, root, capfd):
    folder = disk(root, 1 << 20)
    before = left(folder)
    remount(folder, "ro")
    refused(["run", RUN], folder, capfd)
    refused(["base"], folder, capfd)
    said = Worker(cli_profile, folder, "matrix", "local")()
    assert "can't be written (Read-only file system)" in said and "\n" not in said
    assert left(folder) == before
    remount(folder, "rw")


OUTPUTS = [f"results/tiny/{name}" for name in ("claims.md", "tables/arms.csv", "tables/claims.csv")]
REPRODUCE = ["reproduce", "--profile", "tiny"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Logs, and small old outputs; to derive the new ones, of 40 KB, is quick here."""
    write(tmp_path, "tiny", keep=lambda spec: spec.arm in ("full", "cut"), base=False)
    (tmp_path / "README.md").write_text(f"{reproduce.BEGIN}\n{reproduce.END}\n")

    def derive(_, root, out):
        for name in OUTPUTS:
            write_atomic(out / name, "new\n" * 10240)

    for name in OUTPUTS:
        write_atomic(tmp_path / name, "old\n")
    monkeypatch.setattr(reproduce, "derive", derive)
    return tmp_path


def lines(folder: Path) -> list[str]:
    """Whether each output is the old or the new one; half of one it never is."""
    return [{"old\n": "old", "new\n" * 10240: "new"}[(folder / name).read_text()] for name in OUTPUTS]


@pytest.mark.parametrize("free, written", [(0, 0), (60 << 10, 1)])
def test_reproduce_on_a_full_disk_says_so_and_ends_as_ever_once_there_is_room(free, written, checkout, disk, capfd):
    folder = disk(checkout, free)
    before = left(folder)
    refused(REPRODUCE, folder, capfd)
    assert lines(folder) == ["new"] * written + ["old"] * (3 - written)
    assert {name: content for name, content in left(folder).items() if name not in OUTPUTS} == \
        {name: content for name, content in before.items() if name not in OUTPUTS}  # logs intact, nothing beside them
    (folder / "filler").unlink()
    assert cli.main(REPRODUCE, folder) == 0 and lines(folder) == ["new"] * 3
    assert "Is the loop better" in (folder / "README.md").read_text()


def test_reproduce_in_a_read_only_folder_says_so_unless_nothing_has_to_be_written(checkout, disk, capfd):
    folder = disk(checkout, 1 << 20)
    before = left(folder)
    remount(folder, "ro")
    refused(REPRODUCE, folder, capfd)
    assert left(folder) == before
    remount(folder, "rw")
    assert cli.main(REPRODUCE, folder) == 0
    remount(folder, "ro")
    assert cli.main(REPRODUCE, folder) == 0
    remount(folder, "rw")


@pytest.mark.parametrize("said", [BrokenPipeError, BrokenProcessPool])
@pytest.mark.parametrize("command", ["reproduce", "verify"])
def test_a_killed_process_of_the_notebooks_is_said(command, said, checkout, monkeypatch, capfd):
    """Not taken for a reader of the output that has read enough, which ends a command well."""
    def killed(*_):
        raise said

    monkeypatch.undo()
    (checkout / "notebooks").mkdir()
    (checkout / "notebooks" / "02_gap.ipynb").write_text("{}")
    monkeypatch.setattr(ProcessPoolExecutor, "submit", killed)
    assert cli.main([command, "--profile", "tiny"], checkout) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: a process that executes notebooks was killed")
    assert lines(checkout) == ["old"] * 3


def test_no_folder_for_temporary_files_is_said(checkout, monkeypatch, capfd):
    with monkeypatch.context() as full:  # every disk
        full.setattr("tempfile.tempdir", None)
        full.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc/none"])
        refused(REPRODUCE, checkout, capfd)
    assert lines(checkout) == ["old"] * 3


def test_a_base_that_another_process_makes_is_left_to_it(profile, tmp_path):
    from ouroboros.errors import Busy
    from ouroboros.training.status import hold

    with hold("test", "base", tmp_path), pytest.raises(Busy, match="run 'base': process"):
        pretrain(profile, tmp_path)


def test_an_error_of_another_kind_is_no_full_disk(monkeypatch, tmp_path):
    def broken(*_):
        raise FileNotFoundError(2, "No such file or directory", "x")

    monkeypatch.setattr(cli, "_corpus", broken)
    with pytest.raises(FileNotFoundError):
        cli.main(["corpus"], tmp_path)


def test_a_notebook_whose_kernel_is_killed_is_one_line(tmp_path):
    cells = [nbformat.v4.new_code_cell("profile = 'x'", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")]
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=python), tmp_path / "tour.ipynb")
    with pytest.raises(InputError, match="tour.ipynb: its kernel was killed.*run the same command again"):
        reproduce.execute_notebook(tmp_path / "tour.ipynb", tmp_path / "out" / "tour.ipynb", {"profile": "x"}, {},
                                   kernel=True)
