"""The last word of held-out sentences, scored by lm-eval for the full and the cut model, the loops and LoRA.

    python benchmarks/last_word.py [PROFILE]      needs `pip install .[neighbours]`

Writes results/<profile>/last_word.md, .csv and .json.

The items are made from the profile's held-out text, which isn't redistributed: the same ones wherever the corpus is the
one that the profile pins. Their hash stands in the manifest.
"""

import importlib.metadata
import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from ouroboros.errors import InputError
from ouroboros.experiment.arms import ARMS
from ouroboros.experiment.profile import Profile, load_profile
from ouroboros.log import write_atomic
from ouroboros.provenance import provenance
from ouroboros.training import trained
from ouroboros.training.build import cut_layers, load_base
from ouroboros.training.corpus import content_sha256, prepare

ITEMS = 200
# 9 to 21 words, the last one a plain one
SENTENCE = re.compile(r"[A-Z][a-z]+(?: [A-Za-z][A-Za-z,'-]*){7,19} ([a-z]{4,})\.(?=\s)")
TASK = {"task": "last_word", "dataset_path": "json", "output_type": "loglikelihood", "test_split": "test",
        "doc_to_text": "{{asked}}", "doc_to_target": "{{' ' ~ answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0}}


def items(texts: Iterator[str], count: int) -> list[dict]:
    """The first sentence of each text, in order, that is one of plain words: what comes before its last word, and that
    word; `count` of them, or as many as there are."""
    found = {}
    for text in texts:
        if match := SENTENCE.search(" ".join(text.split()) + " "):
            found.setdefault(match[0], {"asked": match[0][:-len(match[1]) - 2], "answer": match[1]})
        if len(found) == count:
            break
    return list(found.values())


def models(profile: Profile, root: Path) -> Iterator[tuple[str, nn.Module]]:
    """The full and the cut model, and what the committed checkpoints hold."""
    base = load_base(profile, root)
    yield ARMS["full"].label, base
    yield ARMS["cut"].label, cut_layers(base, profile.split)
    for run_id in profile.checkpoints:
        spec, folder = profile.find(run_id), trained.folder_of(profile, run_id, root)
        if folder.is_dir():
            at = f" at depth {spec.depth}" if spec.depth else ""
            yield ARMS[spec.arm].label + at, trained.load(folder, spec, profile, base)


def score(model: nn.Module, tokenizer, file: Path) -> dict:
    """What lm-eval says of a model: the share of last words that are its likeliest continuation, and the mean negative
    log likelihood of a word, with standard errors over the items."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(file)}}}
    lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=4, device="cpu")
    found = simple_evaluate(lm, tasks=[task])
    nats = [-float(sample["filtered_resps"][0][0]) for sample in found["samples"]["last_word"]]
    row = found["results"]["last_word"]
    return {"accuracy": row["acc,none"], "s.e.": row["acc_stderr,none"], "nats a word": np.mean(nats),
            "its s.e.": np.std(nats, ddof=1) / len(nats)**0.5, "n": len(nats)}


def page(table: pd.DataFrame) -> str:
    """The table, with the verdict as a sentence."""
    best = table.iloc[2:].sort_values("accuracy", ascending=False).iloc[0]  # after full and cut
    full, cut = table.iloc[0], table.iloc[1]
    return ("# Who finds the last word of a sentence\n\n"
            f"Of {full['n']} held-out sentences the full model finds the last word of {100 * full['accuracy']:.0f} %, "
            f"the cut model of {100 * cut['accuracy']:.0f} %, and the best of what was trained on it, {best['model']}, "
            f"of {100 * best['accuracy']:.0f} %. One seed of each.\n\n"
            + table.to_markdown(index=False, floatfmt=".3g") + "\n")


def main(names: list[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    try:
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError("package 'lm_eval' isn't installed; pip install '.[neighbours]'")
        profile = load_profile(*names or ["smollm2"])
        torch.set_num_threads(1)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(profile.base_source(root))
        asked = items(map(tokenizer.decode, prepare(profile, root).documents("heldout")), ITEMS)
        file = root / ".cache" / "last_word" / f"{profile.name}.jsonl"
        write_atomic(file, "".join(json.dumps(item) + "\n" for item in asked))
        rows = []
        for name, model in models(profile, root):
            rows.append({"model": name} | score(model, tokenizer, file))
            print(rows[-1], flush=True)
    except InputError as error:
        print("error:", error, file=sys.stderr)
        return 2
    table, out = pd.DataFrame(rows), profile.folder(root)
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch", "peft")}
    manifest = {"task": TASK, "items_sha256": content_sha256(file.read_bytes()), "versions": versions,
                "date": time.strftime("%Y-%m-%d")} | {name: value for name, value in provenance(root).items()
                                                      if name in ("commit", "clean", "hardware")}
    write_atomic(out / "last_word.csv", table.to_csv(index=False, float_format="%.6g"))
    write_atomic(out / "last_word.json", json.dumps(manifest, indent=1) + "\n")
    write_atomic(out / "last_word.md", page(table))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
