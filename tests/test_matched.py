"""Step norms that start at the size of the stream, as `from_base` measures it."""

import torch
from models import convert, ids, refused, small_base, tokenizer

WORDS = ["w3 w4 w5 w6 w7 w8 w9 w10 w11", "w9 w8 w7 w6 w5 w4"]
IDS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [9, 8, 7, 6, 5, 4]]


def matched(base=None, texts=IDS, **options):
    return convert(base, step_norm="matched", texts=texts, **options)


def weights(model):
    return model.recurrence.step_norm.weight


def test_the_first_step_starts_at_the_median_size_of_what_it_reads_beside_padding():
    model, seen = matched(depth=1), []
    model.recurrent_layer.register_forward_hook(lambda module, inputs, out: seen.extend(out[0, 4:]))
    for text in IDS:
        model(torch.tensor([text]), use_cache=False)
    sizes = torch.stack(seen).square().mean(-1).sqrt().sort().values
    assert len(sizes) == 7
    torch.testing.assert_close(weights(model), sizes[3].expand_as(weights(model)))


def test_each_step_is_measured_behind_matched_ones_and_later_steps_have_the_last():
    model = matched(depth=3)
    one, two, three, *later = weights(model)[:, 0].tolist()
    assert one == weights(matched(depth=1))[0, 0] and len({one, two, three}) == 3 and set(later) == {three}


def test_words_are_read_by_the_bases_tokenizer(tmp_path):
    small_base("llama").save_pretrained(tmp_path)
    refused("texts: the base's tokenizer isn't at hand; give lists of token ids", matched, tmp_path, WORDS)
    tokenizer().save_pretrained(tmp_path)
    model = matched(tmp_path, WORDS)
    for texts in (IDS, iter(WORDS), iter(IDS)):
        assert torch.equal(weights(model), weights(matched(tmp_path, texts)))
    assert torch.equal(weights(matched(tmp_path, WORDS[0])), weights(matched(tmp_path, [WORDS[0]])))
    assert not torch.allclose(weights(model)[:3], torch.ones(3, 16), atol=0.1)


def test_it_saves_and_loads_as_any_model(tmp_path):
    model = matched()
    model.save_pretrained(tmp_path, self_contained=True)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.step_norm is True and torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_what_cannot_be_measured_is_refused():
    refused("texts: .* give both or neither", convert, texts=IDS)
    refused("texts: .* give both or neither", convert, step_norm="matched")
    refused("texts: none is a text of more than 4 tokens", matched, texts=[[3, 4, 5, 6]])
    refused("texts: none is a text of more than 4 tokens", matched, texts=[])
    refused("texts: none is a text of more than 4 tokens", matched, texts=[1, 2, 3, 4, 5, 6, 7])  # one of ids
