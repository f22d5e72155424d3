"""Further passes over kept layers (docs/hypotheses.md): what they begin as, what they train, what they could reach."""

import pytest
import torch
from conftest import profile_data
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ouroboros.errors import InputError
from ouroboros.experiment.arms import ARMS, PAYS
from ouroboros.experiment.cost import Cost
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import load_profile, parse_profile
from ouroboros.experiment.schema import Scanned
from ouroboros.training import build, measure, scan, trained, trainer
from ouroboros.training.extra_passes import Repeated, Teacher

IDS = torch.randint(300, (2, 18), generator=torch.Generator().manual_seed(0))
ADDED = [name for name, arm in PAYS.items() if arm.passes]
DAMPED = [name for name in ADDED if ARMS[name].passes.kind != "plain"]
VALUES = ["lora", "lora_layer", *(name for name, arm in PAYS.items() if arm.fit == "gradient")]


@pytest.fixture
def profile(text):
    data = profile_data(text, layers=10, split=(2, 4, 2), scanned={"looped": [2, 1, 2], "kept": 3})
    data["base"]["model"] |= {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}
    return parse_profile(data, "test.yaml")


@pytest.fixture
def base(profile):
    """Layers that differ in their projections alone: all norms are as they begin."""
    torch.manual_seed(0)
    kind = {name: value for name, value in profile.base.model.items() if name != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**kind, initializer_range=0.2)).eval().requires_grad_(False)


def built(arm: str, profile, base):
    return build.build(RunSpec(arm, None, None, "corrected", 0), profile, base).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@torch.no_grad()
def stir(model) -> None:
    """Move everything that is trained, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def repeated(model) -> Repeated:
    [place] = [module for module in model.modules() if isinstance(module, Repeated)]
    return place


@pytest.mark.parametrize("arm", DAMPED)
def test_what_is_damped_begins_as_the_cut_model_and_leaves_the_base_alone(arm, profile, base):
    whole, model = logits(base), built(arm, profile, base)
    kept = build.cut_layers(base, profile.split_of(arm))
    assert torch.equal(logits(model), logits(kept))
    stir(model)
    assert not torch.allclose(logits(model), logits(kept), atol=1e-3)
    assert torch.equal(logits(base), whole)


@pytest.mark.parametrize("arm", VALUES)
def test_every_arm_trains_as_much_as_the_controller(arm):
    """Counted from SmolLM2's shape, where the comparison is made."""
    profile = load_profile("smollm2").model_copy(update={"scanned": Scanned(looped=(0, 0, 0), kept=15)})
    wanted = sum(Cost.of(profile, "controller").trainable().values())
    assert sum(Cost.of(profile, arm).trainable().values()) == pytest.approx(wanted, rel=0.01)


def test_a_table_scales_the_ranks_of_the_layer_that_is_looped():
    """The first layers have a rank more: the first one, the middle one."""
    profile = load_profile("smollm2")
    for looped in (0, profile.split.prelude):
        cost = Cost.of(profile.model_copy(update={"scanned": Scanned(looped=(looped,) * 3, kept=15)}), "repeat_static")
        assert cost.looped(cost.lora_ranks, looped) == cost.lora_ranks[looped]
    assert cost.lora_ranks[0] > cost.lora_ranks[profile.split.prelude]


@pytest.mark.parametrize("arm", [*(name for name in VALUES if not name.endswith("_distilled")), "lora_distilled"])
def test_costs_are_those_of_the_model(arm, profile, base):
    model, cost = built(arm, profile, base), Cost.of(profile, arm)
    parts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[build.part_of(name)] = parts.get(build.part_of(name), 0) + parameter.numel()
    assert parts == cost.trainable()
    held = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert held == cost.frozen()
    flops = measure.flops(model, RunSpec(arm, None, None, "corrected", 0), profile)
    assert flops["forward"] == pytest.approx(cost.forward(1, profile.training.block), rel=0.03)
    assert flops["training"] == pytest.approx(cost.training(1, profile.training.block), rel=0.05)


def test_frozen_bases_hold_no_more_than_a_layer():
    cost = Cost.of(load_profile("smollm2"), "bases_static")
    extra = cost.frozen() - Cost.of(load_profile("smollm2"), "lora").frozen()
    assert 0.9 * cost.shape.layer_parameters < extra <= cost.shape.layer_parameters


@pytest.mark.parametrize("arm", ["repeat_controller", "bases_static", "relaxed", "lora_other", "lora_layers"])
def test_what_is_trained_is_saved_and_loaded(arm, profile, base, tmp_path):
    spec, model = RunSpec(arm, None, None, "corrected", 0), built(arm, profile, base)
    stir(model)
    trained.save(model, spec, profile, tmp_path / "made")
    again = trained.load(tmp_path / "made", spec, profile, base).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_other_tensors_are_refused(profile, base, tmp_path):
    spec = RunSpec("repeat", None, None, "corrected", 0)
    trained.save(built("repeat", profile, base), spec, profile, tmp_path)
    with pytest.raises(InputError, match="trained.safetensors: tensor '.*' isn't what its run trains"):
        trained.load(tmp_path, RunSpec("repeat_more", None, None, "corrected", 0), profile, base)


def test_a_cache_is_refused(profile, base):
    model = built("repeat", profile, base)
    with pytest.raises(InputError, match="use_cache: .*pass use_cache=False"):
        model(IDS, use_cache=True)


@pytest.mark.parametrize("arm", ["relaxed", "bases_trained"])
def test_with_bases_of_full_rank_a_pass_a_removed_layer_is_the_full_model(arm, profile, base, monkeypatch):
    """So each pass has its own layer's residual, in the order of the layers, the middle one's own pass among them."""
    monkeypatch.setattr(Cost, "base_ranks", property(lambda cost: (32,) * cost.passes))
    model = built(arm, profile, base)
    with torch.no_grad():
        if "gate" in repeated(model).passes:
            repeated(model).passes["gate"].fill_(1)
    assert torch.allclose(logits(model), logits(base), atol=1e-4)


def test_a_pass_is_the_layers_again(profile, base):
    """At g = 1 a pass over two neighbours is these two applied once more, in their order."""
    model, layers = built("block_two", profile, base), base.model.layers
    with torch.no_grad():
        repeated(model).passes["gate"].fill_(1)
    kept = [layers[index] for index in (0, 1, 4, 8, 9)]
    again = build.cut_layers(base, profile.split)
    again.model.layers = nn.ModuleList([*kept[:3], *kept[1:3], *kept[3:]])
    again.config.num_hidden_layers = 7
    assert torch.allclose(logits(model), logits(again), atol=1e-5)


def test_a_gate_is_how_much_of_a_pass_is_let_through(profile, base):
    place = Repeated(nn.Linear(4, 4), 4, passes=2)
    h = torch.randn(1, 3, 4)
    with torch.no_grad():
        place.passes["gate"].copy_(torch.tensor([[0.5] * 4, [0.0] * 4]))
        first = place.layer(h)
        assert torch.allclose(place(h), first + 0.5 * (place.layer(first) - first))


@pytest.mark.parametrize("arm", ["repeat_static", "repeat_controller", "bases_static"])
def test_a_modulation_scales_what_a_pass_adds_and_not_the_layers_own(arm, profile, base):
    model = built(arm, profile, base)
    stir(model)
    place = repeated(model)
    at_rest = logits(model)

    class Off(nn.Module):  # m = -1: the branch is scaled by 0
        def forward(self, h, t, mask, past):
            return -torch.ones(1, 1, 7, len(place.factors["q_proj_A"][0]) if place.factors else
                               place.layer.self_attn.q_proj.lora_A["default"].weight.shape[0])

    place.modulation = Off()
    off = logits(model)
    assert not torch.allclose(off, at_rest, atol=1e-4)
    with torch.no_grad():  # nor does the own pass change: with closed gates nothing is left of it
        place.passes["gate"].zero_()
        closed = logits(model)
        place.modulation = None
        assert torch.equal(logits(model), closed)


def test_the_full_model_has_nothing_to_teach_itself(profile, base, monkeypatch):
    monkeypatch.setattr(Cost, "base_ranks", property(lambda cost: (32,) * cost.passes))
    model = built("relaxed", profile, base)
    for kind, wanted in (("states", 1.0), ("logits", 0.5)):
        hidden = model(IDS[:, :-2], use_cache=False, output_hidden_states=True).hidden_states[-1]
        loss = Teacher(base, kind, profile.split).loss(model, torch.tensor(1.0), hidden, IDS)
        assert loss.item() == pytest.approx(wanted, abs=1e-4)


def test_what_is_taught_learns_from_the_removed_layers(profile, base):
    model = built("taught", profile, base)
    head = model.get_output_embeddings().weight
    plain, taught = (trainer.training_loss(model, head, IDS, None, "t+1", teacher) for teacher in
                     (None, model.teacher))
    assert taught > plain
    assert not any("teacher" in name for name, _ in model.named_modules())  # nor is it saved with the model
    taught.backward()
    assert repeated(model).passes["gate"].grad.abs().sum() > 0


def test_a_scan_scores_each_layer_kept_and_passed_again(profile, base):
    blocks = IDS.numpy()
    found = dict(scan.scan(base, profile, blocks))
    assert len(found["kept"]) == 6 and len(found["again_1x1_g1"]) == 5 and len(found["again_3x1_g0.3"]) == 3
    cut = build.cut_layers(base, profile.split)

    def loss(model):
        model.config.use_cache = False
        return trainer.training_loss(model, model.get_output_embeddings().weight, IDS, None, "t+1").item()

    assert found["kept"][2] == pytest.approx(loss(cut), abs=1e-5)
    again = build.cut_layers(base, profile.split)
    again.model.layers = nn.ModuleList([again.model.layers[0], *again.model.layers])
    again.config.num_hidden_layers = 6
    assert found["again_1x1_g1"][0] == pytest.approx(loss(again), abs=1e-5)
