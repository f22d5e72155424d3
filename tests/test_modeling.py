"""Invariants of system.md 3 to 6 on a small random base."""

import copy

import pytest
import torch
from models import convert, ids, shake, small_base
from torch import nn
from transformers import Qwen2Config

from ouroboros import OuroborosConfig, OuroborosForCausalLM
from ouroboros.errors import InputError
from ouroboros.experiment.profile import load_profile
from ouroboros.experiment.schema import SplitConfig
from ouroboros.model import modeling
from ouroboros.model.configuration import PROJECTIONS
from ouroboros.model.modulation import emitted
from ouroboros.model.surgery import mean_residual, open_base
from ouroboros.training.build import cut_layers

SPLIT = SplitConfig(prelude=1, recurrent=3, coda=1)


@pytest.mark.parametrize("modulation", ["controller", "static"])
def test_at_initialisation_modulation_changes_no_bit(modulation):
    assert torch.equal(convert(modulation=modulation)(ids()).logits, convert(modulation="none")(ids()).logits)


def test_one_ungated_step_without_norm_is_the_cut_model():
    base = small_base()
    model = convert(base, modulation="none", gate=False, step_norm=False, depth=1)
    assert torch.equal(model(ids()).logits, cut_layers(base, SPLIT)(ids(), use_cache=False).logits)


@pytest.mark.parametrize("alpha", [2.0, 8.0])
def test_modulation_of_r_over_alpha_adds_the_best_approximation_of_the_residual(alpha):
    base = small_base().double()
    model = convert(base, modulation="static", alpha=alpha, rank=4)
    for projection, (name, parent) in zip(model.projections, PROJECTIONS.items(), strict=True):
        x, m = torch.eye(projection.in_features).double(), torch.full((4,), 4 / alpha, dtype=torch.float64)
        with emitted([id(projection)], [m]):
            y = projection(x)
        added = (y - nn.functional.linear(x, projection.weight, projection.bias)).T  # (out, in)
        residual = mean_residual(open_base(base), SPLIT, name, parent).double()
        u, s, vt = torch.linalg.svd(residual)
        torch.testing.assert_close(added, u[:, :4] @ torch.diag(s[:4]) @ vt[:4], rtol=0, atol=1e-10)


def test_the_gate_opens_at_sigmoid_of_minus_two_everywhere():
    gate = convert().recurrence.gate
    new, old = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    opening = torch.sigmoid(torch.tensor(-2.0))
    assert abs(opening.item() - 0.119) < 5e-4
    torch.testing.assert_close(gate(new, old), opening * new + (1 - opening) * old)


def test_the_recurrent_weights_are_one_storage_whatever_the_depth():
    counts = {depth: sum(p.numel() for p in convert(depth=depth, max_steps=64).parameters()) for depth in (1, 4, 16)}
    assert len(set(counts.values())) == 1
    model = convert(depth=16)
    assert len(model.base.model.layers) == 3  # prelude, recurrent once, coda


def test_depth_may_be_given_anew_and_steps_beyond_the_table_read_its_last_entry():
    model = shake(convert(max_steps=2))
    by_depth = [model(ids(), depth=depth).logits for depth in (1, 2, 3)]
    assert not torch.allclose(by_depth[0], by_depth[1]) and not torch.allclose(by_depth[1], by_depth[2])
    with pytest.raises(InputError, match="depth 0"):
        model(ids(), depth=0)


@pytest.mark.parametrize("modulation", ["controller", "static", "none"])
def test_only_the_recurrence_gets_gradients_and_training_leaves_the_rest_bit_identical(modulation):
    model = shake(convert(modulation=modulation)).train()
    frozen = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("recurrence")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(model.recurrence.state_dict())
    for _ in range(3):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == \
        {f"recurrence.{n}" for n, _ in model.recurrence.named_parameters()}
    assert all(torch.equal(model.state_dict()[n], t) for n, t in frozen.items())
    assert all(not torch.equal(model.recurrence.state_dict()[n], t) for n, t in before.items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causal_pooling_is_causal_and_sequence_pooling_leaks(attention):
    changed = ids()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    base = small_base(attention=attention)
    causal = shake(convert(base, pooling="causal"))
    assert torch.equal(causal(ids()).logits[:, :5], causal(changed).logits[:, :5])
    assert not torch.allclose(causal(ids()).logits[:, 5:], causal(changed).logits[:, 5:])
    leaking = shake(convert(base, pooling="sequence"))
    assert (leaking(ids()).logits[:, :5] - leaking(changed).logits[:, :5]).abs().max() > 1e-3


def test_sdpa_and_eager_agree():
    one, other = (shake(convert(small_base(attention=attention)))(ids()).logits for attention in ("sdpa", "eager"))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["causal", "sequence"])
def test_padding_changes_nothing(side, pooling):
    model = shake(convert(pooling=pooling))
    padded, mask = torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 10, dtype=torch.long)
    place = slice(3, 10) if side == "left" else slice(0, 7)
    padded[:, place], mask[:, place] = ids(), 1
    logits = model(padded, attention_mask=mask).logits[:, place]
    torch.testing.assert_close(logits, model(ids()).logits, rtol=1e-5, atol=1e-5)


def test_labels_are_shifted_inside_and_minus_100_is_ignored():
    model, labels = convert(), ids()
    labels[:, -2:] = -100
    logits = model(ids()).logits
    expected = nn.functional.cross_entropy(logits[:, :4].flatten(0, 1), ids()[:, 1:5].flatten())
    torch.testing.assert_close(model(ids(), labels=labels).loss, expected)


def test_a_rank_larger_than_a_projection_is_refused():
    with pytest.raises(InputError, match="rank 9: larger than projection k_proj, which is 8 x 16"):
        convert(rank=9)


@pytest.mark.parametrize("options, complaint", [
    ({"depth": 0}, "depth 0"), ({"modulation": "magic"}, "modulation 'magic'"), ({"pooling": "max"}, "pooling 'max'"),
    ({"rank": 0}, "rank 0"), ({"depth": "3"}, "depth '3'"), ({"alpha": "x"}, "alpha 'x'"),
    ({"dtype": "float7"}, "dtype 'float7'"), ({"rnak": 4}, "option 'rnak' is unknown; one of .*rank"),
])
def test_a_configuration_out_of_range_is_refused_in_one_line(options, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        convert(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("modulation, trainable", [("controller", 9_214_592), ("static", 8_536_064)])
def test_the_papers_shape_has_the_papers_parameters(modulation, trainable):
    """system.md 6."""
    with torch.device("meta"):
        base = Qwen2Config(hidden_size=2048, intermediate_size=11008, num_hidden_layers=17, num_attention_heads=16,
                           num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True)
        model = OuroborosForCausalLM(OuroborosConfig(base=base, modulation=modulation))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.recurrence.named_children()}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(parts.values()) == trainable
    assert parts["gate"] == 8_390_656 and parts["step_norm"] == 131_072
    assert parts["modulation"] == {"controller": 692_864, "static": 14_336}[modulation]


@pytest.mark.parametrize("name", ["tiny", "smollm2", "small", "paper"])
def test_controller_and_static_train_about_equally_many_parameters(name):
    """So that capacity is no confound: at most 1.2 x, 1.08 x in the paper."""
    profile = load_profile(name)
    width = profile.base.model["hidden_size"] if profile.base.model else 2048
    widths = {f"{part}_width": size for part, size in profile.controller}
    counts = {}
    for modulation in ("controller", "static"):
        with torch.device("meta"):
            config = OuroborosConfig(base=Qwen2Config(hidden_size=width), modulation=modulation, rank=profile.rank,
                                     max_steps=profile.max_steps, **widths)
            part = modeling.Recurrence(config)
        counts[modulation] = sum(p.numel() for p in part.parameters())
    assert 1 / 1.2 <= counts["controller"] / counts["static"] <= 1.2


def test_the_vocabulary_can_grow():
    model = convert()
    before = model(ids()).logits
    model.resize_token_embeddings(60)
    assert model.config.vocab_size == model.config.base.vocab_size == 60
    assert torch.equal(model(ids()).logits[..., :50], before) and model(ids() + 50 - 42).logits.shape == (2, 7, 60)


@pytest.mark.parametrize("given, complaint", [
    (dict(depth=0), "depth 0"), (dict(depth="3"), "depth '3'"), (dict(depth=True), "depth True"),
    (dict(attention_mask=torch.ones(2, 1, 7, 7)), r"attention_mask of shape \(2, 1, 7, 7\)"),
    (dict(inputs_embeds=torch.ones(2, 7, 16)), "either input_ids or inputs_embeds"),
])
def test_a_call_that_makes_no_sense_is_refused_in_one_line(given, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        convert()(ids(), **given)
    assert "\n" not in str(error.value)


def test_a_base_that_is_none_is_refused():
    with pytest.raises(InputError, match="checkpoint None: must be a folder"):
        OuroborosForCausalLM.from_base(None)
    with pytest.raises(InputError, match="n_prelude 'a': must be a whole number"):
        OuroborosForCausalLM.from_base(small_base(), "a", 3, 1)
