"""The base that is pretrained here."""

import math

import numpy as np
import pytest
import torch
from conftest import profile_data

from ouroboros.errors import InputError
from ouroboros.experiment.profile import load_profile, parse_profile
from ouroboros.log import read_run
from ouroboros.training import pretraining
from ouroboros.training.build import load_base
from ouroboros.training.corpus import prepare


@pytest.fixture
def pretrained(profile, tmp_path):
    return pretraining.pretrain(profile, tmp_path)


def test_pretraining_leaves_a_base_its_recipe_and_a_sealed_log(profile, tmp_path, pretrained):
    run = read_run(pretrained / "base.jsonl")
    log = run.log
    assert {file.name for file in pretrained.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json",
                                                            "base.jsonl"}
    assert list(log[log["metric"] == "loss"]["update"]) == [1, 2, 3, 4]
    assert set(log[log["metric"] == "curve/loss_t+1"]["update"]) == {0, 2, 4}


def test_a_finished_base_is_left_alone_and_a_forced_one_is_the_same_to_the_bit(profile, tmp_path, pretrained):
    log, weights = pretrained / "base.jsonl", pretrained / "model.safetensors"
    before = log.read_bytes(), weights.read_bytes(), read_run(log).series
    pretraining.pretrain(profile, tmp_path)
    assert log.read_bytes() == before[0]
    pretraining.pretrain(profile, tmp_path, force=True)
    assert log.read_bytes() != before[0]  # it was made again
    assert weights.read_bytes() == before[1] and read_run(log).series == before[2]


def test_an_interrupted_base_is_made_again(profile, tmp_path, monkeypatch):
    def stopped(content) -> str:
        raise KeyboardInterrupt

    real = pretraining.content_sha256
    monkeypatch.setattr(pretraining, "content_sha256", stopped)  # asked for once the weights are there
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain(profile, tmp_path)
    assert (profile.base_folder(tmp_path) / "model.safetensors").exists()
    assert not (profile.base_folder(tmp_path) / "base.jsonl").exists()
    monkeypatch.setattr(pretraining, "content_sha256", real)
    assert read_run(pretraining.pretrain(profile, tmp_path) / "base.jsonl").manifest["status"] == "finished"


def test_pretraining_learns(text, tmp_path):
    data = profile_data(text)
    data["base"]["pretraining"] |= {"updates": 60, "rate": 2e-2, "other_rate": 2e-2}
    profile = parse_profile(data, "test.yaml")
    log = read_run(pretraining.pretrain(profile, tmp_path) / "base.jsonl").log
    heldout = log[(log["split"] == "heldout") & (log["metric"] == "curve/loss_t+1")]["value"].astype(float)
    assert heldout.iloc[0] == pytest.approx(math.log(300), abs=0.2) and heldout.iloc[-1] < heldout.iloc[0] - 1


def test_every_parameter_has_one_optimizer_and_only_matrices_of_layers_have_muon(profile, tmp_path, pretrained):
    model = load_base(profile, tmp_path)
    muon, adamw = ([p for group in o.param_groups for p in group["params"]]
                   for o in pretraining._optimizers(model, profile.base.pretraining))
    assert sorted(map(id, muon + adamw)) == sorted(map(id, model.parameters()))
    assert len(muon) == 6 * 7 and all(p.ndim == 2 for p in muon)


def test_the_rate_warms_up_and_ends_at_a_tenth():
    rates = [pretraining._schedule(update, 1000) for update in range(1000)]
    assert rates.index(1.0) == 19 and max(rates) == 1.0 and rates[-1] == pytest.approx(0.1, abs=1e-4)


def test_an_epoch_reads_every_block_once_and_the_next_in_another_order(profile, tmp_path):
    corpus, recipe = prepare(profile, tmp_path), profile.base.pretraining
    lengths = corpus.lengths("train")
    batches = (int(lengths.sum()) + len(lengths) - 2) // recipe.block // recipe.batch
    stream = pretraining._batches(corpus, recipe)
    epochs = [[next(stream) for _ in range(batches)] for _ in range(2)]
    inputs, targets = epochs[0][0]
    assert inputs.shape == targets.shape == (2, 32) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(inputs, epochs[1][0][0])
    joined = torch.cat([inputs for inputs, _ in epochs[0]]).flatten().numpy()
    whole = np.concatenate([np.append(d, corpus.end_of_text) for d in corpus.documents("train", recipe.seed)])
    assert np.array_equal(joined, whole[:len(joined)])


def test_too_little_text_for_one_batch_is_refused(text, tmp_path):
    data = profile_data(text)
    data["base"]["pretraining"]["batch"] = 100_000
    with pytest.raises(InputError, match="split 'train' has .* blocks of 32 tokens"):
        pretraining.pretrain(parse_profile(data, "test.yaml"), tmp_path)


def test_a_profile_with_a_given_base_pretrains_nothing(tmp_path):
    with pytest.raises(InputError, match="profile 'paper': its base is Qwen/Qwen2.5-3B"):
        pretraining.pretrain(load_profile("paper"), tmp_path)
    with pytest.raises(InputError, match="its base is that of profile 'tiny'"):
        pretraining.pretrain(load_profile("tiny-deep"), tmp_path)
