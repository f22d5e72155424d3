"""The arms' models: what they start as, what they share with the base, what they train."""

import numpy as np
import pytest
import torch
from conftest import profile_data
from transformers import Qwen2Config, Qwen2ForCausalLM

from ouroboros.errors import InputError
from ouroboros.experiment.arms import ARMS, PAYS
from ouroboros.experiment.cost import Cost
from ouroboros.experiment.plan import RunSpec
from ouroboros.experiment.profile import parse_profile
from ouroboros.experiment.schema import SplitConfig
from ouroboros.log import read_run
from ouroboros.training import build, trainer
from ouroboros.training.build import cut_layers
from ouroboros.training.corpus import LOOK_AHEAD, prepare
from ouroboros.training.ngram import Counts
from ouroboros.training.run import execute

IDS = torch.arange(40).view(2, 20)
ADAPTED = [name for name, arm in ARMS.items() if name not in PAYS and (arm.lora == "kept" or arm.middle == "maps")]


@pytest.fixture
def base(profile):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**profile.base.model)).eval()


def built(arm: str, profile, base, depth: int = 2):
    rank = profile.rank_of(arm)
    return build.build(RunSpec(arm, depth if ARMS[arm].loops else None, rank, "corrected", 0), profile, base).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def stir(model) -> None:
    """Move everything that is trained, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_what_is_captured_of_the_cut_model_stays_its_own(profile, base):
    """Its layers share weights with the base, not the hooks by which transformers collects states."""
    cut = cut_layers(base, profile.split)
    for model, layers in ((cut, 3), (base, 6), (cut, 3)):
        assert len(model(IDS, output_hidden_states=True).hidden_states) == layers + 1


@pytest.mark.parametrize("arm", [*ADAPTED, "cut_coda_lora"])
def test_without_a_loop_an_arm_starts_as_its_kept_layers_and_leaves_the_base_alone(arm, profile, base):
    kept, whole = cut_layers(base, profile.split, ARMS[arm].more), logits(base)
    kept = base if ARMS[arm].middle == "all" else kept
    model, weights = built(arm, profile, base), {name: p.clone() for name, p in base.named_parameters()}
    assert torch.equal(logits(model), logits(kept))
    stir(model)
    assert not torch.allclose(logits(model), logits(kept), atol=1e-3)
    assert torch.equal(logits(base), whole)
    assert {name: True for name in weights} == {name: torch.equal(p, weights[name])
                                                for name, p in base.named_parameters()}


def test_one_more_layer_is_the_one_after_the_recurrent_one(profile, base):
    """Split 1/3/1 of six layers: 0, 3, 4, 5."""
    model = built("lora_layer", profile, base)
    assert [layer.mlp.up_proj.base_layer.weight.data_ptr() for layer in model.model.layers] == [
        base.model.layers[i].mlp.up_proj.weight.data_ptr() for i in (0, 3, 4, 5)]
    with pytest.raises(InputError, match="split 1/4/1.*fewer than 1 removed layers follow"):
        cut_layers(base, SplitConfig(prelude=1, recurrent=4, coda=1), more=1)


@pytest.mark.parametrize("arm", ("lora", "lora_layer", "full_lora"))
@pytest.mark.parametrize("width", (16, 48, 128))
def test_lora_trains_what_the_controllers_arm_trains(text, arm, width):
    data = profile_data(text)
    data["base"]["model"] |= {"hidden_size": width, "intermediate_size": 3 * width}
    profile = parse_profile(data, "t")
    lora, controller = (Cost.of(profile, name) for name in (arm, "controller"))
    unit = lora._ends
    assert abs(sum(lora.trainable().values()) - sum(controller.trainable().values())) <= unit / 2
    assert max(lora.lora_ranks) - min(lora.lora_ranks) <= 1


def test_with_its_coda_trained_a_loop_starts_as_with_a_frozen_one_and_trains_nothing_else(profile, base):
    plain, model = built("controller", profile, base), built("controller_coda_lora", profile, base)
    assert torch.equal(logits(model), logits(plain))
    beyond = trained(model) - trained(plain)
    assert trained(plain) <= trained(model) and beyond
    assert all(name.startswith("base.model.layers.2.") for name in beyond)  # one prelude layer, the recurrent one
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_of_the_cut_model_too_the_coda_alone_is_trained(profile, base):
    names = trained(built("cut_coda_lora", profile, base))
    assert names and all(name.startswith("model.layers.2.") for name in names)


def test_what_is_trained_is_float32_on_a_base_in_half_precision(profile, base):
    base = base.to(torch.bfloat16)
    for arm in ("controller_coda_lora", "cut_coda_lora", "lora", "linear"):
        model = built(arm, profile, base)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, arm
        model(IDS, use_cache=False).logits.float().mean().backward()


@pytest.mark.parametrize("arm", ("static_wide", "controller_blind"))
def test_a_blind_arm_sees_nothing_and_has_the_controllers_parameters(arm, profile, base):
    model = built(arm, profile, base)
    stir(model)
    modulation = model.recurrence.modulation
    states = [modulation(torch.randn(2, 20, 16), 1, None) for _ in range(2)]
    assert torch.equal(*states) and states[0].shape == (1, 1, 7, profile.rank)
    assert not torch.equal(modulation(torch.zeros(1, 1, 16), 0, None), states[0])  # a step of its own
    count, wanted = (sum(p.numel() for p in m.parameters())
                     for m in (modulation, built("controller", profile, base).recurrence.modulation))
    assert abs(count - wanted) <= (profile.max_steps + 7 * profile.rank) / 2


def test_another_sequences_state_is_what_the_other_controller_reads(profile, base):
    model = built("controller_other", profile, base)
    stir(model)
    modulation, plain = model.recurrence.modulation, built("controller", profile, base).recurrence.modulation
    plain.load_state_dict(modulation.state_dict())
    h = torch.randn(3, 20, 16)
    assert torch.equal(modulation(h, 1, None), plain(h[[2, 0, 1]], 1, None))
    mask = torch.ones(3, 20)
    mask[1, 5:] = 0
    assert torch.equal(modulation(h, 1, mask), plain(h[[2, 0, 1]], 1, mask[[2, 0, 1]]))


def test_the_fitted_maps_leave_no_error_that_a_linear_map_could_take_away(profile, base):
    torch.manual_seed(1)
    for layer in base.model.layers:  # a random base's layers hardly move the state
        layer.self_attn.o_proj.weight.data.mul_(30)
    model = built("linear_fit", profile, base)
    blocks = [np.random.default_rng(i).integers(0, 300, (4, 34)) for i in range(3)]
    build.fit_maps(model, base, profile.split, blocks)
    ids = torch.from_numpy(np.concatenate(blocks))[:, :-2]
    with torch.no_grad():
        states = base.model(ids, output_hidden_states=True).hidden_states
    mapped = model.model.layers[1]
    for linear, start, end in ((mapped.before, 1, 3), (mapped.after, 4, 5)):
        x, wanted = states[start].flatten(0, 1), (states[end] - states[start]).flatten(0, 1)
        error = wanted - linear(x)
        assert error.square().mean() < 0.98 * wanted.square().mean()
        ones = torch.cat([x, torch.ones(len(x), 1)], 1)
        assert (ones.T @ error).abs().max() < 1e-3 * (ones.T @ wanted).abs().max()


@pytest.mark.parametrize("arm", [*ADAPTED, "controller_coda_lora", "static_wide", "controller_blind"])
def test_every_arm_makes_a_run(arm, profile, root):
    spec = next(spec for spec in profile.runs() if spec.arm == arm and spec.purpose == "matrix")
    run = read_run(execute(profile, spec.id, root, progress=False))
    assert run.manifest["status"] == "finished"
    assert run.manifest["trainable_parts"] == Cost.of(profile, arm).trainable()
    assert (run.manifest["rate"] is None) == (ARMS[arm].fit != "gradient")
    assert max(run.last(*name) for name in run.series if name[1].startswith("moved/")) > 0.9
    assert run.series["heldout", "loss_t+1"].updates == [profile.training.updates]


def test_pairs_are_counted_in_what_a_run_trains_on_or_in_the_whole_split(profile, root, monkeypatch):
    counted, corpus, count = [], prepare(profile, root), Counts.__init__

    def recorded(self, text, *args, **kwargs):
        counted.append(text)
        count(self, text, *args, **kwargs)

    monkeypatch.setattr(Counts, "__init__", recorded)
    names = ("bigram_seen-corrected-s0", "bigram_seen-corrected-s1", "bigram-any-s0")
    seen, other, whole = (read_run(execute(profile, name, root, progress=False)) for name in names)
    blocks = trainer.training_blocks(RunSpec("controller", 2, 4, "corrected", 0), profile, corpus)
    assert counted[0].tolist() == blocks[:, :-LOOK_AHEAD].flatten().tolist() != counted[1].tolist()
    assert len(counted[2]) == sum(corpus.lengths("train") + 1) > len(counted[0]) == len(counted[1])
    assert whole.last("heldout", "loss_t+1") < min(run.last("heldout", "loss_t+1") for run in (seen, other))
    assert seen.manifest["trainable"] == 0 and seen.manifest["flops"] is None and not seen.manifest["hashes"]["trained"]


def test_a_controller_that_reads_others_is_batched_with_distant_blocks(profile, root):
    """Training text and scored text: the same blocks, no two neighbours in a batch."""
    corpus = prepare(profile, root)
    plain, other = (trainer.training_blocks(RunSpec(arm, 2, 4, "corrected", 0), profile, corpus)
                    for arm in ("controller", "controller_other"))
    assert sorted(map(tuple, plain)) == sorted(map(tuple, other))
    place = {tuple(block): index for index, block in enumerate(plain)}
    pairs = other.reshape(-1, 2, other.shape[1])
    assert all(abs(place[tuple(a)] - place[tuple(b)]) == len(plain) // 2 for a, b in pairs)


def test_what_moves_is_asked_of_the_steps_that_ran(profile, root):
    run = read_run(execute(profile, "static-d2-r4-corrected-s0", root, progress=False))
    assert run.last("model", "moved/recurrence.modulation.table") == 1  # the other six of eight rows stay zero
