"""The raw-log format: write."""

import hashlib
import json
import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class RunLog:
    """Writes one run's log; `finish` writes the manifest, last."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "manifest.json").unlink(missing_ok=True)
        self.file = open(self.folder / "log.jsonl", "w", encoding="utf-8")
        self.rows = 0

    def row(self, update: int, tokens: int, split: str, metric: str, value) -> None:
        self.file.write(json.dumps({"update": int(update), "tokens": int(tokens), "split": split, "metric": metric,
                                    "value": value}) + "\n")
        self.file.flush()
        self.rows += 1

    def finish(self, manifest: dict) -> None:
        self.file.close()
        digest = hashlib.sha256((self.folder / "log.jsonl").read_bytes()).hexdigest()
        write_atomic(self.folder / "manifest.json",
                     json.dumps({**manifest, "rows": self.rows, "log_sha256": digest}, indent=1) + "\n")


def read_run(folder):
    import types

    import pandas as pd
    folder = Path(folder)
    return types.SimpleNamespace(manifest=json.loads((folder / "manifest.json").read_text()),
                                 log=pd.read_json(folder / "log.jsonl", lines=True))
