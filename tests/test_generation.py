"""The key/value cache: what it must not change, and where it is refused."""

import copy

import pytest
import torch
from models import FAMILIES, convert, ids, shake, small_base
from torch import nn
from transformers import DynamicCache

from ouroboros.errors import InputError
from ouroboros.model.modulation import MODULATIONS, pool
from ouroboros.training import blind  # noqa: F401 (it adds its modulations)

CLOSE = dict(rtol=0, atol=1e-5)


def padded(prompts):
    """Left-padded ids and mask of prompts of different lengths."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt):], mask[row, width - len(prompt):] = prompt, 1
    return tokens, mask


def token_by_token(model, tokens, mask, prompt, depth=None):
    """Logits of every position: a prompt at once, then one token a call, through the cache."""
    out = model(tokens[:, :prompt], attention_mask=mask[:, :prompt], depth=depth, use_cache=True)
    logits = [out.logits]
    for t in range(prompt, tokens.shape[1]):
        out = model(tokens[:, t:t + 1], attention_mask=mask[:, :t + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_are_the_uncached_ones_in_every_family(family):
    model, (tokens, mask) = shake(convert(small_base(family))), padded([ids(1, 12)[0], ids(1, 9, seed=4)[0]])
    whole = model(tokens, attention_mask=mask, use_cache=False).logits
    cached = token_by_token(model, tokens, mask, prompt=5)
    torch.testing.assert_close(cached[mask.bool()], whole[mask.bool()], **CLOSE)


@pytest.mark.parametrize("modulation", ["controller", "static", "none"])
@pytest.mark.parametrize("depth", [1, 2, 8, 16])
def test_cached_logits_are_the_uncached_ones_at_every_depth(modulation, depth):
    model, (tokens, mask) = shake(convert(modulation=modulation)), padded([ids(1, 12)[0], ids(1, 7, seed=4)[0]])
    whole = model(tokens, attention_mask=mask, use_cache=False, depth=depth).logits
    cached = token_by_token(model, tokens, mask, prompt=6, depth=depth)
    torch.testing.assert_close(cached[mask.bool()], whole[mask.bool()], **CLOSE)


def test_several_tokens_at_once_continue_a_cache():
    model, tokens = shake(convert()), ids(2, 12)
    out = model(tokens[:, :4])
    rest = model(tokens[:, 4:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(rest, model(tokens, use_cache=False).logits[:, 4:], **CLOSE)


def test_a_slot_a_recurrence_step():
    cache = convert()(ids(), depth=5).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers[:7]] == [7] * 7  # prelude 1, steps 5, coda 1
    assert len(cache.means) == 5 and all(mean.keys.shape == (2, 1, 16) for mean in cache.means)
    keys = [layer.keys for layer in cache.layers[1:6]]
    assert all(not torch.equal(a, b) for a, b in zip(keys, keys[1:], strict=False))


@pytest.mark.parametrize("options", [
    dict(do_sample=False), dict(do_sample=True, top_k=20), dict(do_sample=False, num_beams=3),
    dict(do_sample=True, num_beams=2), dict(do_sample=False, num_beams=3, num_return_sequences=2),
    dict(do_sample=True, num_return_sequences=2),
], ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
@pytest.mark.parametrize("depth", [1, 4])
def test_generate_writes_the_same_text_with_and_without_cache(options, depth):
    model, (tokens, mask) = shake(convert()), padded([ids(1, 8)[0], ids(1, 5, seed=4)[0]])
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        texts.append(model.generate(tokens, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, depth=depth,
                                    **options))
    assert torch.equal(*texts) and texts[0].shape[1] == 18


def test_generation_stops_at_the_end_of_text_and_starts_from_embeddings():
    model, tokens = shake(convert()), ids(1, 6)
    text = model.generate(tokens, max_new_tokens=8, do_sample=False)
    stopped = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=text[0, 8].item())
    assert stopped.shape[1] <= 9 and torch.equal(stopped[0], text[0, :stopped.shape[1]])
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(tokens), max_new_tokens=8, do_sample=False)
    assert torch.equal(embedded, text[:, 6:])


def test_sequence_pooling_generates_without_a_cache_only():
    model = shake(convert(pooling="sequence"))
    with pytest.raises(InputError, match="pooling 'sequence' averages over tokens .*pooling='causal'") as error:
        model.generate(ids(), max_new_tokens=2)
    assert "\n" not in str(error.value)
    assert model.generate(ids(), max_new_tokens=2, use_cache=False).shape == (2, 9)
    assert model(ids()).past_key_values is None  # a plain call makes none by itself
    for drafts in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=small_base())):  # need a cache
        with pytest.raises(InputError, match="use_cache=False and no drafts, or convert with pooling='causal'"):
            model.generate(ids(1, 6), max_new_tokens=2, **drafts)
    static = shake(convert(pooling="sequence", modulation="static"))  # pools nothing
    assert static.generate(ids(), max_new_tokens=2).shape == (2, 9)


def test_a_cache_that_cannot_be_right_is_refused():
    model = convert()
    cache = model(ids()).past_key_values
    with pytest.raises(InputError, match="depth 4: the key/value cache was made at depth 3"):
        model(ids(), past_key_values=cache, depth=4)
    with pytest.raises(InputError, match="a DynamicCache has no slot a recurrence step"):
        model(ids(), past_key_values=DynamicCache())
    with pytest.raises(InputError, match=r"attention_mask of shape \(2, 7\): must be \(2, 14\)"):
        model(ids(), past_key_values=cache, attention_mask=torch.ones(2, 7))


def test_a_cache_that_recorded_its_past_gives_tokens_back_and_another_keeps_them():
    model, tokens = shake(convert()), ids(2, 9)
    whole = model(tokens, use_cache=False).logits
    cache = model(tokens[:, :6]).past_key_values
    with pytest.raises(InputError, match=r"crop\(-2\): .* activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(InputError, match="give minus their number"):
        cache.crop(2)
    with pytest.raises(InputError, match="assistant_early_exit: a loop has no earlier layer"):
        model.generate(tokens, assistant_early_exit=2)
    torch.testing.assert_close(model(tokens[:, 6:], past_key_values=cache).logits, whole[:, 6:], **CLOSE)
    cache = model(tokens[:, :2]).past_key_values
    cache.activate_past_recording()
    for part in (tokens[:, 2:4], tokens[:, 4:7]):
        model(part, past_key_values=cache)
    cache.crop(-4)
    torch.testing.assert_close(model(tokens[:, 3:], past_key_values=cache).logits, whole[:, 3:], **CLOSE)


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_a_cache_that_is_given_is_read(use_cache):
    model, tokens = shake(convert()), ids(2, 9)
    cache = model(tokens[:, :5], use_cache=True).past_key_values
    rest = model(tokens[:, 5:], past_key_values=cache, use_cache=use_cache).logits
    torch.testing.assert_close(rest, model(tokens, use_cache=False).logits[:, 5:], **CLOSE)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@pytest.mark.parametrize("modulation", ["controller", "static", "none"])
def test_drafts_and_chunks_change_no_text(modulation, family):
    """Assisted and prompt-lookup decoding take rejected tokens back; a long prompt may be read in chunks."""
    model, tokens = shake(convert(small_base(family), modulation=modulation)), torch.tensor([[0, *[5, 6, 7] * 3]])
    options = dict(attention_mask=(tokens > 0).long(), max_new_tokens=12, do_sample=False)
    text = model.generate(tokens, **options)
    drafter = shake(convert(small_base(family)))
    for option in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=small_base(family)),
                   dict(assistant_model=drafter), dict(prefill_chunk_size=4)):
        assert torch.equal(model.generate(tokens, **options, **option), text), option


def test_a_model_drafts_for_itself_at_the_depth_of_its_copys_configuration(monkeypatch):
    model, tokens, seen = shake(convert(depth=4)), ids(1, 9), set()
    options = dict(max_new_tokens=8, do_sample=False)
    text, depth_of = model.generate(tokens, **options), type(model)._depth
    draft = copy.copy(model)
    draft.config = copy.copy(model.config)
    draft.config.depth = 1
    monkeypatch.setattr(type(model), "_depth", lambda self, *args: (
        seen.add((self.config.depth, depth_of(self, *args))), depth_of(self, *args))[1])
    assert torch.equal(model.generate(tokens, assistant_model=draft, **options), text)
    assert seen == {(1, 1), (4, 4)}
    assert torch.equal(model.generate(tokens, assistant_model=draft, depth=4, **options), text)
    assert (1, 4) in seen  # a depth given to `generate` is the draft's too


def test_a_chat_goes_on_from_its_cache_at_its_depth():
    model, options = shake(convert()), dict(max_new_tokens=5, do_sample=False)
    said = model.generate(ids(1, 6), depth=4, return_dict_in_generate=True, **options)
    asked = torch.cat([said.sequences, ids(1, 3, seed=9)], dim=1)
    text = model.generate(asked, past_key_values=said.past_key_values, **options)
    assert torch.equal(text, model.generate(asked, depth=4, **options))
    assert not torch.equal(text, model.generate(asked, depth=1, **options))


def test_a_prompts_cache_is_copied_for_each_continuation():
    model, options = shake(convert()), dict(max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        cache = model(ids(1, 6)).past_key_values
    for seed in (7, 8):
        tokens = torch.cat([ids(1, 6), ids(1, 4, seed=seed)], dim=1)
        text = model.generate(tokens, past_key_values=copy.deepcopy(cache), **options)
        assert torch.equal(text, model.generate(tokens, **options))


def test_gradient_checkpointing_keeps_no_cache_and_says_so():
    """transformers' layers would drop it, and the text would be another one."""
    model = shake(convert())
    text = model.generate(ids(), max_new_tokens=5, do_sample=False)
    model.train().activation_checkpointing_enable()
    with pytest.raises(InputError, match="use_cache: layers under gradient checkpointing .* use_cache=False"):
        model.generate(ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids(), max_new_tokens=5, do_sample=False, use_cache=False), text)
    assert torch.equal(model.eval().generate(ids(), max_new_tokens=5, do_sample=False), text)


def test_a_compiled_call_with_positions_and_a_cache():
    """Compiled, transformers numbers the packed documents even where there is one."""
    torch._dynamo.reset()
    model, given = shake(convert(depth=1)), dict(position_ids=torch.arange(7)[None], use_cache=True)
    expected = model(ids(), **given)
    found = torch.compile(model, backend="eager")(ids(), **given)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert found.past_key_values.get_seq_length() == 7


def test_another_kind_of_cache_is_refused():
    model = convert()
    with pytest.raises(InputError, match="cache_implementation 'static': .* leave it out"):
        model.generate(ids(), max_new_tokens=2, cache_implementation="static")
    assert model.generate(ids(), max_new_tokens=2, cache_implementation="dynamic").shape == (2, 9)


def test_training_makes_no_cache():
    model = convert()
    assert model(ids()).past_key_values is not None and model.train()(ids()).past_key_values is None


class Mean(nn.Module):
    """An own modulation that pools, and doesn't say so."""

    def __init__(self, config):
        super().__init__()
        self.pooling, self.out = config.pooling, nn.Linear(config.hidden_size, 7 * config.rank)

    def forward(self, h, t, mask, past=None):
        return self.out(pool(h, mask, self.pooling, past)).unflatten(-1, (7, -1))


@pytest.mark.parametrize("modulation", ["controller_other", "mean"])
def test_whatever_pools_is_cached_right_and_refused_where_it_looks_ahead(modulation, monkeypatch):
    monkeypatch.setitem(MODULATIONS, "mean", Mean)
    model, tokens = shake(convert(modulation=modulation)), ids(2, 12)
    out = model(tokens[:, :4])
    rest = model(tokens[:, 4:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(rest, model(tokens, use_cache=False).logits[:, 4:], **CLOSE)
    with pytest.raises(InputError, match="pooling 'sequence'"):
        convert(modulation=modulation, pooling="sequence")(tokens, use_cache=True)
