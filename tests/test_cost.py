"""The cost model against what torch counts on the model itself, and at the paper's shape."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import profile_data
from transformers import Qwen2Config, Qwen2ForCausalLM

from ouroboros.cli import main
from ouroboros.errors import InputError
from ouroboros.experiment import cost, forecast
from ouroboros.experiment.arms import ARMS, PAYS
from ouroboros.experiment.cost import Cost, Shape
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import load_profile, parse_profile
from ouroboros.experiment.protocol import DRAWN_DEPTHS
from ouroboros.training import build, evaluation, measure, sweep, trainer
from ouroboros.training.run import _parts

NETWORKS = [name for name, arm in ARMS.items()  # of 6 layers; those of PAYS in test_extra_passes.py
            if arm.middle not in ("counts", "refine") and arm.ends in (None, 2) and name not in PAYS]
TRAINED = [name for name in NETWORKS if ARMS[name].trained]
MODELS = {
    "small": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "wide": {"hidden_size": 48, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
}


PLACES = {"small": (1, 4), "wide": (3, 2)}  # depth and rank that a model is tried at


@pytest.fixture(params=MODELS)
def built(request, text, monkeypatch):
    """A profile, a function (arm, depth, rank) -> model, and the depth and rank to try; attention as matrix products,
    so that they are counted."""
    data = profile_data(text)
    data["base"]["model"] |= MODELS[request.param]
    profile = parse_profile(data, "t")
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**profile.base.model, attn_implementation="eager")).eval()

    def make(arm, depth, rank):
        kind = ARMS[arm]
        spec = RunSpec(arm, depth if kind.loops else None, rank, "corrected", 0)
        return build.build(spec, profile, base)
    return profile, make, *PLACES[request.param]


@pytest.mark.parametrize("arm", NETWORKS)
def test_flops_of_a_forward_pass_and_of_training(built, arm):
    profile, build, depth, rank = built
    block, kind, expected = profile.training.block, ARMS[arm], Cost.of(profile, arm, rank)
    spec = RunSpec(arm, depth if kind.loops else None, rank, "corrected", 0)
    found = measure.flops(build(arm, depth, rank), spec, profile)
    assert found["forward"] == pytest.approx(expected.forward(depth, context=block), rel=0.02)
    assert ("training" in found) == kind.trained
    if kind.trained:
        assert found["training"] == pytest.approx(expected.training(depth, context=block), rel=0.02)


def test_flops_where_attention_is_one_operation_and_where_depths_are_drawn(profile):
    """Its backward pass computes the scores anew: a product more than the formula has."""
    base = Qwen2ForCausalLM(Qwen2Config(**profile.base.model, attn_implementation="sdpa")).eval()
    block, expected = profile.training.block, Cost.of(profile, "controller")
    spec = RunSpec("controller", "mixed", profile.rank, "corrected", 0)
    found = measure.flops(build.build(spec, profile, base), spec, profile)
    forward, training = (np.mean([of(depth, block) for depth in DRAWN_DEPTHS])
                         for of in (expected.forward, expected.training))
    assert found["forward"] == pytest.approx(forward, rel=0.001)
    assert training < found["training"] < 1.1 * training


@pytest.mark.parametrize("arm", NETWORKS)
def test_parameters(built, arm):
    profile, build, depth, rank = built
    model, expected = build(arm, depth, rank), Cost.of(profile, arm, rank)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert expected.trainable() == _parts(trained)
    trained = sum(p.numel() for p in trained.values())
    bases = sum(b.numel() for name, b in model.named_buffers() if name.endswith((".A", ".B")))
    assert expected.frozen() == sum(p.numel() for p in model.parameters()) - trained + bases


def test_cache_bytes(built):
    profile, build, depth, _ = built
    model = build("none", depth, None).eval()
    cache = model(torch.zeros(1, 5, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 5 * Cost.of(profile, "none").cache(depth, "float32")


@pytest.mark.parametrize("arm, dtype", [(arm, dtype) for arm in TRAINED for dtype in ("float32", "bfloat16")])
def test_activations_are_what_autograd_keeps(built, arm, dtype):
    profile, build, depth, rank = built
    model, ids = build(arm, depth, rank).train(), torch.zeros(2, 32, dtype=torch.long)
    frozen = model.base if ARMS[arm].loops else model
    for parameter in (*frozen.parameters(), *frozen.buffers()):
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    for module in model.modules():  # the layers of a cut model still have the base's configuration
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"
    parameters = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, logits_to_keep=trainer.NO_LOGITS, output_hidden_states=True).hidden_states[-1].sum()
    found = sum(size for size, _ in kept.values())
    assert found == pytest.approx(64 * Cost.of(profile, arm, rank).activations(depth, dtype), rel=0.1)


def test_the_papers_shape_has_the_reported_parameters():
    """system.md 6."""
    profile = load_profile("paper")
    parts = Cost.of(profile, "controller").trainable()
    assert parts == {"modulation": 692_864, "gate": 8_390_656, "step_norm": 131_072}
    assert sum(Cost.of(profile, "static").trainable().values()) == 8_536_064
    shape = Shape.of(profile)
    assert 3.08e9 < shape.parameters(shape.layers) < 3.09e9  # Qwen2.5-3B's model card says 3.09 B
    share = sum(parts.values()) / shape.parameters(17)
    assert 0.005 < share < 0.0065  # reported: 0.6 % of the model


def test_a_loop_as_deep_as_what_was_removed_costs_what_the_full_model_costs():
    profile = load_profile("paper")
    loop, full = (Cost.of(profile, arm) for arm in ("none", "full"))
    assert loop.applications(20) == full.applications(1) == 36 and loop.cache(20) == full.cache(1)
    gate = 20 * 4 * 2048**2
    assert loop.forward(20, 2048) - full.forward(1, 2048) == gate
    assert Cost.of(profile, "cut").forward(1, 2048) < Cost.of(profile, "controller").forward(1, 2048)


def test_a_run_is_its_updates_and_its_evaluations(text):
    profile = parse_profile(profile_data(text), "t")
    spec = profile.find("static-d2-r4-corrected-s0")
    one = Cost.of(profile, "static")
    blocks = 3 * 2 + 4 * 3 + 4 * 2  # points x blocks, splits x final blocks, the stream's micro-batches
    other_depths = 2 * 32 * (one.forward(1, 32) + one.forward(3, 32))
    training = 6 * 128 * one.training(2, 32)
    assert forecast.update_flops(spec, profile) == training
    assert forecast.evaluation_flops(spec, profile) == blocks * 32 * one.forward(2, 32) + other_depths
    search = next(s for s in profile.search_runs() if s.arm == "static")
    assert forecast.update_flops(search, profile) == training
    assert forecast.evaluation_flops(search, profile) == 3 * 32 * one.forward(2, 32)
    rung = RunSpec("static", 2, 4, "corrected", 0, updates=12)
    assert forecast.update_flops(rung, profile) == 2 * training
    mixed = RunSpec("static", "mixed", 4, "released", 0)
    deep = [forecast.evaluation_flops(RunSpec("static", d, 4, "released", 0), profile) for d in (4, 8, 16)]
    assert forecast.evaluation_flops(mixed, profile) == pytest.approx(sum(deep) / 3 + other_depths)


def test_a_dry_run_goes_through_the_plan_with_a_running_sum(tmp_path, capsys):
    assert main(["runs", "--profile", "paper", "--dry-run", "--jobs", "4"], tmp_path) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    profile, speed = load_profile("paper"), forecast.Speed(445e12, 445e12, "")
    rows = [line.split()[:6] for line in lines[:len(profile.plan)]]
    assert [int(row[0]) for row in rows] == list(range(1, len(profile.plan) + 1))
    assert sum(int(row[1]) for row in rows) == len(profile.runs())
    hours = [sum(forecast.seconds(spec, profile, speed) for spec in profile.runs_of(entry)) / 3600 / 4
             for entry in profile.plan]
    assert [float(row[2]) for row in rows] == pytest.approx(hours, rel=0.01)
    assert [float(row[3]) for row in rows] == pytest.approx(np.cumsum(hours), rel=0.01)
    said = "\n".join(lines)
    for words in (f"time: {sum(hours):,.3g} hours with 4 jobs at once", "assumed: resources.teraflops of profile paper",
                  "memory: at most", "disk: "):
        assert words in said
    assert not list(tmp_path.iterdir())  # nothing is fetched or written


def test_a_dry_run_counts_what_is_missing_only(text, tmp_path):
    profile = parse_profile(profile_data(text), "t")
    left = [spec for spec in profile.runs() if spec.arm == "lora" and spec.purpose == "matrix"]
    said = forecast.forecast(profile, left, forecast.Speed(1e9, 1e9, "x"), 1)
    assert len([line for line in said.splitlines() if line.strip()[:1].isdigit()]) == 2 and "2 runs are missing" in said


def test_this_machines_speed_is_measured_where_the_profile_says_none(text, monkeypatch):
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    data = profile_data(text)
    data["resources"] = {}
    speed = sweep.speed(parse_profile(data, "t"), 1)
    assert 1e6 < speed.updates < 1e13 and 1e6 < speed.evaluations < 1e13 and speed.known == "measured here just now"


def test_a_profile_without_a_shape_is_refused_in_one_line(text):
    profile = parse_profile(profile_data(text, base={"path": str(text)}), "t")
    with pytest.raises(InputError, match="test.yaml: field 'base.model'"):
        Cost.of(profile, "full")


def test_a_profile_that_pretrains_its_base_is_told_what_that_takes():
    profile = load_profile("small")
    said = forecast.forecast(profile, profile.runs(), forecast.Speed(50e12, 50e12, "x"), 2)
    shape, recipe = Shape.of(profile), profile.base.pretraining
    forward = shape.layers * shape.layer_flops(recipe.block) + shape.head_flops
    hours = 3 * forward * recipe.updates * recipe.batch * recipe.block / 50e12 / 3600
    assert f"make base PROFILE=small, {hours:.3g} hours unless it is there" in said


def test_the_chunk_of_logits_is_the_losss():
    assert cost.LOGIT_CHUNK == evaluation.CHUNK


def test_what_was_found_is_where_the_lines_cross():
    profile = load_profile("paper")
    text, table = cost.found(profile), cost.table(profile)
    flops, cache = (int(number) for number in re.findall(r"up to depth (\d+)", text))
    loop, full = Cost.of(profile, "controller"), Cost.of(profile, "full")
    assert loop.forward(flops, 2048) < full.forward(1, 2048) <= loop.forward(flops + 1, 2048)
    assert loop.cache(cache) < full.cache(1) <= loop.cache(cache + 1) and cache == 19
    assert list(table["arm"]) == ["full", "cut"] + ["controller"] * 4
    assert table[table["depth"] == 16]["% of full's cache"].item() == pytest.approx(100 * 32 / 36)
    assert table.loc[0, "% of full's forward"] == table.loc[0, "% of full's weights"] == 100
