"""Each family's loop against the family's own model, as transformers runs it with its own configuration."""

import pytest
import torch
from models import FAMILIES, OTHERS, convert, ids, shake, small_base

from ouroboros import OuroborosForCausalLM
from ouroboros.model import configuration
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
    assert [id(projection) for projection in model.projections] == places_in(model.recurrent_layer)


@pytest.mark.parametrize("family", OTHERS)
def test_it_saves_loads_and_generates(family, tmp_path):
    small_base(family, None).save_pretrained(tmp_path / "base")
    model = shake(convert(tmp_path / "base"))
    model.save_pretrained(tmp_path / "model")
    loaded = OuroborosForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    options = dict(max_new_tokens=6, do_sample=False)  # past a window of 4
    assert torch.equal(loaded.generate(ids(), **options), model.generate(ids(), use_cache=False, **options))
