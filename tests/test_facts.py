"""The audit's facts that are no switches, each in a few lines: what the released code's choice does, and what ours.

Sources of the facts are in notebook 11; nothing here runs the released code.
"""

import os
import pickletools
import zipfile

import pytest
import torch
from models import convert, ids, shake, small_base

from ouroboros.model.modeling import StepNorm


@pytest.mark.parametrize("attention, sees", [("sdpa", False), ("eager", True)])
def test_a_layer_that_is_called_without_a_mask_sees_the_future_under_eager_attention_only(attention, sees):
    base = small_base(attention=attention)
    layer, h = base.model.layers[0], torch.randn(1, 6, 16)
    other = h.clone()
    other[:, -1] += 1
    rotary = base.model.rotary_emb(h, torch.arange(6)[None])
    with torch.no_grad():
        first, second = (layer(x, attention_mask=None, position_embeddings=rotary)[:, 0] for x in (h, other))
    assert torch.equal(first, second) != sees


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_our_loop_gives_its_layers_a_mask_whatever_the_attention(attention):
    model, tokens = shake(convert(small_base(attention=attention))), ids()
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 50
    with torch.no_grad():
        first, second = (model(x, use_cache=False).logits[:, :-1] for x in (tokens, other))
    assert torch.allclose(first, second, atol=1e-5)


def test_a_norm_in_half_precision_errs_where_one_in_float32_only_rounds():
    torch.manual_seed(0)
    h, norm = torch.randn(4, 64, 16).bfloat16(), StepNorm(convert().config)
    exact = (h.double() * (h.double().square().mean(-1, keepdim=True) + norm.eps).rsqrt())
    in_half = h * (h.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    ours, halves = ((out.double() - exact).abs().max() for out in (norm(h, 0), in_half))
    assert ours <= 2**-8 * exact.abs().max() < halves  # eight bits of precision: ours only rounds


def test_a_table_without_its_gate_and_norms_is_not_the_model_that_was_trained():
    model, fresh = shake(convert(modulation="static")), convert(modulation="static")
    fresh.recurrence.modulation.load_state_dict(model.recurrence.modulation.state_dict())
    with torch.no_grad():
        assert not torch.allclose(model(ids()).logits, fresh(ids()).logits, atol=1e-2)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_checkpoint_can_name_code_to_run_and_is_refused_where_tensors_alone_are_read(tmp_path, monkeypatch):
    """What stands in the file is listed, never run: a loader that allows more than tensors would call it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Harm()}, "step.pt")
    with zipfile.ZipFile("step.pt") as file:
        codes = [(code.name, argument) for code, argument, _ in pickletools.genops(file.read("step/data.pkl"))]
    assert ("GLOBAL", "posix system") in codes and "REDUCE" in [name for name, _ in codes]
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load("step.pt", weights_only=True)
    assert not (tmp_path / "harmed").exists()
