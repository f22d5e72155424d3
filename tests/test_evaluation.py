"""What an evaluation reads, what it says, and what a run trains on and keeps."""

import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import profile_data, write_searches
from models import convert, ids, shake
from torch.nn import functional as F

from ouroboros.experiment.learning_rates import Rates
from ouroboros.experiment.profile import parse_profile
from ouroboros.experiment.protocol import DRAWN_DEPTHS
from ouroboros.log import WorkingLog, read_run
from ouroboros.model.configuration import PROJECTIONS
from ouroboros.training import build, evaluation, probes, trainer
from ouroboros.training.corpus import content_sha256, prepare
from ouroboros.training.run import execute


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
    model = build.build(spec, profile, build.load_base(profile, root))
    seen = watch(model)
    trainer.train(model, spec, profile, prepare(profile, root), Rates(1e-3, 1e-3),
                   WorkingLog(root / "watched" / run_id), False)
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
def test_the_chunked_loss_is_the_plain_one_and_so_is_its_gradient(fallback, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 8)
    if fallback:
        monkeypatch.delattr(F, "linear_cross_entropy")
    torch.manual_seed(0)
    hidden, head, wanted = torch.randn(3, 7, 16, requires_grad=True), torch.randn(50, 16), torch.randint(0, 50, (3, 7))
    plain = F.cross_entropy((hidden @ head.T).flatten(0, 1), wanted.flatten())
    loss = evaluation.mean_loss(hidden, head, wanted)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(plain, hidden)[0])


def test_losses_under_several_targets_are_each_the_plain_ones(monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 8)
    torch.manual_seed(0)
    hidden, head, wanted = 9 * torch.randn(3, 7, 16), torch.randn(50, 16), torch.randint(0, 50, (2, 3, 7))
    for found, tokens in zip(evaluation.token_losses(hidden, head, *wanted), wanted, strict=True):
        torch.testing.assert_close(found, F.cross_entropy((hidden @ head.T).mT, tokens, reduction="none"))


def test_drawn_depths_are_drawn_anew_for_every_micro_batch():
    drawn, blocks = [], np.zeros((60, 6), dtype=np.int64)

    def hidden(ids, depth):
        drawn.append((len(ids), depth))
        return torch.zeros(*ids.shape, 5), torch.eye(5)

    evaluation.block_losses(hidden, blocks, evaluation.Depths("mixed", 0), micro_batch=2)
    assert len(drawn) == 30 and {size for size, _ in drawn} == {2}
    assert {depth for _, depth in drawn} == set(DRAWN_DEPTHS)


def test_the_full_model_scores_what_the_library_says(profile, root):
    run = read_run(execute(profile, "full-any-s0", root, progress=False))
    base, corpus = build.load_base(profile, root), prepare(profile, root)
    for split, blocks in evaluation.final(profile, corpus, profile.find("full-any-s0")).items():
        ids = torch.from_numpy(blocks[:, :-1]).long()  # the library shifts inside: the inputs and the next token
        with torch.no_grad():
            expected = [base(row[None], labels=row[None]).loss.item() for row in ids]
        assert loss_of(run, 0, split, "block_losses_t+1") == pytest.approx(expected, abs=1e-5)
    assert set(run.log["update"]) == {0} and run.manifest["trainable"] == 0 and run.manifest["rate"] is None


def test_full_and_cut_differ_and_are_shared_by_both_columns(profile, root):
    full, cut = (read_run(execute(profile, f"{arm}-any-s0", root, progress=False)) for arm in ("full", "cut"))
    assert loss_of(full, 0, "heldout", "loss_t+1") != loss_of(cut, 0, "heldout", "loss_t+1")
    assert {cell.run.id for cell in profile.cells() if cell.arm == "cut"} == {"cut-any-s0", "cut-any-s1"}


def test_the_heldout_blocks_are_heldout_documents_with_end_of_text_between(profile, root):
    corpus = prepare(profile, root)
    inputs = evaluation.final(profile, corpus, profile.find("full-any-s0"))["heldout"][:, :-2].ravel()
    text = np.concatenate([np.append(document, corpus.end_of_text) for document in corpus.documents("heldout")])
    assert np.array_equal(inputs, text[:len(inputs)])
    during = evaluation.during(profile, corpus, profile.find("none-d1-corrected-s0"))
    assert set(during) == {"heldout"} and during["heldout"].shape == (2, 34)


def test_the_search_is_scored_on_dev_alone_and_no_other_run_is(profile, root):
    corpus, search = prepare(profile, root), profile.search_runs()[0]
    assert not evaluation.during(profile, corpus, search)
    assert set(evaluation.final(profile, corpus, search)) == {"dev"}
    profile.run_path(search.id, root).unlink()  # a made-up one
    log = read_run(execute(profile, search.id, root, progress=False)).log
    assert set(log["split"]) == {"train", "dev", "model"}
    assert "dev" not in evaluation.final(profile, corpus, profile.find("cut-any-s0"))


def test_the_stream_is_what_the_released_run_sees_first_where_that_is_little_of_all(profile, root, monkeypatch):
    monkeypatch.setattr(evaluation, "STREAM_SHARE", 1)
    inputs, _ = train_watched("controller-dmixed-r4-released-s1", profile, root)
    spec = profile.find("controller-dmixed-r4-released-s1")
    stream = evaluation.final(profile, prepare(profile, root), spec)["stream"][:, :-2]
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


def flipped(profile, protocol):
    """The profile with its core under another protocol."""
    plan = [entry.model_copy(update={"protocols": (protocol,)}) if "cut" in entry.arms else entry
            for entry in profile.plan]
    return profile.model_copy(update={"plan": tuple(plan)})


def test_the_target_trained_on_is_the_protocols(profile, root):
    """The first loss of a run is of an untrained model: it can be had from the base and the data alone."""
    for protocol, target in (("released", "t+2"), ("corrected", "t+1"), ("released+target", "t+1")):
        own = flipped(profile, protocol).model_copy(update={"training": profile.training.model_copy(
            update={"updates": 1, "accumulation": 1})})
        write_searches(root, own)
        spec = own.find(f"none-d1-{protocol}-s0")
        run = read_run(execute(own, spec.id, root, progress=False))
        packing = "separated" if protocol == "corrected" else "joined"
        blocks = prepare(own, root).blocks("train", 32, 2, packing, 0)
        model = build.build(spec, own, build.load_base(own, root))
        losses = evaluation.block_losses(trainer.as_hidden(model), blocks, evaluation.Depths(1, 0), 2)
        assert loss_of(run, 1, "train", "loss") == pytest.approx(np.mean(losses[target]), abs=1e-6)
        assert abs(np.mean(losses["t+1"]) - np.mean(losses["t+2"])) > 1e-5  # or the test couldn't fail


@pytest.mark.parametrize("protocol", ["corrected", "corrected+pooling"])
def test_only_a_pool_over_the_whole_sequence_lets_the_first_half_see_the_second(profile, root, protocol):
    own = flipped(profile, protocol)
    model = build.build(own.find(f"controller-d2-r4-{protocol}-s0"), own, build.load_base(own, root)).eval()
    torch.nn.init.normal_(model.recurrence.modulation.heads.weight, std=100.0)
    torch.nn.init.constant_(model.recurrence.gate.linear.bias, 4.0)
    hidden, blocks = trainer.as_hidden(model), np.random.default_rng(0).integers(0, 300, (4, 34))
    own_future, other, plain = (np.array(evaluation.first_half_losses(hidden, blocks, evaluation.Depths(2, 0), flag))
                                for flag in (False, True, False))
    assert np.array_equal(own_future, plain)
    moved = np.abs(own_future - other)
    assert moved.max() == 0 if protocol == "corrected" else moved.max() > 1e-5, moved
    with torch.no_grad():  # by hand: inputs 0 to 14 predict tokens 1 to 15, all of the first half
        logits = model(torch.from_numpy(blocks)[:, :32]).logits[:, :15].log_softmax(-1)
    wanted = torch.from_numpy(blocks)[:, 1:16, None]
    assert own_future == pytest.approx(-logits.gather(-1, wanted).mean((1, 2)).numpy(), abs=1e-5)


def test_the_trained_tensors_are_kept_whole_and_their_hash_is_the_manifests(profile, root):
    run_id = "controller-d2-r4-corrected-s0"
    manifest = read_run(execute(profile, run_id, root, progress=False)).manifest
    content = (root / "results/test/trained" / f"{run_id}.safetensors").read_bytes()
    assert content_sha256(content) == manifest["hashes"]["trained"]
    kept = safetensors.torch.load(content)
    assert sum(t.numel() for t in kept.values()) == manifest["trainable"] == sum(manifest["trainable_parts"].values())
    model = build.build(profile.find(run_id), profile, build.load_base(profile, root))
    model.load_state_dict(kept, strict=False)
    blocks = evaluation.final(profile, prepare(profile, root), profile.find(run_id))["foreign"]
    losses = evaluation.block_losses(trainer.as_hidden(model.eval()), blocks, evaluation.Depths(2, 0), 2)
    logged = loss_of(read_run(profile.run_path(run_id, root)), 6, "foreign", "block_losses_t+1")
    assert losses["t+1"] == pytest.approx(logged, abs=1e-6)


def test_what_rounding_did_before_training_is_no_movement(profile, root, monkeypatch):
    """The Controller's random weights are no bf16 numbers; at a rate of nothing, none but zeros can move."""
    monkeypatch.setattr("ouroboros.training.run.rates_of", lambda *_: Rates(1e-12, 1e-12))
    run = read_run(execute(profile, "controller-dmixed-r4-released-s0", root, progress=False))
    moved = {name: run.last("model", f"moved/recurrence.modulation.{name}.weight")
             for name in ("state", "step", "heads")}
    assert moved["state"] == moved["step"] == 0 and moved["heads"] > 0


def test_a_run_that_its_last_update_breaks_is_diverged(text, root, monkeypatch):
    """No training loss tells of it: only the evaluation after the update does."""
    data = profile_data(text)
    data["training"] |= {"updates": 1, "accumulation": 1}
    data["evaluation"]["points"] = 2
    monkeypatch.setattr("ouroboros.training.run.rates_of", lambda *_: Rates(3e37, 3e37))
    profile = parse_profile(data, "test.yaml")
    run_id = "controller_nogate-d2-r4-corrected-s0"
    run = read_run(execute(profile, run_id, root, progress=False))
    assert run.manifest["status"] == "diverged" and np.isfinite(np.hstack(run.log["value"].tolist())).all()


# ------------------------------------------------------------------------------------------------- inside the loop

@pytest.fixture
def loop():
    """A Controller that matters, and batches of one size: (model, ids)."""
    return shake(convert()), ids(4, 7)


def test_what_is_seen_of_each_step_is_what_the_states_say(loop):
    model, tokens = loop
    with torch.no_grad(), probes.Watch(model) as watch:
        first = model.hidden(tokens[:2], depth=3)
        second = model.hidden(tokens[2:], depth=3)
    states = [torch.cat(pair) for pair in zip(first, second, strict=True)][1:5]  # the prelude's last, then three steps
    seen = watch.steps()
    for step, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        assert seen["state_norm"][step] == pytest.approx(after.norm(dim=-1).mean().item(), rel=1e-5)
        change = ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()
        assert seen["change"][step] == pytest.approx(change, rel=1e-5)
    assert len(seen["gate_open"]) == 3 and all(0 < g < 1 for g in seen["gate_open"])
    assert not model.recurrence._forward_hooks and not model.recurrence.gate.linear._forward_hooks
    with probes.Watch(model.base) as nothing:  # a model without a loop
        model.base(tokens)
    assert nothing.steps() == {} and nothing.modulation() == {} and nothing.largest == 0


def test_the_moments_of_the_modulation_are_those_of_all_tokens(loop):
    model, tokens = loop
    emitted = {}

    def keep(module, inputs, m):
        emitted.setdefault(inputs[1], []).append(m.double().flatten(0, 1))
    hook = model.recurrence.modulation.register_forward_hook(keep)
    with torch.no_grad(), probes.Watch(model) as watch:
        for part in tokens.split(2):
            model.hidden(part, depth=3)
    hook.remove()
    m = torch.stack([torch.cat(parts) for _, parts in sorted(emitted.items())])  # (steps, N, K, r)
    torch.testing.assert_close(watch.mean_modulation(), m.mean(1))
    assert watch.largest == pytest.approx(m.abs().max().item())
    found = watch.modulation()
    for k, name in enumerate(PROJECTIONS):
        assert found[f"size/{name}"] == pytest.approx(m[:, :, k].square().mean((1, 2)).sqrt().tolist())
        inputs = m[:, :, k].var(1, correction=0).mean(-1).sqrt()
        assert found[f"over_inputs/{name}"] == pytest.approx(inputs.tolist(), rel=1e-5)
        assert found[f"over_steps/{name}"] == pytest.approx([m.mean(1)[:, k].var(0, correction=0).mean().sqrt().item()])
        layer = model.projections[k]
        for step in range(3):
            update = layer.scale * layer.B.double() @ torch.diag(m.mean(1)[step, k]) @ layer.A.double()
            share = (update.norm() / layer.weight.norm()).item()
            assert found[f"update/{name}"][step] == pytest.approx(share, rel=1e-5)


def test_a_static_table_varies_over_steps_and_never_over_inputs():
    model = shake(convert(modulation="static"))
    with torch.no_grad(), probes.Watch(model) as watch:
        model.hidden(ids(4, 7), depth=3)
    found = watch.modulation()
    assert max(found["over_inputs/q_proj"]) < 1e-6 < found["over_steps/q_proj"][0]


def test_blocks_of_one_batch_lie_far_from_each_other_and_none_is_lost():
    blocks = np.arange(128)[:, None]
    mixed = evaluation.spaced(blocks)[:, 0]
    assert sorted(mixed) == list(range(128))
    for batch in mixed.reshape(-1, evaluation.GIVEN_DEPTH_BATCH):
        assert np.diff(batch).min() >= 16
    assert sorted(evaluation.spaced(np.arange(6)[:, None])[:, 0]) == list(range(6))


@pytest.mark.parametrize("kind", ["other_sequence", "corpus_mean", "step_mean"])
def test_an_intervention_changes_what_the_controller_sees_and_nothing_after_it(loop, kind):
    model, tokens = loop
    with torch.no_grad():
        own = model.hidden(tokens)[-1]
        with probes.reading(model) as read, probes.Watch(model) as watch:
            model.hidden(tokens)
        means = {"other_sequence": None, "corpus_mean": read(), "step_mean": watch.mean_modulation()}[kind]
        with probes.intervened(model, kind, means):
            other = model.hidden(tokens)[-1]
            alike = model.hidden(tokens[:1].expand(4, -1))[-1]
        assert not torch.allclose(own, other, atol=1e-4)
        assert torch.equal(model.hidden(tokens)[-1], own)  # the hooks are gone
        if kind == "other_sequence":  # among equal sequences another one is the same
            torch.testing.assert_close(alike, model.hidden(tokens[:1].expand(4, -1))[-1])


def test_replaced_by_its_mean_the_controller_is_a_static_table(loop):
    model, tokens = loop
    with torch.no_grad(), probes.Watch(model) as watch:
        model.hidden(tokens)
    means = watch.mean_modulation()
    static = convert(modulation="static")
    shared = {k: v for k, v in model.state_dict().items() if "modulation" not in k}
    static.load_state_dict(shared, strict=False)
    with torch.no_grad():
        static.recurrence.modulation.table[:len(means)] = means.float()
        with probes.intervened(model, "step_mean", means):
            torch.testing.assert_close(model.hidden(tokens)[-1], static.hidden(tokens)[-1])


@pytest.mark.parametrize("seeds, probed", [([1], False), ([0, 1], True)])
def test_only_the_seeds_that_a_profile_probes_are_probed(text, root, seeds, probed):
    data = profile_data(text)
    profile = parse_profile(data | {"probes": data["probes"] | {"seeds": seeds}}, "t")
    shutil.rmtree(root / "results" / "test" / "runs")
    write_searches(root, profile)
    run = read_run(execute(profile, "controller-d2-r4-corrected-s0", root, progress=False))
    metrics = set(run.log["metric"])
    assert ("loss_t+1/depth_3" in metrics) == ("loss_t+1/corpus_mean" in metrics) == probed
    assert "max_modulation" in metrics


def test_a_run_of_the_base_depth_logs_other_depths_and_a_controller_its_interventions(profile, root):
    runs = {name: read_run(execute(profile, name, root, progress=False)).log["metric"].tolist()
            for name in ("controller-d2-r4-corrected-s0", "controller-d1-r4-corrected-s0", "none-d2-corrected-s0")}
    depths = {f"loss_t+1/depth_{d}" for d in profile.probes.depths}
    kinds = {f"loss_t+1/{k}" for k in ("as_trained", "other_sequence", "corpus_mean", "step_mean")}
    base, shallow, none = map(set, runs.values())
    assert depths | kinds <= base and "modulation/size/q_proj" in base and "steps/change" in base
    assert kinds <= shallow and not depths & shallow
    assert depths <= none and not kinds & none and "modulation/size/q_proj" not in none
    assert runs["none-d2-corrected-s0"].count("steps/gate_open") == 1
    assert runs["none-d2-corrected-s0"].count("curve/steps/gate_open") == profile.evaluation.points
