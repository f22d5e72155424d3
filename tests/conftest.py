"""What several test files need: a generated corpus, a very small base, a profile that uses both. No network."""

import json
import random

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ouroboros.corpus import prepare
from ouroboros.experiment import ARMS, CORE, parse_profile

torch.set_num_threads(1)
PARTS = [name for name, arm in ARMS.items() if arm.loops and name not in CORE]
INSTEAD = [name for name, arm in ARMS.items() if not arm.loops and name not in CORE]
WORDS = "the gate opens and a layer reads its own state while depth and rank stay small in every step we take".split()


def write_text(folder, documents: int, seed: int) -> None:
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    for number in range(documents):
        text = " ".join(generator.choice(WORDS) for _ in range(120))
        (folder / f"{number}.txt").write_text(f"{number} {seed} {text}")


def profile_data(text, layers: int = 6, split=(1, 3, 1), **changes) -> dict:
    """A profile as plain data; it reads folders of text and pretrains a base of a few thousand parameters."""
    return {
        "name": "test",
        "corpus": {"kind": "text", "packages": [str(text / "own")], "foreign": [str(text / "foreign")],
                   "dev_share": 0.15, "heldout_share": 0.3},
        "base": {"model": {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
                           "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
                 "pretraining": {"updates": 4, "batch": 2, "block": 32, "rate": 5e-3, "other_rate": 3e-3, "points": 2}},
        "split": dict(zip(("prelude", "recurrent", "coda"), split, strict=True)), "rank": 4, "depth": 2, "max_steps": 8,
        "controller": {"state": 8, "step": 4, "hidden": 8, "output": 4},
        "training": {"updates": 6, "micro_batch": 2, "accumulation": 2, "block": 32},
        "evaluation": {"points": 3, "blocks": 2, "final_blocks": 3, "stream_batches": 4},
        "probes": {"blocks": 2, "depths": [1, 3]},
        "search": {"grid": [1e-3, 1e-2], "depth": 2, "seed": 9},
        "matrix": {"seeds": [0, 1], "depths": [1, 2], "parts": dict.fromkeys(PARTS, [2]),
                   "rates": {"low": 0.5, "high": 2}, "instead": INSTEAD},
        "resources": {"teraflops": 0.01}, **changes}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "own", 80, seed=1)
    write_text(folder / "foreign", 20, seed=2)
    return folder


@pytest.fixture
def profile(text):
    return parse_profile(profile_data(text), "test.yaml")


@pytest.fixture
def root(tmp_path, profile):
    """A results folder with a tokenizer, a random base and chosen rates, as if base and search had been made."""
    corpus = prepare(profile, tmp_path)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**profile.base.model, eos_token_id=corpus.end_of_text))
    model.save_pretrained(profile.base_folder(tmp_path))
    trained = [name for name, arm in ARMS.items() if arm.trained]
    rates = {"own": dict.fromkeys(trained, 1e-2), "shared": 1e-3, "search": []}
    (profile.folder(tmp_path) / "rates.json").write_text(json.dumps(rates))
    return tmp_path
