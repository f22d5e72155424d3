"""The loop without its head, and what others look up of a model: decoder, configuration, names, repr."""

import copy

import numpy as np
import pytest
import torch
from models import FAMILIES, convert, ids, shake, small_base
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ouroboros import OuroborosConfig, OuroborosForCausalLM, OuroborosModel
from ouroboros.errors import InputError


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_the_loop(family):
    """What TRL and others do with a causal LM: states from its decoder, logits of a few of them from its head."""
    model = shake(convert(small_base(family)))
    decoder = model.get_decoder()
    assert isinstance(decoder, OuroborosModel) and decoder is model.base_model is model.model
    out = decoder(input_ids=ids(), output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1])
    assert torch.equal(model.get_output_embeddings()(out.last_hidden_state), model(ids()).logits)
    assert not torch.allclose(decoder(ids(), depth=1).last_hidden_state, out.last_hidden_state)
    assert decoder.get_decoder() is decoder


def test_the_decoder_has_the_models_own_tensors():
    model = shake(convert())
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in model.get_decoder().named_parameters()] == names  # and the model has each once
    assert len(names) == len(set(names)) and not any(name.startswith("model.") for name in model.state_dict())
    before = model.get_decoder()(ids()).last_hidden_state
    model.recurrence = copy.deepcopy(model.recurrence)  # a module put in another's place, as peft does
    nn.init.normal_(model.recurrence.gate.linear.bias)
    after = model.get_decoder()(ids()).last_hidden_state
    assert not torch.allclose(after, before)
    assert torch.equal(model.get_output_embeddings()(after), model(ids()).logits)


def test_hooks_on_the_decoder_see_the_models_calls_and_not_the_other_way_round():
    model, calls = shake(convert()), []
    model.get_decoder().register_forward_hook(lambda module, inputs, out: calls.append(type(out).__name__))
    model.register_forward_hook(lambda module, inputs, out: calls.append(type(out).__name__))
    model(ids())
    assert calls == ["BaseModelOutputWithPast", "CausalLMOutputWithPast"]
    model.get_decoder()(ids())
    assert calls[2:] == ["BaseModelOutputWithPast"]


def test_a_copys_decoder_is_the_copys():
    model = shake(convert())
    other = copy.deepcopy(model)
    nn.init.normal_(other.recurrence.gate.linear.bias)
    states = other.get_decoder()(ids()).last_hidden_state
    assert torch.equal(other.get_output_embeddings()(states), other(ids()).logits)
    assert not torch.allclose(other(ids()).logits, model(ids()).logits)


def test_the_backbone_loads_what_the_causal_model_saved_and_back(tmp_path):
    model = shake(convert())
    model.save_pretrained(tmp_path / "model", self_contained=True)
    backbone = AutoModel.from_pretrained(tmp_path / "model")
    assert type(backbone) is OuroborosModel
    assert torch.equal(backbone(ids()).last_hidden_state, model.model(ids()).last_hidden_state)
    backbone.save_pretrained(tmp_path / "backbone", self_contained=True)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("given, complaint", [
    (dict(attenton_mask=None), "forward: 'attenton_mask' is unknown"), (dict(token_type_ids=ids()), "'token_type_ids'"),
    (dict(output_attentions=True), "output_attentions: .* forward hook"),
])
def test_a_keyword_that_would_be_ignored_is_refused(given, complaint):
    model = convert()
    for called in (model, model.model):
        with pytest.raises(InputError, match=complaint):
            called(ids(), **given)


def test_attention_asked_for_by_the_configuration_is_refused():
    model = convert(small_base(attention="eager"))
    model.config.output_attentions = True
    with pytest.raises(InputError, match="output_attentions: .* forward hook"):
        model(ids())


def test_keywords_that_transformers_passes_are_taken():
    model = convert()
    expected = model(ids()).logits
    given = dict(output_attentions=False, cache_position=torch.arange(7), num_items_in_batch=3)
    assert torch.equal(model(ids(), **given).logits, expected)
    whole, part = model(ids(), labels=ids()).loss, model(ids(), labels=ids(), num_items_in_batch=torch.tensor(24)).loss
    torch.testing.assert_close(part * 24, whole * 12)
    shifted = model(ids(), labels=ids(), shift_labels=ids()).loss
    torch.testing.assert_close(shifted, nn.functional.cross_entropy(expected.flatten(0, 1), ids().flatten()))


def test_a_depth_counts_wherever_it_is_given():
    model, options = shake(convert()), dict(max_new_tokens=6, do_sample=False)
    texts = {depth: model.generate(ids(), depth=depth, **options).tolist() for depth in (1, 2, 3, 5)}
    assert len(set(map(str, texts.values()))) == 4 and model.generate(ids(), **options).tolist() == texts[3]
    settings = GenerationConfig(depth=2, **options)
    assert model.generate(ids(), generation_config=settings).tolist() == texts[2]
    assert model.generate(ids(), generation_config=settings, depth=5).tolist() == texts[5]
    model.generation_config.depth = 1
    assert model.generate(ids(), **options).tolist() == texts[1]
    with pytest.raises(InputError, match="depth 0"):
        model.generate(ids(), generation_config=GenerationConfig(depth=0))


def test_integers_may_be_numpys(tmp_path):
    model = shake(convert(depth=np.int64(2), rank=np.int32(4)))
    assert torch.equal(model(ids(), depth=np.int64(2)).logits, model(ids()).logits)
    model.save_pretrained(tmp_path, self_contained=True)
    assert OuroborosConfig.from_pretrained(tmp_path).depth == 2
    for wrong in (np.bool_(True), np.float64(2), np.int64(0)):
        with pytest.raises(InputError, match="depth "):
            model(ids(), depth=wrong)


def test_the_configuration_says_what_others_ask(tmp_path):
    model = convert(small_base("qwen3"), depth=4)
    config = model.config
    assert config.num_hidden_layers == 6 and len(DynamicCache(config=config).layers) == 6  # prelude 1, steps 4, coda 1
    assert len(model(ids()).past_key_values.layers) == 6 + 4  # and a running mean a step
    for name in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
        assert getattr(config, name) == config.to_dict()[name] == getattr(config.base, name)
    config.depth = 2
    assert config.num_hidden_layers == 4
    config.save_pretrained(tmp_path)
    assert OuroborosConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_continuous_batching_is_refused():
    with pytest.raises(InputError, match="continuous batching: .* call generate"):
        convert().generate_batch([[3, 4], [5]])


def test_the_classes_are_registered():
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ouroboros"] == OuroborosForCausalLM.__name__
    assert AutoModel._model_mapping[OuroborosConfig] is OuroborosModel


def test_a_shallow_copy_with_modules_of_its_own_has_a_decoder_of_its_own():
    """As a replica of DataParallel is made."""
    model = shake(convert())
    replica = model._replicate_for_data_parallel()
    replica._modules = dict(model._modules, recurrence=copy.deepcopy(model.recurrence))
    nn.init.normal_(replica.recurrence.gate.linear.bias)
    states = replica.get_decoder()(ids()).last_hidden_state
    assert torch.equal(replica.get_output_embeddings()(states), replica(ids()).logits)
    assert not torch.allclose(states, model.get_decoder()(ids()).last_hidden_state)
