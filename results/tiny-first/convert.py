"""Converted the raw logs of profile `tiny`, made until 2026-11-25, into one file a run; proves that nothing was lost.

    python results/tiny-first/convert.py OLD NEW

OLD is results/tiny of the last commit with the old files, NEW a results folder. Every old file is rebuilt from its new
one and compared with the old one byte by byte. What a new file doesn't hold as a value follows from what it does hold:
the tokens of a row (updates times tokens an update), the learning rate of an update (the schedule), and the list of
packages (requirements.lock of the run's commit).
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ouroboros.experiment.protocol import schedule
from ouroboros.log import read_run, write_run
from ouroboros.provenance import locked_versions

LAST = ("format", "packages", "locked", "rows", "log_sha256")  # of an old manifest: told otherwise in a new one
ADDED = ("protocol_version", "lock", "converted", "series", "seal")


def points(config: dict) -> set[int]:
    """The updates at which a run of that configuration was scored, as `numpy.linspace(...).round()` gives them."""
    updates, count = config["training"]["updates"], config["evaluation"]["points"]
    return {round(i * updates / (count - 1)) for i in range(count)}


def curve(manifest: dict, row: dict) -> bool:
    """Whether an old row may be a point of a curve: the last update has one, and then one of the result."""
    if manifest["run"] == "base":
        return row["metric"] == "loss_t+1"
    scored = row["split"] == "heldout" and row["update"] in points(manifest["config"])
    watched = row["metric"] == "loss_t+1" or row["metric"].startswith("steps/")
    return manifest.get("rate") is not None and scored and watched


def convert(folder: Path, path: Path) -> None:
    manifest, log = (json.loads((folder / "manifest.json").read_text()), (folder / "log.jsonl").read_text())
    rows, seen = [json.loads(line) for line in log.splitlines()], set()
    for row in rows:
        key = (row["split"], row["metric"], row["update"])
        row["curve"] = curve(manifest, row) and key not in seen
        seen.add(key)
    kept = [{**row, "metric": f"curve/{row['metric']}" if row["curve"] else row["metric"]} for row in rows
            if row["metric"] != "rate"]
    new = {name: value for name, value in manifest.items() if name not in LAST}
    new |= {"profile": "tiny-first", "protocol_version": 1, "lock": lock_sha256(manifest["commit"]), "packages": {},
            **({} if lock(manifest["commit"]) else {"packages": manifest["packages"]}),
            "converted": {"format": manifest["format"], "profile": manifest["profile"],
                          "log_sha256": manifest["log_sha256"],
                          "manifest_sha256": sha256((folder / "manifest.json").read_bytes())}}
    write_run(path, new, kept)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lock_sha256(commit: str) -> str | None:
    return sha256(lock(commit)) if lock(commit) else None


def lock(commit: str) -> bytes:
    """requirements.lock at a commit; empty where this repository doesn't have that commit (the base's)."""
    if commit not in LOCKS:
        LOCKS[commit] = subprocess.run(["git", "show", f"{commit}:requirements.lock"], capture_output=True).stdout
    return LOCKS[commit]


LOCKS: dict[str, bytes] = {}


def rebuilt(path: Path) -> tuple[str, str]:
    """The old manifest and log of a run, from its new file and the repository's history alone."""
    run = read_run(path)
    manifest, told = dict(run.manifest), run.manifest["converted"]
    per_update = manifest["config"]["training"]
    tokens = per_update["micro_batch"] * per_update["accumulation"] * per_update["block"]
    if manifest["run"] == "base":
        tokens = manifest["config"]["base"]["pretraining"]["block"] * manifest["config"]["base"]["pretraining"]["batch"]
    measured: dict[int, list[dict]] = {}
    for curves in (True, False):  # at an update, its training loss first, then the curves, then the result
        for (split, metric), found in run.series.items():
            if metric.startswith("curve/") != curves and (split, metric) != ("train", "loss"):
                continue
            if (split, metric) == ("train", "loss") and not curves:
                continue
            for update, value in zip(*found, strict=True):
                measured.setdefault(update, []).append(
                    {"update": update, "tokens": update * tokens, "split": split,
                     "metric": metric.removeprefix("curve/"), "value": value})
                if metric == "loss" and manifest["run"] != "base":
                    kind = manifest["switches"]["schedule"]
                    rate = manifest["rate"] * schedule(update - 1, per_update["updates"], kind)
                    measured[update].append({"update": update, "tokens": update * tokens, "split": "train",
                                             "metric": "rate", "value": rate})
    for rows in measured.values():
        rows.sort(key=lambda row: row["metric"] not in ("loss", "rate"))
    log = "".join(json.dumps(row) + "\n" for update in sorted(measured) for row in measured[update])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "requirements.lock").write_bytes(lock(manifest["commit"]))
        packages = locked_versions(Path(folder))
    manifest |= {"format": told["format"], "profile": told["profile"],
                 "packages": manifest["packages"] or packages,
                 "locked": manifest["run"] != "base", "rows": log.count("\n"), "log_sha256": sha256(log.encode())}
    names = ["format", *(name for name in manifest if name not in (*LAST, *ADDED)), "rows", "log_sha256"]
    place = names.index("clean") + 1
    names[place:place] = ["packages", "locked"]
    return json.dumps({name: manifest[name] for name in names}, indent=1) + "\n", log


def main(old: Path, new: Path) -> int:
    folders = [path.parent for path in sorted(old.glob("runs/*/manifest.json"))]
    sources = {new / "tiny-first" / "runs" / f"{folder.name}.jsonl": folder for folder in folders}
    if (old / "base" / "manifest.json").exists():
        sources[new / "tiny" / "checkpoints" / "base" / "base.jsonl"] = old / "base"
    values, wrong = 0, 0
    for path, folder in sources.items():
        convert(folder, path)
        for name, text in zip(("manifest.json", "log.jsonl"), rebuilt(path), strict=True):
            before = (folder / name).read_text()
            if text != before:
                wrong += 1
                line = next((i for i, (a, b) in enumerate(zip(text.splitlines(), before.splitlines(), strict=False), 1)
                             if a != b), "the end")
                print(f"{folder / name}: not rebuilt, from line {line}")
        values += (folder / "log.jsonl").read_text().count("\n")
    size = {where: sum(file.stat().st_size for file in files) for where, files in (
        ("old", [file for folder in sources.values() for file in (folder / "log.jsonl", folder / "manifest.json")]),
        ("new", list(sources)))}
    print(f"{len(sources)} runs, {values} rows: {2 * len(sources) - wrong} of {2 * len(sources)} old files rebuilt "
          f"byte by byte; {size['old'] / 1e6:.1f} MB in {2 * len(sources)} files before, {size['new'] / 1e6:.1f} MB in "
          f"{len(sources)} after")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]), Path(sys.argv[2]))))
