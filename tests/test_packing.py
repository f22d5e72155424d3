"""Documents packed into a row, as transformers' padding-free collator does: each as if it were alone."""

import pytest
import torch
from models import FAMILIES, convert, ids, shake, small_base
from transformers import DataCollatorWithFlattening

from ouroboros.errors import InputError
from ouroboros.model.modulation import MODULATIONS
from ouroboros.training import blind  # noqa: F401 (it adds its modulations)

LENGTHS = (5, 1, 7)
DOCUMENTS = [ids(1, length, seed=length)[0] for length in LENGTHS]
CLOSE = dict(rtol=0, atol=1e-4)


def packed(documents=DOCUMENTS):
    """Token ids and position ids, (1, T)."""
    return (torch.cat(documents)[None], torch.cat([torch.arange(len(document)) for document in documents])[None])


def alone(model):
    return torch.cat([model(document[None], use_cache=False).logits for document in DOCUMENTS], dim=1)


@pytest.mark.parametrize("pooling", ["causal", "sequence"])
@pytest.mark.parametrize("modulation", [*MODULATIONS, "none"])
def test_packed_documents_are_read_as_if_alone(modulation, pooling):
    model, (tokens, positions) = shake(convert(modulation=modulation, pooling=pooling)), packed()
    torch.testing.assert_close(model(tokens, position_ids=positions).logits, alone(model), **CLOSE)
    assert (model(tokens).logits - alone(model)).abs().max() > 1e-2  # else nothing would be seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_read_as_if_alone_in_every_family(family, attention):
    model, (tokens, positions) = shake(convert(small_base(family, attention))), packed()
    torch.testing.assert_close(model(tokens, position_ids=positions).logits, alone(model), **CLOSE)


def test_several_rows_may_be_packed_each_its_own_way():
    model = shake(convert())
    (one, first), (two, second) = packed(), packed(DOCUMENTS[::-1])
    both = model(torch.cat([one, two]), position_ids=torch.cat([first, second])).logits
    torch.testing.assert_close(both[0], alone(model)[0], **CLOSE)
    torch.testing.assert_close(both[1], model(two, position_ids=second).logits[0], **CLOSE)
    other = shake(convert(modulation="controller_other"))
    with pytest.raises(InputError, match="'controller_other' reads another row"):
        other(torch.cat([one, two]), position_ids=torch.cat([first, second]))


def test_the_padding_free_collator_gives_the_gradients_of_the_documents():
    """Its loss is a mean over tokens, so each document counts by the tokens that it predicts."""
    model, found = shake(convert()).train(), []
    batch = DataCollatorWithFlattening()([{"input_ids": document.tolist()} for document in DOCUMENTS])
    rows = [dict(input_ids=document[None], labels=document[None]) for document in DOCUMENTS if len(document) > 1]
    predicted = sum(LENGTHS) - len(LENGTHS)
    for calls in ([dict(batch)], [row | {"num_items_in_batch": predicted} for row in rows]):
        model.zero_grad()
        loss = sum(model(**call).loss for call in calls)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.recurrence.parameters())])
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_packing_with_a_mask_or_a_cache_is_refused():
    model, (tokens, positions) = convert(), packed()
    with pytest.raises(InputError, match="position_ids: don't go up .*; leave the mask out"):
        model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens))
    with pytest.raises(InputError, match="position_ids: don't go up .*use_cache=False"):
        model(tokens, position_ids=positions, use_cache=True)
    assert model(tokens, position_ids=positions).past_key_values is None  # none is made by itself


@pytest.mark.parametrize("filler", [0, 1])
def test_position_ids_of_padding_begin_no_document(filler):
    """As `generate` gives them."""
    model = shake(convert())
    tokens, mask = torch.zeros(1, 10, dtype=torch.long), torch.zeros(1, 10, dtype=torch.long)
    tokens[:, 3:], mask[:, 3:] = ids(1), 1
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
    logits = model(tokens, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(ids(1)).logits, rtol=1e-5, atol=1e-5)
