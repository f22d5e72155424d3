"""The base that is pretrained here, and the trigram model it must beat."""

import math

import numpy as np
import pytest
import torch
from conftest import profile_data
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.errors import InputError
from ouroboros.experiment.profile import load_profile, parse_profile
from ouroboros.log import read_run
from ouroboros.training import pretraining
from ouroboros.training.build import cut_layers, load_base
from ouroboros.training.corpus import prepare
from ouroboros.training.ngram import Trigram

TOKENS = st.lists(st.integers(1, 6), max_size=12).map(np.array)


@given(st.lists(TOKENS, max_size=4), st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_trigram_probabilities_sum_to_one_in_every_context(documents, context):
    model = Trigram(documents, vocab_size=8, start=0)
    for seen in (context, context[1:], ()):
        probabilities = [model.probability(seen, token) for token in range(8)]
        assert min(probabilities) > 0 and sum(probabilities) == pytest.approx(1)


def test_trigram_is_kneser_ney():
    # after 1, 2: twice 3, once 4 -> (2 - .75) / 3 + .75 * 2 / 3 * lower
    model = Trigram([np.array([1, 2, 3]), np.array([1, 2, 3, 5]), np.array([1, 2, 4])], vocab_size=6, start=0)
    # continuations of 2: the pairs (1 2 3), (1 2 4), one context each; lowest order over five kinds of pairs
    lowest = (1 - 0.75) / 5 + 0.75 * 5 / 5 / 6
    lower = (1 - 0.75) / 2 + 0.75 * 2 / 2 * lowest
    assert model.probability((1, 2), 3) == pytest.approx((2 - 0.75) / 3 + 0.75 * 2 / 3 * lower)
    assert model.probability((5, 2), 3) == pytest.approx(lower)  # an unseen context backs off
    assert model.probability((5, 5), 3) == pytest.approx(lowest)


def test_trigram_without_text_is_uniform_and_a_document_costs_the_sum_of_its_tokens():
    model = Trigram([], vocab_size=8, start=0)
    assert model.loss(np.array([3, 1, 4])) == pytest.approx(3 * math.log(8))
    model = Trigram([np.array([1, 2])] * 50, vocab_size=8, start=0)
    assert model.loss(np.array([1, 2])) < model.loss(np.array([2, 1]))


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
    model, corpus = load_base(profile, tmp_path), prepare(profile, tmp_path)
    values = log[log["split"] == "heldout"].set_index("metric")["value"]
    documents = [document[:32] for document in corpus.documents("heldout")]
    assert values["document_tokens"] == [len(document) for document in documents]
    start = torch.tensor([corpus.end_of_text])
    for metric, scored in (("full", model), ("cut", cut_layers(model, profile.split))):
        with torch.no_grad():
            ids = [torch.cat([start, torch.from_numpy(d.astype(np.int64))])[None] for d in documents]
            expected = [scored(i, labels=i, use_cache=False).loss.item() * (i.shape[1] - 1) for i in ids]
        assert values[f"document_losses_{metric}"] == pytest.approx(expected, abs=1e-3)
    trigram = Trigram(corpus.documents("train"), 300, corpus.end_of_text)
    assert values["document_losses_3gram"] == pytest.approx([trigram.loss(d) for d in documents])


def test_a_finished_base_is_left_alone_and_a_forced_one_is_the_same_to_the_bit(profile, tmp_path, pretrained):
    log, weights = pretrained / "base.jsonl", pretrained / "model.safetensors"
    before = log.read_bytes(), weights.read_bytes(), read_run(log).series
    pretraining.pretrain(profile, tmp_path)
    assert log.read_bytes() == before[0]
    pretraining.pretrain(profile, tmp_path, force=True)
    assert log.read_bytes() != before[0]  # it was made again
    assert weights.read_bytes() == before[1] and read_run(log).series == before[2]


def test_an_interrupted_base_is_made_again(profile, tmp_path, monkeypatch):
    real = pretraining._assess
    monkeypatch.setattr(pretraining, "_assess", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain(profile, tmp_path)
    assert not (profile.base_folder(tmp_path) / "base.jsonl").exists()
    monkeypatch.setattr(pretraining, "_assess", real)
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
