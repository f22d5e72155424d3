"""The prelude's states from disk: the same runs to the last bit, and nothing computed twice."""

import pytest
from conftest import profile_data

from ouroboros.experiment.profile import parse_profile
from ouroboros.log import read_run
from ouroboros.training import build, prelude_states
from ouroboros.training.run import execute


@pytest.fixture
def kept(text):
    return parse_profile(profile_data(text, keep_prelude=True), "test.yaml")


def files(root) -> dict:
    return {path: path.stat().st_mtime_ns for path in (root / ".cache/prelude").rglob("*.npy")}


@pytest.mark.parametrize("run_id", ["controller-d2-r4-corrected-s0", "affine-corrected-s0"])
def test_a_run_is_the_same_to_the_last_bit(run_id, profile, kept, root):
    plain = read_run(execute(profile, run_id, root, root / "plain" / f"{run_id}.jsonl", progress=False))
    for place in ("computed", "read"):  # the first writes the states, the second reads them
        found = read_run(execute(kept, run_id, root, root / place / f"{run_id}.jsonl", progress=False))
        assert found.series == plain.series and found.manifest["hashes"] == plain.manifest["hashes"]
        assert found.manifest["config"] == plain.manifest["config"]
    assert files(root)


def test_another_arm_of_the_same_seed_computes_no_training_block_again(kept, root, monkeypatch):
    execute(kept, "none-d2-corrected-s0", root, root / "one" / "none-d2-corrected-s0.jsonl", progress=False)
    before, computed = files(root), []
    monkeypatch.setattr(prelude_states, "write_atomic", lambda path, content: computed.append(path))
    execute(kept, "static-d2-r4-corrected-s0", root, root / "one" / "static-d2-r4-corrected-s0.jsonl", progress=False)
    assert not computed and files(root) == before


def test_a_prelude_that_is_trained_is_never_taken_from_disk(kept, root):
    model = build.build(kept.find("lora-corrected-s0"), kept, build.load_base(kept, root))
    with prelude_states.kept(model, kept, root, "0" * 64):
        assert not any(isinstance(module, prelude_states.KeptPrelude) for module in model.modules())
    execute(kept, "lora-corrected-s0", root, progress=False)
    assert not files(root)
