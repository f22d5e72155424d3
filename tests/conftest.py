"""What several test files need: a generated corpus, a very small base, a profile that uses both. No network."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from models import convert, shake, small_base
from synthetic import write_run
from transformers import Qwen2Config, Qwen2ForCausalLM

from ouroboros.experiment.arms import ARMS, PAYS
from ouroboros.experiment.profile import parse_profile
from ouroboros.training.corpus import prepare

torch.set_num_threads(1)
# how long an example takes is the machine's affair
settings.register_profile("unhurried", settings.default, deadline=None, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
SEARCHED = ["controller", "static", "none", "lora", "linear"]
CORE = ("full", "cut", "controller", "static", "none")
PARTS = [name for name, arm in ARMS.items() if arm.loops and name not in CORE]
INSTEAD = [name for name, arm in ARMS.items() if not arm.loops and name not in (*CORE, *PAYS) and arm.ends in (None, 2)]
WORDS = "the gate opens and a layer reads its own state while depth and rank stay small in every step we take".split()


# files whose few tests take longest, first: what is left at the end keeps both workers busy
LONGEST = ("test_reproduce", "test_environment", "test_sweep", "test_resume", "test_processes", "test_figures",
           "test_paper_path", "test_bench", "test_training", "test_trained", "test_status", "test_faults",
           "test_evaluation", "test_own_arm", "test_cost")


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def write_text(folder, documents: int, seed: int) -> None:
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    for number in range(documents):
        text = " ".join(generator.choice(WORDS) for _ in range(120))
        (folder / f"{number}.txt").write_text(f"{number} {seed} {text}")


def plan() -> list[dict]:
    """A search, the core under both protocols, every other arm, other rates; few runs of each."""
    both = {"protocols": ["released", "corrected"], "seeds": [0, 1]}
    return [{"purpose": "rate", "arms": SEARCHED, "depths": [2], "seeds": [9], "rates": [1e-3, 1e-2]},
            {"arms": CORE, "depths": [1, 2], **both},
            {"arms": INSTEAD, "seeds": [0, 1]},
            {"arms": PARTS, "depths": [2], "seeds": [0, 1]},
            {"arms": ["controller_nogate", "controller_nogate_nonorm"], "depths": [2], **both},
            {"arms": ["controller", "static"], "depths": [2], "levels": {"low": 0.5, "high": 2}, "seeds": [0, 1]}]


def sibling(arm) -> str:
    """An arm of SEARCHED like it."""
    if not arm.loops:
        return "linear" if arm.middle == "maps" else "lora"
    return arm.modulation.split("_")[0]


def profile_data(text, layers: int = 6, split=(1, 3, 1), **changes) -> dict:
    """A profile as plain data; it reads folders of text and pretrains a base of a few thousand parameters."""
    return {
        "name": "test",
        "corpus": {"kind": "text", "packages": [str(text / "own")], "foreign": [str(text / "foreign")],
                   "newer": [str(text / "newer")],
                   "dev_share": 0.15, "heldout_share": 0.3},
        "base": {"model": {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
                           "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
                 "pretraining": {"updates": 4, "batch": 2, "block": 32, "rate": 5e-3, "other_rate": 3e-3, "points": 2}},
        "split": dict(zip(("prelude", "recurrent", "coda"), split, strict=True)), "rank": 4, "depth": 2, "max_steps": 8,
        "controller": {"state": 8, "step": 4, "hidden": 8, "output": 4},
        "training": {"updates": 6, "micro_batch": 2, "accumulation": 2, "block": 32},
        "evaluation": {"points": 3, "blocks": 2, "final_blocks": 3, "stream_batches": 4},
        "probes": {"blocks": 2, "depths": [1, 3]},
        "plan": plan(),
        "siblings": {name: sibling(arm) for name, arm in ARMS.items() if arm.trained and name not in SEARCHED},
        "resources": {"teraflops": 0.01}, **changes}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "own", 80, seed=1)
    write_text(folder / "foreign", 20, seed=2)
    write_text(folder / "newer", 20, seed=3)
    return folder


@pytest.fixture
def profile(text):
    return parse_profile(profile_data(text), "test.yaml")


@pytest.fixture(scope="session")
def root_of(tmp_path_factory):
    """A function that gives a profile's `root`, made once: no test changes it."""
    made = {}

    def of(profile) -> Path:
        key = profile.model_dump_json()
        if key not in made:
            folder = tmp_path_factory.mktemp("root")
            corpus = prepare(profile, folder)
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(Qwen2Config(**profile.base.model, eos_token_id=corpus.end_of_text))
            model.save_pretrained(profile.base_folder(folder))
            write_searches(folder, profile)
            made[key] = folder
        return made[key]
    return of


@pytest.fixture
def root(tmp_path, profile, root_of):
    """A results folder with a tokenizer, a random base and searched rates, as if base and search had been made."""
    torch.manual_seed(0)
    return shutil.copytree(root_of(profile), tmp_path, dirs_exist_ok=True)


@pytest.fixture
def base(tmp_path):
    """A folder with a small random base."""
    small_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base):
    """It converted, every trained tensor with a value that matters."""
    return shake(convert(base))


def write_searches(root, profile) -> None:
    """Logs of every search: 1e-2 is each arm's best, 3e-2, the step outward, is worse; the shared rate is 1e-3."""
    for spec in profile.search_runs():
        write_run(root, profile, spec, 1e-2 / spec.rate)
        write_run(root, profile, replace(spec, rate=3e-2), 9.0)
