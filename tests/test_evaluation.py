"""What an evaluation reads, what it says, and what a run trains on and keeps."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import profile_data
from torch.nn import functional as F

from ouroboros import evaluation, training
from ouroboros.corpus import prepare, sha256
from ouroboros.experiment import DRAWN_DEPTHS, RunSpec, parse_profile
from ouroboros.runlog import RunLog, read_run


def loss_of(run, update, split, metric):
    log = run.log
    found = log[(log["update"] == update) & (log["split"] == split) & (log["metric"] == metric)]["value"]
    return found.iloc[-1]


def watch(model):
    """Record what a model in training is given: a list of (inputs, depth)."""
    seen = []

    def note(module, arguments, named):
        if module.training:
            seen.append((arguments[0].numpy(), named["depth"]))
    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def train_watched(run_id, profile, root):
    spec = profile.find(run_id)
    model = training.build(spec, profile, training.load_base(profile, root))
    seen = watch(model)
    training.train(model, spec, profile, prepare(profile, root), 1e-3, RunLog(root / "watched" / run_id), False)
    return np.concatenate([inputs for inputs, _ in seen]), [depth for _, depth in seen]


def test_block_losses_tell_the_targets_apart_whatever_the_batches():
    blocks = np.arange(11 * 10).reshape(11, 10) % 23

    def next_token(ids, depth):  # knows that the text counts on
        return 50.0 * F.one_hot((ids + 1) % 23, 23).float(), torch.eye(23)

    losses = evaluation.block_losses(next_token, blocks, evaluation.Depths(1, 0), micro_batch=2)
    assert np.allclose(losses["t+1"], 0, atol=1e-6) and np.allclose(losses["t+2"], 50, atol=1e-4)
    assert len(losses["t+1"]) == len(losses["t+2"]) == 11


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    blocks = np.zeros((3, 6), dtype=np.int64)
    losses = evaluation.block_losses(lambda ids, depth: (torch.zeros(*ids.shape, 8), torch.ones(40, 8)), blocks,
                                     evaluation.Depths(1, 0), 1)
    assert losses["t+1"] == pytest.approx([math.log(40)] * 3)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_chunked_loss_is_the_plain_one_and_so_is_its_gradient(fallback, reduction, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 8)
    if fallback:
        monkeypatch.delattr(F, "linear_cross_entropy")
    torch.manual_seed(0)
    hidden, head, wanted = torch.randn(3, 7, 16, requires_grad=True), torch.randn(50, 16), torch.randint(0, 50, (3, 7))
    plain = F.cross_entropy((hidden @ head.T).flatten(0, 1), wanted.flatten(), reduction="none")
    expected, = torch.autograd.grad(plain.mean(), hidden)
    if reduction == "none":
        losses = evaluation.token_losses(hidden.detach(), head, wanted)
        torch.testing.assert_close(losses, plain.view(3, 7))
    else:
        loss = evaluation.token_losses(hidden, head, wanted, "mean")
        torch.testing.assert_close(loss, plain.mean())
        torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)


def test_drawn_depths_are_drawn_anew_for_every_micro_batch():
    drawn, blocks = [], np.zeros((60, 6), dtype=np.int64)

    def hidden(ids, depth):
        drawn.append((len(ids), depth))
        return torch.zeros(*ids.shape, 5), torch.eye(5)

    evaluation.block_losses(hidden, blocks, evaluation.Depths("mixed", 0), micro_batch=2)
    assert len(drawn) == 30 and {size for size, _ in drawn} == {2}
    assert {depth for _, depth in drawn} == set(DRAWN_DEPTHS)


def test_the_full_model_scores_what_the_library_says(profile, root):
    run = read_run(training.execute(profile, "full-any-s0", root, progress=False))
    base, corpus = training.load_base(profile, root), prepare(profile, root)
    for split, blocks in evaluation.final(profile, corpus, 0).items():
        ids = torch.from_numpy(blocks[:, :-1]).long()  # the library shifts inside: the inputs and the next token
        with torch.no_grad():
            expected = [base(row[None], labels=row[None]).loss.item() for row in ids]
        assert loss_of(run, 0, split, "block_losses_t+1") == pytest.approx(expected, abs=1e-5)
    assert set(run.log["update"]) == {0} and run.manifest["trainable"] == 0 and run.manifest["rate"] is None


def test_full_and_cut_differ_and_are_shared_by_both_columns(profile, root):
    full, cut = (read_run(training.execute(profile, f"{arm}-any-s0", root, progress=False)) for arm in ("full", "cut"))
    assert loss_of(full, 0, "heldout", "loss_t+1") != loss_of(cut, 0, "heldout", "loss_t+1")
    assert {cell.run.id for cell in profile.plan() if cell.arm == "cut"} == {"cut-any-s0", "cut-any-s1"}


def test_the_heldout_blocks_are_heldout_documents_with_end_of_text_between(profile, root):
    corpus = prepare(profile, root)
    inputs = evaluation.final(profile, corpus, 0)["heldout"][:, :-2].ravel()
    text = np.concatenate([np.append(document, corpus.end_of_text) for document in corpus.documents("heldout")])
    assert np.array_equal(inputs, text[:len(inputs)])
    during = evaluation.during(profile, corpus)
    assert set(during) == {"dev", "heldout", "foreign"} and during["heldout"].shape == (2, 34)


def test_the_stream_is_what_the_released_run_sees_first(profile, root):
    inputs, _ = train_watched("controller-dmixed-r4-released-s1", profile, root)
    stream = evaluation.final(profile, prepare(profile, root), 1)["stream"][:, :-2]
    assert len(inputs) == 24 and len(stream) == 8 and np.array_equal(stream, inputs[:8])


def test_depths_in_training_are_the_protocols_and_the_data_are_the_seeds(profile, root):
    drawn = {arm: train_watched(f"{arm}-released-s0", profile, root)
             for arm in ("controller-dmixed-r4", "controller_nogate-dmixed-r4")}
    (one, depths), (other, same) = drawn.values()
    assert depths == same and set(depths) <= set(DRAWN_DEPTHS) and len(set(depths)) > 1
    static, given = train_watched("static-d1-r4-released-s0", profile, root)
    assert given == [1] * 12 and train_watched("controller-d2-r4-corrected-s0", profile, root)[1] == [2] * 12
    assert np.array_equal(one, other) and np.array_equal(one, static)


def test_packing_is_the_protocols(profile, root):
    end = prepare(profile, root).end_of_text
    assert end not in train_watched("none-d1-released-s0", profile, root)[0]
    assert end in train_watched("none-d1-corrected-s0", profile, root)[0]


def test_the_target_trained_on_is_the_protocols(profile, root):
    """The first loss of a run is of an untrained model: it can be had from the base and the data alone."""
    for protocol, target in (("released", "t+2"), ("corrected", "t+1"), ("released+target", "t+1")):
        matrix = profile.matrix.model_copy(update={"protocols": (protocol,)})
        own = profile.model_copy(update={"matrix": matrix, "training": profile.training.model_copy(
            update={"updates": 1, "accumulation": 1})})
        spec = own.find(f"none-d1-{protocol}-s0")
        run = read_run(training.execute(own, spec.id, root, progress=False))
        packing = "separated" if protocol == "corrected" else "joined"
        blocks = prepare(own, root).blocks("train", 32, 2, packing, 0)
        model = training.build(spec, own, training.load_base(own, root))
        losses = evaluation.block_losses(training.as_hidden(model), blocks, evaluation.Depths(1, 0), 2)
        assert loss_of(run, 1, "train", "loss") == pytest.approx(np.mean(losses[target]), abs=1e-6)
        assert abs(np.mean(losses["t+1"]) - np.mean(losses["t+2"])) > 1e-5  # or the test couldn't fail


def test_the_trained_tensors_are_kept_whole_and_their_hash_is_the_manifests(profile, root):
    run_id = "controller-d2-r4-corrected-s0"
    manifest = read_run(training.execute(profile, run_id, root, progress=False)).manifest
    content = (root / "results/test/trained" / f"{run_id}.safetensors").read_bytes()
    assert sha256(content) == manifest["hashes"]["trained"]
    kept = safetensors.torch.load(content)
    assert sum(t.numel() for t in kept.values()) == manifest["trainable"] == sum(manifest["trainable_parts"].values())
    model = training.build(profile.find(run_id), profile, training.load_base(profile, root))
    model.load_state_dict(kept, strict=False)
    blocks = evaluation.final(profile, prepare(profile, root), 0)["foreign"]
    losses = evaluation.block_losses(training.as_hidden(model.eval()), blocks, evaluation.Depths(2, 0), 2)
    logged = loss_of(read_run(root / "results/test/runs" / run_id), 6, "foreign", "block_losses_t+1")
    assert losses["t+1"] == pytest.approx(logged, abs=1e-6)


def test_what_rounding_did_before_training_is_no_movement(profile, root):
    """The Controller's random weights are no bf16 numbers; at a rate of nothing, none but zeros can move."""
    path = root / "results/test/rates.json"
    path.write_text(path.read_text().replace("0.001", "1e-12"))
    log = read_run(training.execute(profile, "controller-dmixed-r4-released-s0", root, progress=False)).log
    moved = log[log["metric"].str.startswith("moved/")].set_index("metric")["value"]
    assert moved["moved/recurrence.modulation.state.weight"] == moved["moved/recurrence.modulation.step.weight"] == 0
    assert moved["moved/recurrence.modulation.heads.weight"] > 0


def test_a_run_that_its_last_update_breaks_is_diverged(text, root):
    """No training loss tells of it: only the evaluation after the update does."""
    data = profile_data(text)
    data["training"] |= {"updates": 1, "accumulation": 1}
    data["search"]["grid"] = [3e37]
    profile = parse_profile(data, "test.yaml")
    run_id = RunSpec("controller_nogate", 2, 4, "corrected", 9, 3e37).id
    run = read_run(training.execute(profile, run_id, root, progress=False))
    assert run.manifest["status"] == "diverged" and np.isfinite(run.log["value"].astype(float)).all()
