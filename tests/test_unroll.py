"""What is exactly a plain, deeper model, and what isn't; a forward call that can be exported."""

import pytest
import torch
from models import FAMILIES, OTHERS, convert, ids, refused, shake, small_base
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ouroboros.training import blind  # noqa: F401 (it adds its modulations)

PLAIN = dict(modulation="static", gate=False, step_norm=False, max_steps=2)  # so that the last entry is met twice


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_a_static_table_alone_is_a_deeper_model_of_the_base(family):
    """In float64, where merging rounds nothing that shows."""
    base = small_base(family, None).double()
    model = shake(convert(base, **PLAIN))
    plain = model.unroll()
    assert type(plain) is type(base) and plain.config.num_hidden_layers == len(plain.model.layers) == 5
    torch.testing.assert_close(plain(ids(), use_cache=False).logits, model(ids()).logits, rtol=0, atol=1e-6)


def test_the_deeper_model_saves_loads_and_generates(tmp_path):
    model = shake(convert(small_base("llama"), **PLAIN))
    model.unroll(depth=4).save_pretrained(tmp_path)
    plain, options = AutoModelForCausalLM.from_pretrained(tmp_path), dict(max_new_tokens=6, do_sample=False)
    assert type(plain) is LlamaForCausalLM and len(plain.model.layers) == 6
    torch.testing.assert_close(plain(ids()).logits, model(ids(), depth=4).logits, rtol=0, atol=1e-4)
    assert torch.equal(plain.generate(ids(), **options), model.generate(ids(), depth=4, **options))


def test_the_deeper_model_stops_where_the_loop_does():
    model, options = shake(convert(small_base("llama"), **PLAIN)), dict(max_new_tokens=12, do_sample=False)
    model.generation_config.eos_token_id = [2, int(model.generate(ids(1), **options)[0, 9])]
    model.generation_config.depth = 2
    stopped = model.generate(ids(1), **options)
    assert stopped.shape[1] <= 10 and torch.equal(model.unroll(depth=2).generate(ids(1), **options), stopped)


def test_the_deeper_model_has_weights_of_its_own():
    model = shake(convert(**PLAIN))
    before, plain = model(ids()).logits, model.unroll()
    for parameter in plain.parameters():
        parameter.data.zero_()
    assert torch.equal(model(ids()).logits, before)


@pytest.mark.parametrize("changes, complaint", [
    (dict(modulation="controller"), "no modulation by the state"), (dict(gate=True), "no gate"),
    (dict(step_norm=True), "no step norms"), (dict(modulation="controller_other"), "no modulation by the state"),
])
def test_what_no_weights_do_is_refused(changes, complaint):
    refused(f"unroll: a plain model has {complaint}; convert with", convert(**PLAIN | changes).unroll)


@pytest.mark.parametrize("kind", ["none", "static_wide", "controller_blind"])
def test_other_modulations_that_read_no_state_are_plain_too(kind):
    model = shake(convert(**PLAIN | dict(modulation=kind))).double()
    torch.testing.assert_close(model.unroll()(ids()).logits, model(ids()).logits, rtol=0, atol=1e-6)


def test_adapters_are_merged_first():
    from peft import LoraConfig

    model = convert(**PLAIN)
    model.add_adapter(LoraConfig(target_modules=["up_proj"]))
    refused("unroll: the model has adapters", model.unroll)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_forward_call_is_exported(family):
    model = shake(convert(small_base(family)))
    exported = torch.export.export(model, (ids(),), dict(use_cache=False)).module()
    other = ids(seed=5)
    torch.testing.assert_close(exported(other, use_cache=False).logits, model(other, use_cache=False).logits)
