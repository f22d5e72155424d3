"""Uses that once went wrong without a word: each is right, or refused in one line."""

import copy
import inspect

import pytest
import torch
from accelerate import load_checkpoint_in_model
from accelerate.hooks import ModelHook, add_hook_to_module
from models import convert, ids, refused, shake, small_base
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, Trainer, TrainingArguments

from ouroboros import OuroborosForCausalLM
from ouroboros.errors import InputError


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text", "granite", "cohere", "cohere2"])
def test_logits_can_be_made_of_states_and_the_configuration(family):
    """As TRL makes them: multipliers and caps are read off the configuration."""
    model = shake(convert(small_base(family, "eager")))
    states, config = model.get_decoder()(ids()).last_hidden_state, model.config.get_text_config()
    logits = model.get_output_embeddings()(states) * getattr(config, "logit_scale", 1) \
        / getattr(config, "logits_scaling", 1)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, model(ids()).logits)


def longrope():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 2, "long_factor": [3.0] * 2}
    return Phi3ForCausalLM(Phi3Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        original_max_position_embeddings=10, max_position_embeddings=40, rope_parameters=rope)).eval()


def test_a_base_with_two_ranges_of_positions_begins_its_cache_anew_in_the_second():
    model = shake(convert(longrope()))
    cached, alone = (model.generate(ids(1, 7), max_new_tokens=8, do_sample=False, use_cache=use_cache,
                                    output_logits=True, return_dict_in_generate=True) for use_cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(alone.logits))


@pytest.mark.parametrize("modulation", ["controller", "static"])
@pytest.mark.parametrize("own", [True, False])
def test_drafts_are_refused_where_they_would_reach_the_second_range(own, modulation):
    """Where they don't reach it they write the plain text."""
    model = shake(convert(longrope(), modulation=modulation))
    draft = copy.copy(model)
    draft.config = copy.copy(model.config)
    draft.config.depth = 1
    how = {"assistant_model": draft} if own else {"prompt_lookup_num_tokens": 3}
    told = set()
    for seed in range(30):
        torch.manual_seed(seed)
        prompt, length = torch.randint(50, (1, 3)).repeat(1, 2), 8 + seed % 6
        plain = model.generate(prompt, max_length=length, do_sample=False)
        try:
            assert torch.equal(model.generate(prompt, max_length=length, do_sample=False, **how), plain)
        except InputError as error:
            assert length > 8 and "drafts, crop: at these positions" in str(error)
            told.add(length)
        else:
            assert length < 12
    assert {12, 13} <= told


@pytest.mark.parametrize("config", [
    TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
    LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)],
    ids=["tokens", "lora and tokens", "embeddings"])
def test_what_peft_trains_of_tied_embeddings_is_the_heads_too(config, tmp_path):
    adapted = get_peft_model(shake(convert()), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    expected = adapted(ids().clamp(max=5)).logits
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(shake(convert()), str(tmp_path))
    torch.testing.assert_close(loaded(ids().clamp(max=5)).logits, expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids().clamp(max=5)).logits, expected)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


def test_a_cache_of_another_depth_keeps_it_where_the_base_begins_a_new_one():
    model = shake(convert(longrope()))
    cache, prompt = model(ids(1, 7), depth=1, use_cache=True).past_key_values, torch.cat([ids(1, 7), ids(1, 1, 9)], 1)
    options = dict(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    went_on = model.generate(prompt, past_key_values=cache, **options)
    alone = model.generate(prompt, depth=1, use_cache=False, **options)
    torch.testing.assert_close(torch.stack(went_on.logits), torch.stack(alone.logits))


def test_a_cache_without_means_is_refused_by_a_model_that_pools():
    cache = convert(modulation="static")(ids(), use_cache=True).past_key_values
    refused("no means for the pool", convert(), ids(), past_key_values=cache)


def test_guidance_at_another_depth_is_refused_and_at_the_configurations_is_right():
    model, options = shake(convert(depth=3)), dict(max_new_tokens=4, do_sample=False, guidance_scale=3.0)
    refused("guidance_scale: .* set config.depth", model.generate, ids(1), depth=1, **options)
    cache = model(ids(1)[:, :-1], depth=1, use_cache=True).past_key_values
    refused("guidance_scale: .* set config.depth", model.generate, ids(1), past_key_values=cache, **options)
    text = model.generate(ids(1), depth=3, **options)
    other = copy.deepcopy(model)
    other.config.depth = 1
    assert not torch.equal(other.generate(ids(1), **options), text)


def test_a_depth_in_the_generation_configuration_is_saved(tmp_path):
    model, options = shake(convert()), dict(max_new_tokens=6, do_sample=False)
    model.generation_config.depth = 1
    model.save_pretrained(tmp_path, self_contained=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.depth == 1
    assert torch.equal(loaded.generate(ids(), **options), model.generate(ids(), depth=1, **options))


@pytest.mark.parametrize("pooling", ["causal", "sequence"])
def test_a_mask_is_read_as_true_or_false(pooling):
    model, mask = shake(convert(pooling=pooling)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(ids(), attention_mask=mask).logits[mask.bool()]
    for other in (3 * mask, mask.bool(), 0.5 * mask):
        torch.testing.assert_close(model(ids(), attention_mask=other).logits[mask.bool()], expected)


def test_a_shallow_copys_decoder_keeps_the_copys_depth():
    model = shake(convert(depth=3))
    draft = copy.copy(model)
    draft.config = copy.deepcopy(model.config)
    draft.config.depth = 1
    kept, of_draft = model.get_decoder(), draft.get_decoder()
    assert torch.equal(kept(ids()).last_hidden_state, kept(ids(), depth=3).last_hidden_state)
    assert torch.equal(of_draft(ids()).last_hidden_state, kept(ids(), depth=1).last_hidden_state)


def test_hooks_on_the_decoder_go_into_copies():
    model = shake(convert())
    model.model.register_forward_hook(lambda module, inputs, out: type(out)(0 * out.last_hidden_state))
    for copied in (model, copy.copy(model), copy.deepcopy(model)):
        assert not copied(ids()).logits.any()


@pytest.mark.parametrize("family, field, value", [
    ("gemma2", "final_logit_softcapping", None), ("granite", "logits_scaling", 1.0)])
def test_what_is_set_in_the_configuration_is_computed_with(family, field, value):
    model = shake(convert(small_base(family, "eager")))
    before = model(ids()).logits
    setattr(model.config, field, value)
    assert getattr(model.config.base, field) == value and not torch.allclose(model(ids()).logits, before)


def test_a_whole_state_of_another_base_is_taken():
    model, other = shake(convert()), convert()
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            if "layers" in name:  # a fine-tuned base's, whose embeddings are the same
                tensor.add_(0.3 * torch.randn_like(tensor))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(ids()).logits, other(ids()).logits)
    wrapped = nn.ModuleDict({"inner": model})
    trained = {f"inner.{k}": v for k, v in convert().state_dict().items() if not k.startswith("base") or k[-2:] == ".A"}
    refused("another base", wrapped.load_state_dict, trained, strict=False)


@pytest.mark.parametrize("modulation", ["controller", "none"])
@pytest.mark.parametrize("part", ["model", "model.layers.5", "model.norm"])
def test_a_run_is_not_resumed_on_another_base(part, modulation, tmp_path):
    """However little of it is another: what has no bases, or the same ones, is known by the hash of its kept layers."""
    def trainer(base):
        model = OuroborosForCausalLM.from_base(tmp_path / base, 1, 3, 1, rank=4, depth=2, modulation=modulation)
        data = [{"input_ids": row, "labels": row} for row in ids(4, 5)]
        options = TrainingArguments(str(tmp_path / "out"), max_steps=2, save_steps=1, report_to=[], use_cpu=True,
                                    save_strategy="steps", disable_tqdm=True)
        return Trainer(model, options, train_dataset=data)

    base = small_base()
    base.save_pretrained(tmp_path / "one")
    for parameter in base.get_submodule(part).parameters():
        nn.init.normal_(parameter, std=0.2)
    base.save_pretrained(tmp_path / "other")
    trainer("one").train()
    last = tmp_path / "out" / "checkpoint-1"
    trainer("one").train(resume_from_checkpoint=str(last))
    refused("another base", trainer("other").train, resume_from_checkpoint=str(last))


def test_a_state_is_put_on_its_base_in_half_precision(tmp_path):
    small_base().save_pretrained(tmp_path / "base")
    model = shake(OuroborosForCausalLM.from_base(tmp_path / "base", 1, 3, 1, rank=4))
    model.save_pretrained(tmp_path / "model")
    half = OuroborosForCausalLM.from_base(tmp_path / "base", 1, 3, 1, rank=4, dtype="bfloat16")
    left = half.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=False)
    assert not left.unexpected_keys
    torch.testing.assert_close(half.recurrence.gate.linear.bias, model.recurrence.gate.linear.bias)


def test_an_own_loss_counts():
    model = convert()
    model.loss_function = lambda logits, labels, vocab_size, **options: logits.sum() * 0 + vocab_size
    assert model(ids(), labels=ids()).loss == 50


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2"])
def test_a_grown_vocabulary_has_a_loss(family):
    model = shake(convert(small_base(family, "eager")))
    model.resize_token_embeddings(60)
    out = model(ids() + 10, labels=ids() + 10)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), (ids() + 10)[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("part", ["base", "base.model"])
def test_hooks_on_the_base_see_each_call(part):
    """With the keywords that the plain base gives them."""
    model, seen = shake(convert()), []
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    masked = model(ids(), attention_mask=mask).logits[mask.bool()]

    def puts_a_mask(module, inputs, keywords):
        assert not inputs and "input_ids" in keywords
        return inputs, keywords | {"attention_mask": mask}

    with model.get_submodule(part).register_forward_pre_hook(puts_a_mask, with_kwargs=True):
        if part == "base":  # before the loop: its pool has the mask too
            torch.testing.assert_close(model(ids()).logits[mask.bool()], masked)
        model(ids())
    expected = model(ids()).logits
    model.get_submodule(part).register_forward_hook(lambda module, inputs, out: seen.append(type(out).__name__))
    model.get_submodule(part).compile()  # compiles the plain base, which the loop never runs
    assert torch.equal(model(ids()).logits, expected) and len(seen) == 1


@pytest.mark.parametrize("part", ["base", "base.model"])
def test_what_a_hook_sets_on_a_part_of_the_base_stays(part):
    """Also where it stops the pass."""
    model = shake(convert())
    own = model.get_submodule(part)
    own.calls = 0
    there = set(vars(own))

    def counts(module, inputs, out):
        module.calls += 1
        module.seen = out

    own.register_forward_hook(counts)
    model(ids())
    logits = model(ids()).logits
    assert own.calls == 2 and set(vars(own)) == there | {"seen"}
    assert torch.equal(own.seen.logits if part == "base" else model.base.lm_head(own.seen.last_hidden_state), logits)

    def stops(module, inputs, out):
        module.last = 7
        raise KeyboardInterrupt

    own.register_forward_hook(stops)
    with pytest.raises(KeyboardInterrupt):
        model(ids())
    assert own.last == 7


@pytest.mark.parametrize("part", ["base", "base.model"])
def test_another_forward_of_the_base_is_refused_and_hooks_of_accelerate_run(part):
    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = shake(convert()), Counts()
    expected = model(ids()).logits
    add_hook_to_module(model.get_submodule(part), hook)
    assert torch.equal(model(ids()).logits, expected) and hook.calls == 1
    model.get_submodule(part).forward = lambda *args, **kwargs: None
    refused("another forward", model, ids())


def test_a_compiled_module_in_place_of_the_bases_decoder_is_refused():
    model = convert()
    model.base.model = torch.compile(model.base.model)
    refused("another forward", model, ids())


def test_a_model_may_be_compiled_before_its_first_call():
    model = shake(convert())
    expected = model(ids()).logits
    other = shake(convert())
    other.compile(backend="eager")
    torch.testing.assert_close(other(ids()).logits, expected)
    assert other.get_decoder()(ids()).last_hidden_state.shape == (2, 7, 16)


def test_generate_where_accelerate_has_taken_the_wrappers_of_forward():
    model, options = shake(convert()), dict(max_new_tokens=4, do_sample=False)
    expected = model.generate(ids(), **options)
    model.forward = inspect.unwrap(type(model).forward).__get__(model)
    assert torch.equal(model.generate(ids(), **options), expected)


def test_lengths_of_documents_without_their_positions_are_refused():
    model, starts = shake(convert()), torch.tensor([0, 3, 7], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=4, max_length_k=4)
    refused("'cu_seq_lens_k' .* without position_ids", model, ids(1), **lengths)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    assert torch.equal(model(ids(1), position_ids=positions, **lengths).logits,
                       model(ids(1), position_ids=positions).logits)


def test_flops_of_the_low_rank_branch_are_counted():
    def flops(modulation):
        with FlopCounterMode(display=False) as counter:
            convert(modulation=modulation)(ids(), use_cache=False)
        return counter.get_total_flops()

    # down, 16 to 4 or 24 to 4, and up again: 2 flops x 14 tokens x 3 steps x rank 4 x (in + out)
    per_token = 2 * 3 * 4 * ((16 + 16) + 2 * (16 + 8) + (16 + 16) + 3 * (16 + 24))
    assert flops("static") - flops("none") == 14 * per_token


def test_several_sets_of_trained_weights_are_run_at_once():
    model = shake(convert(small_base(attention="eager")))
    values = {f"recurrence.{name}": torch.stack([p, 0.5 * p]) for name, p in model.recurrence.named_parameters()}
    tokens = ids()
    found = torch.func.vmap(lambda given: torch.func.functional_call(model, given, (tokens,)).logits)(values)
    torch.testing.assert_close(found[0], model(tokens).logits)
    assert not torch.allclose(found[1], found[0])


def test_weights_of_a_reference_are_not_put_on_a_base_that_was_never_read(tmp_path):
    small_base().save_pretrained(tmp_path / "base")
    model = OuroborosForCausalLM.from_base(tmp_path / "base", 1, 3, 1, rank=4)
    model.save_pretrained(tmp_path / "model", self_contained=False)
    empty = AutoModelForCausalLM.from_config(model.config)
    refused("another base", load_checkpoint_in_model, empty, str(tmp_path / "model"))
    load_checkpoint_in_model(model, str(tmp_path / "model"))
