"""The protocol's facts (docs/protocol.md), the loop, the raw log it writes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import profile_data, write_searches
from synthetic import write_run

from ouroboros.errors import InputError
from ouroboros.experiment import protocol
from ouroboros.experiment.arms import ARMS
from ouroboros.experiment.learning_rates import Rates
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import parse_profile
from ouroboros.experiment.protocol import DRAWN_DEPTHS, schedule
from ouroboros.log import read_run
from ouroboros.log import write_run as write_log
from ouroboros.training import build, evaluation, probes, sweep, trainer
from ouroboros.training.corpus import prepare
from ouroboros.training.run import execute, rerun, score_run


def trained(profile, root, run_id):
    return read_run(execute(profile, run_id, root, progress=False))


@pytest.mark.parametrize("target, ahead", [("t+1", 1), ("t+2", 2)])
def test_targets_on_a_counting_sequence(target, ahead):
    blocks = torch.arange(10)[None]
    assert torch.equal(evaluation.targets(blocks, target), blocks[:, :-2] + ahead)


def test_drawn_depths_are_uniform_over_the_three_and_the_same_for_every_arm():
    one, other = evaluation.Depths("mixed", 3), evaluation.Depths("mixed", 3)
    drawn = [one.next() for _ in range(3000)]
    assert drawn == [other.next() for _ in range(3000)]
    assert all(abs(drawn.count(depth) / 3000 - 1 / 3) < 0.05 for depth in DRAWN_DEPTHS)
    assert [evaluation.Depths(4, 0).next() for _ in range(2)] == [4, 4]


def test_the_released_schedule_ends_near_its_peak_and_the_corrected_at_its_floor():
    updates = 18_750
    released = [protocol.schedule(u, updates, "stretched") for u in range(updates)]
    corrected = [protocol.schedule(u, updates, "cosine") for u in range(updates)]
    assert released.index(1.0) in (123, 124, 125) and 0.98 <= released[-1] <= 0.99 + 1e-3
    assert corrected.index(1.0) == 374 and corrected[-1] == pytest.approx(1e-6 / 3e-4)
    assert np.all(np.diff(corrected[375:]) < 0) and max(corrected) == 1.0


def test_in_bfloat16_ones_and_gate_biases_cannot_move_and_nothing_passes_an_eighth():
    """protocol.md `precision`: AdamW at 3e-4 with a constant gradient."""
    def after(start: float, rounded: bool) -> float:
        parameter = torch.nn.Parameter(torch.tensor([start]))
        optimizer = torch.optim.AdamW([parameter], lr=3e-4, weight_decay=0.01)
        for _ in range(1500):
            parameter.grad = torch.tensor([-1.0])
            optimizer.step()
            if rounded:
                trainer.round_to_bfloat16([parameter])
        return parameter.item()
    assert after(1.0, True) == 1.0 and after(-2.0, True) == -2.0 and after(0.0, True) == 0.125
    assert after(1.0, False) > 1.1 and after(-2.0, False) > -1.9 and after(0.0, False) > 0.3


@pytest.mark.parametrize("protocol, rank, scale", [
    ("released", 2, 1.0), ("released", 4, 0.5), ("released", 8, 0.25),
    ("corrected", 2, 0.5), ("corrected", 4, 0.5), ("corrected", 8, 0.5),
])
def test_alpha_is_fixed_or_scales_with_the_rank(profile, root, protocol, rank, scale):
    model = build.build(RunSpec("static", 2, rank, protocol, 0), profile, build.load_base(profile, root))
    assert model.projections[0].scale == scale


def test_the_stream_is_new_text_or_the_first_trained_on_and_splits_are_disjoint(profile, root, monkeypatch):
    corpus, settings = prepare(profile, root), profile.training
    sets = evaluation.final(profile, corpus, RunSpec("cut", None, None, "any", 1))
    count = profile.evaluation.stream_batches * settings.micro_batch
    first = corpus.blocks("train", settings.block, count, "joined", seed=1)
    # 8 of the 24 blocks that a run trains on are more than 1 %: fresh ones take their place (protocol.md `evaluation`)
    assert evaluation.stream_kind(profile) == "fresh" and sets["stream"].shape == first.shape
    longer = profile.model_copy(update={"training": settings.model_copy(update={"updates": 201})})
    assert evaluation.stream_kind(longer) == "start"
    monkeypatch.setattr(evaluation, "STREAM_SHARE", 1)
    assert np.array_equal(evaluation.final(profile, corpus, RunSpec("cut", None, None, "any", 1))["stream"], first)
    documents = {split: set(map(bytes, corpus.documents(split))) for split in corpus.manifest["splits"]}
    assert sum(map(len, documents.values())) == len(set.union(*documents.values()))
    assert sets["heldout"].shape == sets["train"].shape == (3, 34) and sets["reference"].shape == (12, 32)
    for packing in ("joined", "separated"):  # `train` is new to the run, whichever way it packs
        seen = np.concatenate(corpus.blocks("train", settings.block, 24, packing, seed=1)[:, :-2])
        new = [bytes(block[:20].astype(np.int32)) for block in sets["train"]]
        new += [bytes(block[:20].astype(np.int32)) for block in sets["stream"]]
        assert not any(block in seen.astype(np.int32).tobytes() for block in new)


@pytest.mark.parametrize("run_id", ["controller-dmixed-r4-released-s0", "static-d2-r4-corrected-s0"])
def test_a_run_logs_every_update_and_both_targets_on_every_set(profile, root, run_id):
    run = trained(profile, root, run_id)
    log, manifest = run.log, run.manifest
    updates = log[(log["split"] == "train") & (log["metric"] == "loss")]
    assert list(updates["update"]) == [1, 2, 3, 4, 5, 6] and manifest["stream"] == "fresh"
    assert manifest["status"] == "finished" and manifest["rate"] == (1e-3 if "released" in run_id else 1e-2)
    for split in ("train", "heldout", "foreign", "newer", "stream", "reference"):
        for target in ("t+1", "t+2"):
            rows = log[(log["split"] == split) & (log["update"] == 6)].set_index("metric")["value"]
            scalar, blocks = rows[f"loss_{target}"], rows[f"block_losses_{target}"]
            assert scalar == pytest.approx(np.mean(blocks), abs=1e-6)
    moved = log[log["metric"].str.startswith("moved/")].set_index("metric")["value"]
    assert set(moved.index) == {f"moved/{n}" for n in _trained_names(root, run_id)} and (moved > 0).any()
    assert log[log["metric"] == "max_modulation"]["value"].item() > 0
    if "released" in run_id:  # protocol.md `precision`: these can't move in bf16
        assert moved["moved/recurrence.step_norm.weight"] == moved["moved/recurrence.gate.linear.bias"] == 0


def _trained_names(root, run_id):
    from safetensors import safe_open
    with safe_open(root / "results/test/trained" / f"{run_id}.safetensors", "pt") as file:
        return list(file.keys())


def test_arms_see_the_same_data_and_seeds_do_not(profile, root):
    one = trained(profile, root, "controller-d2-r4-corrected-s0")
    static = trained(profile, root, "static-d2-r4-corrected-s0")
    first = [run.log[run.log["metric"] == "loss"]["value"].iloc[0] for run in (one, static)]
    assert first[0] == first[1]  # modulation starts at zero: the first loss tells the data and nothing else
    other = trained(profile, root, "controller-d2-r4-corrected-s1")
    assert other.log[other.log["metric"] == "loss"]["value"].iloc[0] != first[0]


def test_accumulation_is_one_large_batch(text, profile, root):
    losses = []
    for micro, accumulation in ((4, 1), (1, 4)):
        data = profile_data(text)
        data["training"] |= {"micro_batch": micro, "accumulation": accumulation}
        changed, path = parse_profile(data, "t"), root / f"{micro}" / "static-d2-r4-corrected-s0.jsonl"
        write_searches(root, changed)
        run = read_run(execute(changed, "static-d2-r4-corrected-s0", root, path, progress=False))
        losses.append(np.array(run.series["train", "loss"].values))
    assert np.abs(losses[0] - losses[1]).max() < 1e-5


def test_a_finished_run_is_left_alone_and_an_interrupted_one_is_made_again(profile, root, monkeypatch):
    run_id = "none-d2-corrected-s0"
    path = profile.run_path(run_id, root)
    score = score_run
    monkeypatch.setattr("ouroboros.training.run.score_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        execute(profile, run_id, root, progress=False)
    assert not path.exists() and (profile.unfinished(run_id, root) / "rows.jsonl").exists()
    assert run_id in [s.id for s in sweep.missing(profile, root, "matrix")]
    monkeypatch.setattr("ouroboros.training.run.score_run", score)
    trained(profile, root, run_id)
    before = path.stat().st_mtime_ns
    execute(profile, run_id, root, progress=False)
    assert path.stat().st_mtime_ns == before
    assert run_id not in [s.id for s in sweep.missing(profile, root, "matrix")]


def test_a_loss_that_is_no_number_ends_the_run_as_diverged_and_keeps_its_log(profile, root, monkeypatch):
    real, calls = evaluation.mean_loss, []

    def exploding(*arguments):
        calls.append(torch.is_grad_enabled())
        return real(*arguments) * (float("nan") if calls.count(True) > 6 else 1)
    monkeypatch.setattr(evaluation, "mean_loss", exploding)
    run = trained(profile, root, "static-d2-r4-corrected-s0")
    assert run.manifest["status"] == "diverged" and run.log["update"].max() == 3
    assert np.isfinite(np.hstack(run.log["value"].tolist())).all()


def test_a_loss_far_above_a_guess_ends_the_run_as_diverged_before_its_update(profile, root, monkeypatch):
    real, calls = evaluation.mean_loss, []

    def exploding(*arguments):
        calls.append(torch.is_grad_enabled())
        return real(*arguments) * (3.2 if calls.count(True) in (7, 8) else 1)  # both micro-batches of update 4
    monkeypatch.setattr(evaluation, "mean_loss", exploding)
    run = trained(profile, root, "static-d2-r4-corrected-s0")
    assert run.manifest["status"] == "diverged" and run.log["update"].max() == 3
    losses = run.log[run.log["metric"] == "loss"]["value"].astype(float)
    assert losses.max() < 2 * np.log(300) < trainer.EXPLODED * np.log(300) < 3.2 * losses.min()


def test_frozen_weights_are_bit_identical_after_training(profile, root):
    base = build.load_base(profile, root)
    spec = profile.find("controller-d2-r4-corrected-s0")
    model = build.build(spec, profile, base)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("recurrence")}

    class Silent:
        def row(self, *_):
            pass
    trainer.train(model, spec, profile, prepare(profile, root), Rates(1e-2, 1e-1), Silent(), False)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in frozen.items())


def test_rerun_agrees_with_itself_and_refuses_an_edited_log(profile, root, capsys):
    run_id = "none-d1-corrected-s0"
    log = execute(profile, run_id, root, progress=False)
    assert rerun(profile, run_id, root) == 0 and "agrees: largest difference 0 " in capsys.readouterr().out
    log.write_text(log.read_text().replace("[1,2,3,", "[1,2,4,", 1))
    with pytest.raises(InputError, match="edited"):
        rerun(profile, run_id, root)
    with pytest.raises(InputError, match="no such log"):
        rerun(profile, "none-d2-corrected-s0", root)


def test_rerun_says_where_a_log_differs(profile, root, capsys):
    run_id = "none-d1-corrected-s0"
    path = execute(profile, run_id, root, progress=False)
    run = read_run(path)
    rows = [{"update": update, "split": split, "metric": metric, "value": value}
            for (split, metric), found in run.series.items() for update, value in zip(*found, strict=True)]
    manifest = {name: value for name, value in run.manifest.items() if name not in ("format", "series", "seal")}
    write_log(path, manifest, [*rows, {"update": 6, "split": "heldout", "metric": "more", "value": 1.0}])
    assert rerun(profile, run_id, root) == 1 and "the series differ" in capsys.readouterr().out
    write_log(path, manifest, rows)
    for spec in profile.search_runs():  # another rate is the best now
        for rate, dev in ((1e-3, 9.0), (1e-2, 8.0), (3e-2, 1.0), (1e-1, 9.0)):
            write_run(root, profile, replace(spec, rate=rate), dev)
    assert rerun(profile, run_id, root) == 1 and "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("change, complaint", [
    ({"split": (3, 3, 3)}, "needs 7 layers, the base has 6"),
    ({"split": (2, 2, 3)}, "removes none"),
    ({"rank": 9}, "rank 9: larger than projection k_proj"),
])
def test_a_profile_that_does_not_fit_its_base_is_refused_and_leaves_no_run(text, root, profile, change, complaint):
    path = str(profile.base_folder(root))  # whose shape the profile doesn't say, so that it isn't known before
    profile = parse_profile(profile_data(text, base={"path": path}, **change), "test.yaml")
    write_searches(root, profile)
    run_id = f"controller-d2-r{profile.rank}-corrected-s0"
    with pytest.raises(InputError, match=complaint):
        execute(profile, run_id, root, progress=False)
    assert not profile.run_path(run_id, root).exists() and not profile.unfinished(run_id, root).exists()


def test_a_missing_base_and_missing_rates_are_said(profile, root):
    profile.run_path("none-d2-corrected-s9-lr0.01", root).unlink()
    with pytest.raises(InputError, match="its learning rate is still searched"):
        execute(profile, "none-d1-corrected-s0", root)
    (profile.base_folder(root) / "model.safetensors").unlink()
    with pytest.raises(InputError, match="make base"):
        execute(profile, "cut-any-s0", root)


@pytest.mark.parametrize("rate", [3e-4, 1e-3, 3e-3, 9e-2])
def test_what_is_kept_in_bfloat16_moves_as_at_the_papers_rate(rate):
    """protocol.md `precision`, scaled: at 1 and -2 nothing moves, no entry from 0 passes 0.125, at any rate."""
    start = torch.tensor([1.0, -2.0, 0.0])
    value, optimizer_like = start.clone(), start.clone()
    for _ in range(2000):
        optimizer_like.copy_(value - rate * torch.tensor([1.0, 1.0, -1.0]))  # AdamW under a constant gradient
        before = value.clone()
        value.copy_(optimizer_like)
        trainer.add_in_bfloat16(value, before, rate)
    assert value[0] == 1 and value[1] == -2 and value[2] == 0.125


def test_a_part_at_the_papers_rate_is_the_update_itself():
    before = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    after = before + 3e-4 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    found = after.clone()
    trainer.add_in_bfloat16(found, before, 3e-4)
    assert torch.equal(found, after.bfloat16().float())
    trainer.add_in_bfloat16(after, before, 3e-3)  # ten parts, each rounded, lose what one large one keeps
    assert not torch.equal(found, after)


@pytest.mark.parametrize("arm, elementwise", [
    ("controller", {"recurrence.step_norm.weight"}), ("static", {"recurrence.step_norm.weight",
                                                                 "recurrence.modulation.table"}),
    ("static_nonorm", {"recurrence.modulation.table"}), ("none_nonorm", set()), ("lora", set()), ("linear", set()),
    ("affine", {"model.layers.1.affine.scale", "model.layers.1.affine.shift"}), ("static_wide",
                                                                                 {"recurrence.step_norm.weight"}),
])
def test_each_tensor_trains_at_the_rate_of_its_kind(profile, root, arm, elementwise):
    depth = 2 if ARMS[arm].loops else None
    model = build.build(RunSpec(arm, depth, 4 if ARMS[arm].modulated else None, "corrected", 0), profile,
                       build.load_base(profile, root))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = trainer.parameter_groups(named, Rates(1e-3, 1e-2), ARMS[arm])
    peaks = {name: next(g["peak"] for g in groups if any(p is q for q in g["params"])) for name, p in named.items()}
    assert {name for name, peak in peaks.items() if peak == 1e-2} == elementwise
    assert ARMS[arm].elementwise == bool(elementwise) and sum(len(g["params"]) for g in groups) == len(named)


@pytest.mark.parametrize("arm", ["controller", "controller_matched"])
def test_a_run_says_both_rates_both_travels_and_how_far_its_norms_went(profile, root, arm):
    run = trained(profile, root, f"{arm}-d2-r4-corrected-s0")
    manifest, total = run.manifest, sum(schedule(u, 6, "cosine") for u in range(6))
    assert manifest["rate"] == manifest["elementwise_rate"] == 1e-2
    assert manifest["travel"] == {"matrix": pytest.approx(1e-2 * total), "elementwise": pytest.approx(1e-2 * total)}
    stream, norms = (run.last("model", name) for name in ("stream_rms", "step_norm"))
    begun = stream if arm == "controller_matched" else [1, 1]
    assert len(stream) == 2 and all(abs(a - b) <= 1e-2 * total for a, b in zip(norms, begun))
    assert norms != begun and not np.allclose(stream, 1, atol=0.1)


def test_the_streams_size_is_the_median_over_tokens_without_the_first_ones(profile, root):
    """Worked by hand at depth 1: what the first step norm reads is the recurrent layer's output."""
    model = build.build(profile.find("none-d2-corrected-s0"), profile, build.load_base(profile, root))
    blocks = prepare(profile, root).blocks("train", 32, 4, "separated")
    seen = []
    hook = model.recurrent_layer.register_forward_hook(lambda module, inputs, out: seen.append(out))
    found = probes.stream_rms(model, blocks, 1)
    hook.remove()
    by_token = seen[0][:, 4:].square().mean(-1).sqrt().flatten().sort().values
    assert found == [pytest.approx(by_token[(len(by_token) - 1) // 2].item())]
    assert torch.equal(model.recurrence.step_norm.weight, torch.full_like(model.recurrence.step_norm.weight, found[0]))


def test_a_rung_of_a_ladder_trains_as_long_as_it_says(text, root):
    data = profile_data(text)
    data["plan"].append({"arms": ["static"], "depths": [2], "updates": 8, "seeds": [0]})
    profile = parse_profile(data, "t")
    run = trained(profile, root, "static-d2-r4-corrected-s0-u8")
    assert run.manifest["config"]["training"]["updates"] == run.series["train", "loss"].updates[-1] == 8
    assert run.series["heldout", "curve/loss_t+1"].updates == [0, 4, 8]
    assert profile.mismatch(run.manifest, profile.find("static-d2-r4-corrected-s0-u8")) is None
    assert profile.mismatch(run.manifest, profile.find("static-d2-r4-corrected-s0")) is not None
