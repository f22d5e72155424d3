"""Documents -> disjoint splits -> token blocks.

Four sources behind one interface, `prepare`:

- `docstrings`: the docstrings of pinned pure-Python packages, read with `ast`, never imported;
- `sources`: their whole .py files, one document each: more text, most of it code;
- `text`: a folder of .txt files (one document each) or .jsonl files (one `{"text": ...}` a line);
- `hub`: a data set such as FineWeb-edu (system.md 7), or any local one that `datasets` reads, as it does `text` too.

The hash of a document's content decides its split, so one text can't stand in two: `train`, `dev` (learning rates are
chosen on it) and `heldout` come from the same sources, `foreign` and `newer` from sources never trained on.
"""

import ast
import hashlib
import importlib.metadata
import itertools
import json
import logging
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, first_line
from ..experiment.profile import Profile
from ..experiment.schema import CorpusConfig
from ..provenance import note

END_OF_TEXT = "<|endoftext|>"
BREAKS, PAUSE = 5, 2.0  # how often in a row a stream may break off; seconds before it goes on, longer each time
LOOK_AHEAD = 2  # a block carries two tokens more than its inputs: the targets of `released` are token t+2
REFERENCE_DOCUMENTS, REFERENCE_TOKENS = 12, 30  # protocol.md `reference`: 12 short texts, here 30 tokens each


def content_sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


# ---------------------------------------------------------------------------------------------------- documents

def _pure_python_files(package: str) -> Iterator[Path]:
    """The .py files of an installed package, refused unless its wheel is the same for every platform and Python."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"corpus: package '{package}' is not installed; install the lock: pip install -r "
                         "requirements.lock") from None
    wheel = distribution.read_text("WHEEL") or ""
    if "Root-Is-Purelib: true" not in wheel or "none-any" not in wheel:
        raise InputError(f"corpus: package '{package}' has compiled or platform-bound files; name a pure-Python one")
    for file in sorted(distribution.files or [], key=str):
        if file.suffix == ".py" and ".." not in file.parts:
            yield Path(distribution.locate_file(file))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # invalid escapes in other people's sources are no news
            warnings.simplefilter("ignore")
            # feature_version: what is newer syntax than 3.11 is skipped on every Python alike
            tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                yield text


def _source(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return


def _without_repeats(texts: Iterable[str], seen: set[bytes], shortest: int) -> Iterator[str]:
    """Drop every paragraph that stood in an earlier document, then documents too short to be worth a context.

    Docstrings repeat themselves from class to class, and code from file to file: without this, held-out text would be
    half known.
    """
    for text in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = hashlib.sha256(" ".join(paragraph.lower().split()).encode()).digest()
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        document = "\n\n".join(kept)
        if len(document) >= shortest:
            yield document


def _read_packages(config: CorpusConfig) -> Iterator[tuple[str, str | None]]:
    seen, read = set(), _docstrings if config.kind == "docstrings" else _source
    for split, packages in config.sources.items():
        for package in packages:
            texts = itertools.chain.from_iterable(map(read, _pure_python_files(package)))
            for text in _without_repeats(texts, seen, config.shortest):
                yield text, split


def _streamed(name: str, *args, **options) -> Iterator[str]:
    """The field `text` of a data set's rows. A stream that breaks off goes on at the row it broke at; rows without a
    text are skipped and counted. `name` is what an error says."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are ours to tell
    try:
        stream = datasets.load_dataset(*args, **options, split="train", streaming=True)
    except Exception as error:  # the library has no common base class for "can't be had"
        raise InputError(f"corpus: {name} can't be loaded ({first_line(error)}); check the name and the "
                         "connection") from None
    row, empty, breaks = 0, 0, 0
    while True:
        try:
            for content in stream:
                row, breaks = row + 1, 0
                if not isinstance(text := content.get("text"), str):
                    if text is not None or "text" not in content:
                        raise InputError(f"corpus: {name}: row {row} has no field 'text' that is a text; mend it or "
                                         "name another")
                    empty += 1
                    continue
                yield text
            break
        except ValueError as error:  # no JSON, no UTF-8, or the InputError above: it would come again
            raise error if isinstance(error, InputError) else InputError(
                f"corpus: {name} can't be read ({first_line(error)}); mend it or name another") from None
        except Exception as error:  # a connection's: no common base class either
            if (breaks := breaks + 1) > BREAKS:
                raise InputError(f"corpus: {name} broke off {breaks} times after row {row} ({first_line(error)}); "
                                 "check the connection, run the same command again") from None
            time.sleep(PAUSE * breaks)
            stream.load_state_dict(stream.state_dict())
    if empty:
        note(f"corpus: {name}: {empty} of {row} rows have no text; skipped")


def _check_file(file: Path, folder: Path) -> None:
    """Raises InputError for what isn't text in UTF-8, and for a link that leads out of the folder."""
    if not file.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"corpus: {file}: a link to {file.resolve()}, outside of the folder; remove it, or name that "
                         "folder too")
    try:
        with open(file, encoding="utf-8") as lines:
            if any("\0" in line for line in lines):
                raise InputError(f"corpus: {file}: holds NUL bytes, so it is no text; remove it")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"corpus: {file}: can't be read as UTF-8 ({error}); convert it, or remove it") from None


def _read_text(config: CorpusConfig) -> Iterator[tuple[str, str | None]]:
    for split, folders in config.sources.items():
        for folder in folders:
            found = {suffix: [str(path) for path in sorted(Path(folder).rglob(f"*{suffix}"))]
                     for suffix in (".txt", ".jsonl")}
            if not any(found.values()):
                raise InputError(f"corpus: folder '{folder}' has no .txt or .jsonl file; name one that has")
            for file in found[".txt"] + found[".jsonl"]:
                _check_file(Path(file), Path(folder))
            parts = [(f"folder {folder}", "text", {"data_files": found[".txt"], "sample_by": "document"})]
            parts += [(file, "json", {"data_files": file}) for file in found[".jsonl"]]
            for name, kind, options in parts:
                if options["data_files"]:
                    yield from ((text, split) for text in _streamed(name, kind, **options))


def _read_hub(config: CorpusConfig) -> Iterator[tuple[str, str | None]]:
    for split, names in config.sources.items():
        for name in names:
            path, _, configuration = name.partition(":")
            texts = _streamed(f"data set '{name}'", path, configuration or None)
            yield from ((text, split) for text in itertools.islice(texts, config.documents))


READERS = {"docstrings": _read_packages, "sources": _read_packages, "text": _read_text, "hub": _read_hub}


def split_of(text: str, split: str | None, config: CorpusConfig) -> str:
    """The split a document belongs to: a function of its content alone, but for sources with a `split` of their
    own."""
    if split:
        return split
    place = int(content_sha256(text)[:8], 16) / 16**8
    if place < config.heldout_share:
        return "heldout"
    return "dev" if place < config.heldout_share + config.dev_share else "train"


def documents(config: CorpusConfig) -> Iterator[tuple[str, str]]:
    """Yield (split, text) over all documents, none twice."""
    seen: set[str] = set()
    for text, split in READERS[config.kind](config):
        key = content_sha256(text)
        if text and key not in seen:
            seen.add(key)
            yield split_of(text, split, config), text


# --------------------------------------------------------------------------------------------------- the corpus

@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus on disk: per split one flat array of token ids and the documents' lengths."""

    folder: Path
    manifest: dict

    @property
    def end_of_text(self) -> int:
        return self.manifest["end_of_text"]

    def lengths(self, split: str) -> np.ndarray:
        """(documents,) int64, tokens of each document."""
        return np.fromfile(self.folder / f"{split}.lengths", dtype=np.int64)

    def documents(self, split: str, seed: int | None = None) -> Iterator[np.ndarray]:
        """Each document's token ids, int32; in stored order, or in the order drawn by `seed`."""
        tokens = np.memmap(self.folder / f"{split}.tokens", dtype=np.int32, mode="r")
        lengths = self.lengths(split)
        ends = np.cumsum(lengths)
        order = range(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
        for i in order:
            yield tokens[ends[i] - lengths[i]:ends[i]]

    def blocks(self, split: str, block: int, count: int, packing: str, seed: int | None = None) -> np.ndarray:
        """Pack documents into `count` blocks, (count, block + 2) int32: `block` inputs and two tokens of look-ahead.

        Inputs of consecutive blocks are disjoint; the blocks are windows on one array, not copies. packing `separated`
        puts an end-of-text token after each document, `joined` nothing (protocol.md `packing`). Raises InputError
        when the split holds too little text.
        """
        needed, have, parts = count * block + LOOK_AHEAD, 0, []
        separator = np.array([self.end_of_text] if packing == "separated" else [], dtype=np.int32)
        for document in self.documents(split, seed):
            parts += [document, separator]
            have += len(document) + len(separator)
            if have >= needed:
                break
        else:
            raise InputError(f"corpus: split '{split}' has {have} tokens, {needed} are asked for; lower the profile's "
                             "counts or add text")
        flat = np.concatenate(parts)[:needed]
        return np.lib.stride_tricks.sliding_window_view(flat, block + LOOK_AHEAD, writeable=True)[::block]

    def packed(self, split: str, tokens: int) -> list[int]:
        """The lengths of the documents of which the first `tokens` tokens of a `separated` split are, in order."""
        lengths = self.lengths(split)
        starts = np.cumsum(lengths + 1) - lengths - 1
        return lengths[starts < tokens].tolist()

    def reference(self) -> np.ndarray:
        """The first 30 tokens of 12 held-out documents (protocol.md `reference`, scaled), (12, 32) int32."""
        width = REFERENCE_TOKENS + LOOK_AHEAD
        long_enough = (d[:width] for d in self.documents("heldout") if len(d) >= width)
        found = list(itertools.islice(long_enough, REFERENCE_DOCUMENTS))
        if len(found) < REFERENCE_DOCUMENTS:
            raise InputError(f"corpus: split 'heldout' has {len(found)} documents of {width} tokens or more, "
                             f"{REFERENCE_DOCUMENTS} are asked for; raise corpus.heldout_share or add text")
        return np.stack(found)


def _train_tokenizer(texts: Iterable[str], vocab_size: int):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokenizer(profile: Profile, root: Path, texts: Iterable[str]):
    """The base's tokenizer; a base pretrained here has one trained on `train`, written once beside it."""
    import tokenizers

    path = profile.tokenizer_path(root)
    if not path.exists():
        if profile.base.pretraining is None:
            raise InputError(f"{path}: no tokenizer.json there; put the base's own beside its weights")
        from ..log import write_atomic

        write_atomic(path, _train_tokenizer(texts, profile.base.model["vocab_size"]).to_str())
    return tokenizers.Tokenizer.from_file(str(path)), path


def prepare(profile: Profile, root: Path) -> Corpus:
    """Build the profile's corpus under `.cache/corpus/`, or open it if it is there; that of the profile whose base it
    has, where it is the same.

    Raises InputError when its content isn't what the profile pins (`corpus.sha256`).
    """
    corpus = _built(profile, root) or _build(profile, Path(root))
    pinned, found = profile.corpus.sha256, corpus.manifest["sha256"]
    if pinned and pinned != found:
        raise InputError(
            f"corpus of profile '{profile.name}': sha256 is {found[:12]}, the profile pins {pinned[:12]}; the packages "
            "read aren't the lock's: install them with pip install -r requirements.lock, then rm -r .cache/corpus")
    return corpus


def _wanted(profile: Profile) -> str:
    return content_sha256(json.dumps(profile.corpus.model_dump(exclude={"sha256"}), sort_keys=True))


def _built(profile: Profile, root: Path) -> Corpus | None:
    """The corpus if it is there, and made of what the profile reads."""
    folder, wanted = Path(root) / ".cache" / "corpus", _wanted(profile)
    for name in (profile.name, profile.base_of):
        file = folder / str(name) / "manifest.json"
        if file.exists():
            manifest = json.loads(file.read_text(encoding="utf-8"))
            tokenizer = profile.tokenizer_path(root)
            if manifest["config_sha256"] == wanted and tokenizer.exists() and \
                    manifest["tokenizer_sha256"] == content_sha256(tokenizer.read_bytes()):
                return Corpus(file.parent, manifest)
    return None


def _build(profile: Profile, root: Path) -> Corpus:
    folder = root / ".cache" / "corpus" / profile.name
    by_split: dict[str, list[str]] = {split: [] for split in ("train", "dev", "heldout", *profile.corpus.unseen)}
    for split, text in documents(profile.corpus):
        by_split[split].append(text)
    digest = hashlib.sha256()
    for split, texts in by_split.items():
        texts.sort(key=content_sha256)  # a fixed order that mixes the sources
        digest.update("".join(f"{split}:{content_sha256(text)}\n" for text in texts).encode())
    tokenizer, path = _tokenizer(profile, root, by_split["train"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made, counts = Path(temporary) / "corpus", {}
        made.mkdir()
        for split, texts in by_split.items():
            counts[split] = _write_split(made, split, texts, tokenizer)
        manifest = {
            "config_sha256": _wanted(profile), "sha256": digest.hexdigest(), "splits": counts,
            "tokenizer_sha256": content_sha256(path.read_bytes()), "end_of_text": tokenizer.token_to_id(END_OF_TEXT),
            "versions": {name: importlib.metadata.version(name) for name in itertools.chain(
                *profile.corpus.sources.values())} if READERS[profile.corpus.kind] is _read_packages else {},
        }
        (made / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if found := _built(profile, root):  # another process was quicker, and may be reading it
            return found
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return Corpus(folder, manifest)


def _write_split(folder: Path, split: str, texts: list[str], tokenizer) -> dict:
    lengths = []
    with open(folder / f"{split}.tokens", "wb") as file:
        for start in range(0, len(texts), 1000):
            for encoding in tokenizer.encode_batch(texts[start:start + 1000], add_special_tokens=False):
                np.array(encoding.ids, dtype=np.int32).tofile(file)
                lengths.append(len(encoding.ids))
    np.array(lengths, dtype=np.int64).tofile(folder / f"{split}.lengths")
    return {"documents": len(texts), "bytes": sum(len(t.encode()) for t in texts), "tokens": sum(lengths)}
