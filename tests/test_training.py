"""The protocol's facts (AUDIT.md), the loop, the raw log it writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import profile_data
from transformers import Qwen2Config, Qwen2ForCausalLM

from ouroboros import arms, evaluation, sweep, training
from ouroboros.corpus import prepare
from ouroboros.errors import InputError
from ouroboros.experiment import DRAWN_DEPTHS, RunSpec, parse_profile
from ouroboros.log import RunLog, read_run


def trained(profile, root, run_id):
    return read_run(training.execute(profile, run_id, root, progress=False))


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
    released = [training.schedule(u, updates, "stretched") for u in range(updates)]
    corrected = [training.schedule(u, updates, "cosine") for u in range(updates)]
    assert released.index(1.0) in (123, 124, 125) and 0.98 <= released[-1] <= 0.99 + 1e-3
    assert corrected.index(1.0) == 374 and corrected[-1] == pytest.approx(1e-6 / 3e-4)
    assert np.all(np.diff(corrected[375:]) < 0) and max(corrected) == 1.0


def test_in_bfloat16_ones_and_gate_biases_cannot_move_and_nothing_passes_an_eighth():
    """AUDIT `precision`: AdamW at 3e-4 with a constant gradient."""
    def after(start: float, rounded: bool) -> float:
        parameter = torch.nn.Parameter(torch.tensor([start]))
        optimizer = torch.optim.AdamW([parameter], lr=3e-4, weight_decay=0.01)
        for _ in range(1500):
            parameter.grad = torch.tensor([-1.0])
            optimizer.step()
            if rounded:
                training.round_to_bfloat16([parameter])
        return parameter.item()
    assert after(1.0, True) == 1.0 and after(-2.0, True) == -2.0 and after(0.0, True) == 0.125
    assert after(1.0, False) > 1.1 and after(-2.0, False) > -1.9 and after(0.0, False) > 0.3


@pytest.mark.parametrize("protocol, rank, scale", [
    ("released", 2, 1.0), ("released", 4, 0.5), ("released", 8, 0.25),
    ("corrected", 2, 0.5), ("corrected", 4, 0.5), ("corrected", 8, 0.5),
])
def test_alpha_is_fixed_or_scales_with_the_rank(profile, root, protocol, rank, scale):
    model = arms.build(RunSpec("static", 2, rank, protocol, 0), profile, training.load_base(profile, root))
    assert model.projections[0].scale == scale


def test_the_stream_is_what_the_joined_run_trains_on_first_and_splits_are_disjoint(profile, root):
    corpus, settings = prepare(profile, root), profile.training
    sets = evaluation.final(profile, corpus, RunSpec("cut", None, None, "any", 1))
    first = corpus.blocks("train", settings.block, 24, "joined", seed=1)
    assert np.array_equal(sets["stream"], first[:profile.evaluation.stream_batches * settings.micro_batch])
    documents = {split: set(map(bytes, corpus.documents(split))) for split in ("train", "dev", "heldout", "foreign")}
    assert sum(map(len, documents.values())) == len(set.union(*documents.values()))
    assert sets["heldout"].shape == sets["train"].shape == (3, 34) and sets["reference"].shape == (12, 32)
    for packing in ("joined", "separated"):  # `train` is new to the run, whichever way it packs
        seen = np.concatenate(corpus.blocks("train", settings.block, 24, packing, seed=1)[:, :-2])
        new = [bytes(block[:8].astype(np.int32)) for block in sets["train"]]
        assert not any(block in seen.astype(np.int32).tobytes() for block in new)


@pytest.mark.parametrize("run_id", ["controller-dmixed-r4-released-s0", "static-d2-r4-corrected-s0"])
def test_a_run_logs_every_update_and_both_targets_on_every_set(profile, root, run_id):
    run = trained(profile, root, run_id)
    log, manifest = run.log, run.manifest
    updates = log[(log["split"] == "train") & (log["metric"] == "loss")]
    assert list(updates["update"]) == [1, 2, 3, 4, 5, 6] and list(updates["tokens"]) == [128 * u for u in range(1, 7)]
    assert manifest["status"] == "finished" and manifest["rate"] == (1e-3 if "released" in run_id else 1e-2)
    for split in ("train", "heldout", "foreign", "stream", "reference"):
        for target in ("t+1", "t+2"):
            rows = log[(log["split"] == split) & (log["update"] == 6)].set_index("metric")["value"]
            scalar, blocks = rows[f"loss_{target}"], rows[f"block_losses_{target}"]
            scalar = scalar.iloc[-1] if hasattr(scalar, "iloc") else scalar
            assert scalar == pytest.approx(np.mean(blocks), abs=1e-6)
    moved = log[log["metric"].str.startswith("moved/")].set_index("metric")["value"]
    assert set(moved.index) == {f"moved/{n}" for n in _trained_names(root, run_id)} and (moved > 0).any()
    assert log[log["metric"] == "max_modulation"]["value"].item() > 0
    if "released" in run_id:  # AUDIT `precision`: these can't move in bf16
        assert moved["moved/recurrence.step_norm.weight"] == moved["moved/recurrence.gate.linear.bias"] == 0


def _trained_names(root, run_id):
    from safetensors import safe_open
    with safe_open(root / "results/test/trained" / f"{run_id}.safetensors", "pt") as file:
        return list(file.keys())


def test_the_same_run_twice_is_the_same_log_and_arms_see_the_same_data(profile, root):
    one = trained(profile, root, "controller-d2-r4-corrected-s0")
    training.execute(profile, "controller-d2-r4-corrected-s0", root, root / "again", progress=False)
    assert one.log.equals(read_run(root / "again").log)
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
        folder = root / f"{micro}"
        run = training.execute(parse_profile(data, "t"), "static-d2-r4-corrected-s0", root, folder, progress=False)
        log = read_run(run).log
        losses.append(log[log["metric"] == "loss"]["value"].astype(float).to_numpy())
    assert np.abs(losses[0] - losses[1]).max() < 1e-5


def test_a_finished_run_is_left_alone_and_an_interrupted_one_is_made_again(profile, root, monkeypatch):
    run_id, folder = "none-d2-corrected-s0", root / "results/test/runs/none-d2-corrected-s0"
    score = training._score_all
    monkeypatch.setattr(training, "_score_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        training.execute(profile, run_id, root, progress=False)
    with pytest.raises(InputError, match="interrupted"):
        read_run(folder)
    assert run_id in [s.id for s in sweep.missing(profile, root, "matrix")]
    monkeypatch.setattr(training, "_score_all", score)
    trained(profile, root, run_id)
    before = (folder / "log.jsonl").stat().st_mtime_ns
    training.execute(profile, run_id, root, progress=False)
    assert (folder / "log.jsonl").stat().st_mtime_ns == before
    assert run_id not in [s.id for s in sweep.missing(profile, root, "matrix")]


def test_a_loss_that_is_no_number_ends_the_run_as_diverged_and_keeps_its_log(profile, root, monkeypatch):
    real, calls = evaluation.token_losses, []

    def exploding(*arguments):
        calls.append(torch.is_grad_enabled())
        return real(*arguments) * (float("nan") if calls.count(True) > 6 else 1)
    monkeypatch.setattr(evaluation, "token_losses", exploding)
    run = trained(profile, root, "static-d2-r4-corrected-s0")
    assert run.manifest["status"] == "diverged" and run.log["update"].max() == 3
    assert np.isfinite(np.hstack(run.log["value"].tolist())).all()


def test_a_loss_far_above_a_guess_ends_the_run_as_diverged_before_its_update(profile, root, monkeypatch):
    real, calls = evaluation.token_losses, []

    def exploding(*arguments):
        calls.append(torch.is_grad_enabled())
        return real(*arguments) * (3.2 if calls.count(True) in (7, 8) else 1)  # both micro-batches of update 4
    monkeypatch.setattr(evaluation, "token_losses", exploding)
    run = trained(profile, root, "static-d2-r4-corrected-s0")
    assert run.manifest["status"] == "diverged" and run.log["update"].max() == 3
    losses = run.log[run.log["metric"] == "loss"]["value"].astype(float)
    assert losses.max() < 2 * np.log(300) < training.EXPLODED * np.log(300) < 3.2 * losses.min()


def test_frozen_weights_are_bit_identical_after_training(profile, root):
    base = training.load_base(profile, root)
    spec = profile.find("controller-d2-r4-corrected-s0")
    model = arms.build(spec, profile, base)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("recurrence")}

    class Silent:
        def row(self, *_):
            pass
    training.train(model, spec, profile, prepare(profile, root), 1e-2, Silent(), False)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in frozen.items())


def test_rerun_agrees_with_itself_and_refuses_an_edited_log(profile, root, capsys):
    run_id = "none-d1-corrected-s0"
    folder = training.execute(profile, run_id, root, progress=False)
    assert training.rerun(profile, run_id, root) == 0 and "agrees: largest difference 0 " in capsys.readouterr().out
    log = folder / "log.jsonl"
    log.write_text(log.read_text().replace('"update": 3', '"update": 4', 1))
    with pytest.raises(InputError, match="edited"):
        training.rerun(profile, run_id, root)
    with pytest.raises(InputError, match="no finished run"):
        training.rerun(profile, "none-d2-corrected-s0", root)


def test_rerun_compares_a_log_of_the_older_format_where_both_have_rows(profile, root, capsys):
    run_id = "none-d1-corrected-s0"
    folder = training.execute(profile, run_id, root, progress=False)
    run = read_run(folder)
    rows = [row for row in run.log.to_dict("records") if row["split"] != "train" or row["metric"] == "loss"]
    shutil.rmtree(folder)
    older = RunLog(folder)
    for row in rows:
        older.row(**row)
        if (row["update"], row["metric"]) == (0, "loss_t+1"):
            older.row(0, 0, "dev", "loss_t+1", 9.0)  # had once, has no more
    older.finish(run.manifest | {"format": 1})
    assert training.rerun(profile, run_id, root) == 0
    out = capsys.readouterr().out
    assert "rows are compared" in out and "agrees: largest difference 0 " in out


def test_rerun_says_where_a_log_differs(profile, root, capsys):
    run_id = "none-d1-corrected-s0"
    training.execute(profile, run_id, root, progress=False)
    rates = root / "results/test/rates.json"
    rates.write_text(rates.read_text().replace("0.01", "0.03"))
    assert training.rerun(profile, run_id, root) == 1 and "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("change, complaint", [
    ({"split": (3, 3, 3)}, "needs 7 layers, the base has 6"),
    ({"split": (2, 2, 3)}, "removes none"),
    ({"rank": 9}, "rank 9: larger than projection k_proj"),
])
def test_a_profile_that_does_not_fit_its_base_is_refused_and_leaves_no_run(text, root, change, complaint):
    profile = parse_profile(profile_data(text, **change), "test.yaml")
    with pytest.raises(InputError, match=complaint):
        training.execute(profile, f"controller-d2-r{profile.rank}-corrected-s0", root, progress=False)
    assert not (root / "results/test/runs").exists()


def test_a_missing_base_and_missing_rates_are_said(profile, root):
    (root / "results/test/rates.json").unlink()
    with pytest.raises(InputError, match="learning-rate search"):
        training.execute(profile, "none-d1-corrected-s0", root)
    (profile.base_folder(root) / "model.safetensors").unlink()
    with pytest.raises(InputError, match="make base"):
        training.execute(profile, "cut-any-s0", root)


def test_the_papers_path_end_to_end_on_a_narrow_base(text, tmp_path):
    """36 layers, 8/1/8, layer 18, a local `datasets` stream, a base given as a folder: nothing stubbed."""
    base = tmp_path / "qwen"
    config = Qwen2Config(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=36,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(base, max_shard_size="50KB")  # several shards, as the real one
    assert len(list(base.glob("*.safetensors"))) > 1
    # the tokenizer is the base's own
    prepare(parse_profile(profile_data(text), "t"), tmp_path)
    (tmp_path / "results/test/base/tokenizer.json").rename(base / "tokenizer.json")
    stream = {}
    for part in ("own", "foreign"):
        (tmp_path / part).mkdir()
        lines = [json.dumps({"text": file.read_text()}) for file in sorted(Path(text / part).iterdir())]
        (tmp_path / part / "all.jsonl").write_text("\n".join(lines))
        stream[part] = str(tmp_path / part)
    data = profile_data(text, split=(8, 18, 8), base={"path": str(base)})
    data["corpus"] |= {"kind": "hub", "packages": [stream["own"]], "foreign": [stream["foreign"]], "documents": 90}
    profile = parse_profile(data, "paper.yaml")
    (tmp_path / "results/test/rates.json").write_text(json.dumps(
        {"own": {"controller": 1e-2, "static": 1e-2}, "shared": 1e-3, "search": []}))
    for run_id in ("full-any-s0", "cut-any-s0", "controller-d2-r4-corrected-s0", "static-d2-r4-released-s0"):
        assert trained(profile, tmp_path, run_id).manifest["status"] == "finished"
    base = training.load_base(profile, tmp_path)
    model = arms.build(profile.find("controller-d2-r4-corrected-s0"), profile, base)
    assert len(model.base.model.layers) == 17
