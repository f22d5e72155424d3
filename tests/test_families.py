"""Each family's loop against the family's own model, as transformers runs it with its own configuration."""

import pytest
import torch
from models import FAMILIES, OTHERS, SHAPE, convert, ids, shake, small_base
from transformers import LlamaConfig, LlamaForCausalLM

from ouroboros import OuroborosForCausalLM
from ouroboros.model import configuration
from ouroboros.model.configuration import FUSED, weights_of
from ouroboros.model.modulation import places_in

REMOVED = (1, 2, 4)  # by the split of `convert`
KEPT = dict(modulation="none", gate=False, step_norm=False, depth=1)


def without(base, layers=REMOVED):
    """The base itself, nothing of it rebuilt, with these layers passing on what they get."""
    for index in layers:
        base.model.layers[index].forward = lambda h, *args, **kwargs: h
    return base


CASES = [(family, attention) for family in (*FAMILIES, *OTHERS) for attention in ("eager", "sdpa")
         if (family, attention) != ("gemma2", "sdpa")]  # transformers refuses it for Gemma 2


def test_every_family_is_compared():
    assert {small_base(family).config.model_type for family in FAMILIES} | set(OTHERS) == set(configuration.FAMILIES)


@pytest.mark.parametrize("family, attention", CASES)
def test_one_plain_step_is_the_bases_own_cut(family, attention):
    base = small_base(family, attention)
    model, whole = convert(base, **KEPT), base(ids(), use_cache=False).logits
    expected = without(base)(ids(), use_cache=False).logits
    assert (whole - expected).abs().max() > 1e-2  # the removed layers do something
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(ids(), logits_to_keep=2).logits, expected[:, -2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_each_projection_has_its_own_diagonal(family):
    model = convert(small_base(family, None))
    places = [id(weight) for weight, rows in zip(model.projections, weights_of(model.config.base).values(), strict=True)
              for _ in rows]
    assert places == places_in(model.recurrent_layer, weights_of(model.config.base))


def test_fused_projections_are_modulated_as_if_they_stood_alone(tmp_path):
    """A Phi-3 and a Llama of the same weights, converted, with one recurrence."""
    fused = small_base("phi3", sliding_window=None, rms_norm_eps=1e-6)
    options = dict(tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
    config = LlamaConfig(**SHAPE | options, rms_norm_eps=1e-6, rope_theta=10000.0)
    alone, state = LlamaForCausalLM(config).eval(), {}
    for name, tensor in fused.state_dict().items():
        held = next((which for which in FUSED if which in name), None)
        rows = {"qkv_proj": [16, 8, 8], "gate_up_proj": [24, 24]}.get(held)
        state |= {name.replace(held, part): piece for part, piece in zip(FUSED[held], tensor.split(rows), strict=True)
                  } if held else {name: tensor}
    alone.load_state_dict(state)
    torch.testing.assert_close(fused(ids()).logits, alone(ids()).logits)
    one, other = shake(convert(fused)), shake(convert(alone))
    assert one.num_parameters(only_trainable=True) == other.num_parameters(only_trainable=True)
    assert (convert(fused)(ids()).logits - one(ids()).logits).abs().max() > 1e-2  # the modulation does something
    torch.testing.assert_close(one(ids()).logits, other(ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_it_saves_loads_and_generates(family, tmp_path):
    small_base(family, None).save_pretrained(tmp_path / "base")
    model = shake(convert(tmp_path / "base"))
    model.save_pretrained(tmp_path / "model")
    loaded = OuroborosForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    options = dict(max_new_tokens=6, do_sample=False)  # past a window of 4
    assert torch.equal(loaded.generate(ids(), **options), model.generate(ids(), use_cache=False, **options))
