"""Committed checkpoints: loaded by their library, scored anew, read by a person; runs without training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import profile_data
from peft import PeftModel
from tokenizers import Tokenizer

from ouroboros import OuroborosForCausalLM
from ouroboros.analysis import cards
from ouroboros.analysis.results import Results
from ouroboros.errors import InputError
from ouroboros.experiment.profile import parse_profile
from ouroboros.log import read_run, read_runs
from ouroboros.training import build, evaluation, probes, rescore, trained
from ouroboros.training.corpus import prepare
from ouroboros.training.run import STREAM_BLOCKS, execute, rerun

ROOT = Path(__file__).resolve().parents[1]
LOOP, GATE, LORA = "controller-d2-r4-corrected-s0", "none_nonorm-d2-corrected-s0", "lora-corrected-s0"


@pytest.fixture(scope="module")
def profile(text):
    return parse_profile(profile_data(text, checkpoints=[LOOP, GATE, LORA], prompts=["the gate\nopens", "a layer"],
                                      keep_prelude=True), "test.yaml")


@pytest.fixture(scope="module")
def made_once(profile, root_of, tmp_path_factory):
    """A `root` with the runs of the checkpoints: no test changes it."""
    folder = shutil.copytree(root_of(profile), tmp_path_factory.mktemp("made"), dirs_exist_ok=True)
    for run_id in profile.checkpoints:
        execute(profile, run_id, folder, progress=False)
    return folder


@pytest.fixture
def made(made_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(made_once, tmp_path / "made")


def test_checkpoints_are_scored_as_logged_and_what_they_write_is_a_page(profile, made, capsys):
    assert rescore.rescore(profile, made) == 0
    said = capsys.readouterr().out
    assert said.count("agrees") == 3 and "DIFFERS" not in said
    page = (made / "results" / "test" / rescore.PAGE).read_text()
    assert page.count("## the gate opens") == 1
    assert all(page.count(f"`{name}`") == 2 for name in ("full", "cut", LOOP, GATE, LORA))


def test_a_checkpoint_that_cannot_be_written_does_not_cost_the_run(profile, root, monkeypatch):
    monkeypatch.setattr("ouroboros.training.run.save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        execute(profile, LORA, root, progress=False)
    assert read_run(profile.run_path(LORA, root)).manifest["status"] == "finished"


def test_a_checkpoint_of_other_weights_is_told(profile, made, capsys):
    file = trained.folder_of(profile, LORA, made) / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, file)
    assert rescore.rescore(profile, made) == 1
    assert f"{LORA}: " in capsys.readouterr().out.partition("DIFFERS")[0].splitlines()[-1]


def test_each_library_loads_its_checkpoint_by_the_name_of_the_base(profile, made, monkeypatch):
    monkeypatch.chdir(made)  # the reference is seen from the checkout
    base, ids = build.load_base(profile, made), torch.arange(20)[None]
    loop = OuroborosForCausalLM.from_pretrained(trained.folder_of(profile, LOOP, made))
    assert torch.equal(loop(ids).logits, trained.load(trained.folder_of(profile, LOOP, made), profile.find(LOOP),
                                                      profile, base)(ids).logits)
    assert str(made) not in (trained.folder_of(profile, LOOP, made) / "config.json").read_text()
    folder = trained.folder_of(profile, LORA, made)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == profile.base_name
    assert profile.base_name == "results/test/checkpoints/base"
    healed = PeftModel.from_pretrained(build.cut_layers(base, profile.split), folder)
    with torch.no_grad():
        untouched = build.cut_layers(build.load_base(profile, made), profile.split)
        changed = healed(ids).logits - untouched(ids).logits
    assert changed.abs().max() > 1e-4  # an adapter whose names don't fit would change nothing


def test_a_card_says_what_was_measured_and_loads_its_checkpoint(profile, made, monkeypatch):
    monkeypatch.chdir(made)
    for file in (made / "results/test/checkpoints" / GATE).glob("*.safetensors"):
        file.unlink()  # no card without weights
    results, ids = Results(profile, read_runs(profile.folder(made))), torch.arange(20)[None]
    found = {path.parent.name: card for path, card in cards.cards(results, made)}
    assert set(found) == {LOOP, LORA}
    for run_id, card in found.items():
        assert len(card.splitlines()) <= 40 and yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
        run, scope = results.runs[run_id], {}
        assert f"Its own held-out loss is {run.last('heldout', 'loss_t+1'):.3f} nats per token;" in card
        assert f"{run.manifest['trainable']:,} parameters" in card and card.count("| not run yet |") == 2  # full, cut
        exec(card.partition("```python\n")[2].partition("```")[0], scope)
        own = trained.load(trained.folder_of(profile, run_id, made), profile.find(run_id), profile,
                           build.load_base(profile, made))
        torch.testing.assert_close(scope["model"](ids).logits, own(ids).logits, rtol=0, atol=1e-6)


def test_a_cards_tokenizer_is_the_one_that_the_base_was_trained_with():
    """AutoTokenizer takes that of the model type, which splits text otherwise."""
    base, text, scope = ROOT / "results/tiny/checkpoints/base", (ROOT / "README.md").read_text(), {}
    exec("\n".join(line for line in cards.LOOP.splitlines() if "Tokenizer" in line).format(base=base), scope)
    found = Tokenizer.from_file(str(base / "tokenizer.json")).encode(text).ids
    assert scope["tokenizer"](text)["input_ids"] == found


def test_a_rerun_writes_the_checkpoint_of_the_same_tensors(profile, made):
    folder = trained.folder_of(profile, LOOP, made)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    assert rerun(profile, LOOP, made) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_that_is_not_there_is_one_line(profile, root):
    with pytest.raises(InputError, match="results/test/checkpoints: no checkpoint there; one is written when"):
        rescore.rescore(profile, root)


def test_those_that_are_there_are_scored(profile, made, capsys):
    for other in (LOOP, LORA):
        shutil.rmtree(trained.folder_of(profile, other, made))
    assert rescore.rescore(profile, made) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [GATE]


COMMITTED = sorted(path.parent for path in ROOT.glob("results/*/checkpoints/*/model.safetensors")
                   if path.parent.name != "base")


assert COMMITTED


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_committed_checkpoint_is_found_by_the_auto_classes_without_an_import(folder):
    config = json.loads((folder / "config.json").read_text())
    for kind, place in config["auto_map"].items():
        file, _, name = place.partition(".")
        assert name in (folder / f"{file}.py").read_text(), kind


@pytest.mark.parametrize("run_id", ["cut-any-s0", "controller_coda_lora-d2-r4-corrected-s0", "linear-corrected-s0"])
def test_what_no_library_loads_is_no_checkpoint(text, run_id):
    with pytest.raises(InputError, match="test.yaml: checkpoints: .*no library loads what this arm trains"):
        parse_profile(profile_data(text, checkpoints=[run_id]), "test.yaml")


def test_an_untrained_loop_is_scored_at_each_depth_and_its_norms_are_where_they_begin(profile, root):
    logs = {arm: read_run(execute(profile, f"{arm}-d2-any-s0", root, progress=False))
            for arm in ("untrained", "untrained_matched", "untrained_nonorm")}
    norms = {arm: log.last("model", "step_norm") for arm, log in logs.items() if arm != "untrained_nonorm"}
    assert norms["untrained"] == [1.0, 1.0] and norms["untrained_matched"] == logs["untrained_matched"].last(
        "model", "stream_rms")
    for log in logs.values():
        assert all(np.isfinite(log.last("heldout", f"loss_t+1/depth_{depth}")) for depth in profile.probes.depths)
        assert log.manifest["trainable"] == 0


def test_the_cut_model_with_other_ends_keeps_those_layers(profile, root):
    log = read_run(execute(profile, "cut_2-any-s0", root, progress=False))
    base = build.load_base(profile, root)
    cut = build.cut_layers(base, profile.split.model_copy(update={"prelude": 2, "coda": 2}))
    blocks = evaluation.final(profile, prepare(profile, root), profile.find("cut_2-any-s0"))["heldout"]
    with torch.no_grad():
        ids = torch.from_numpy(blocks).long()
        loss = cut(ids[:, :-1], labels=ids[:, :-1]).loss.item()
    assert log.last("heldout", "loss_t+1") == pytest.approx(loss, abs=1e-5)


def test_the_stream_is_measured_after_each_layer_and_at_the_first_token_apart(profile, root):
    log = read_run(execute(profile, "refine_base-corrected-s0", root, progress=False))
    base = build.load_base(profile, root)
    blocks = evaluation.final(profile, prepare(profile, root), profile.find("refine_base-corrected-s0"))["heldout"]
    with torch.no_grad():
        states = base.model(torch.from_numpy(blocks[:STREAM_BLOCKS, :-2]).long(),
                            output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    rms = [state.square().mean(-1).sqrt() for state in states]
    assert log.last("model", "layer_rms")[:-1] == pytest.approx([r[:, probes.SINKS:].median().item() for r in rms])
    assert log.last("model", "sink_rms")[:-1] == pytest.approx([r[:, 0].median().item() for r in rms])
    assert len(log.last("model", "layer_rms")) == len(base.model.layers) + 1
