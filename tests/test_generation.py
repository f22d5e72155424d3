"""The key/value cache: what it must not change, and where it is refused."""

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
    static = shake(convert(pooling="sequence", modulation="static"))  # pools nothing
    assert static.generate(ids(), max_new_tokens=2).shape == (2, 9)


def test_a_cache_that_cannot_be_right_is_refused():
    model = convert()
    cache = model(ids()).past_key_values
    with pytest.raises(InputError, match="depth 4: the key/value cache was made at depth 3"):
        model(ids(), past_key_values=cache, depth=4)
    with pytest.raises(InputError, match="a DynamicCache has no slot a recurrence step"):
        model(ids(), past_key_values=DynamicCache())
    with pytest.raises(InputError, match=r"attention_mask of shape \(2, 7\): must be .*, here \(2, 14\)"):
        model(ids(), past_key_values=cache, attention_mask=torch.ones(2, 7))
    with pytest.raises(InputError, match="no token can be taken back"):
        cache.crop(-1)


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
