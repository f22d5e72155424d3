"""The package against a plain reference of docs/system.md: forward, loss and every gradient."""

import itertools

import pytest
import reference
import torch
from models import convert, ids, shake, small_base
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

ARMS = [dict(modulation=modulation, gate=gate, step_norm=norm, pooling=pooling)
        for modulation, gate, norm, pooling in itertools.product(
            ("controller", "static", "none"), (True, False), (True, False), ("causal", "sequence"))
        if (modulation == "controller" or pooling == "causal") and (modulation != "none" or gate or norm)]
every_arm = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))


def both(arm, dtype, depth=3):
    """(mine, reference): each logits, loss and gradients by name, max_steps 2 so that the last entry is met twice."""
    base = small_base(rms_norm_eps=1e-6).to(dtype)
    model = shake(convert(base, depth=depth, max_steps=2, **arm)).train()
    labels = ids(2, 6)
    labels[0, 2] = -100
    out = model(ids(2, 6), labels=labels)
    (out.loss if dtype == torch.float32 else reference.loss(out.logits, labels)).backward()  # its own is in float32
    mine = {name: p.grad.double() for name, p in model.recurrence.named_parameters()}
    base = base.double()
    trained = {name: p.detach().double().requires_grad_() for name, p in model.recurrence.named_parameters()}
    logits = reference.forward(base, trained, ids(2, 6), (1, 3, 1), depth, rank=4, alpha=2.0, max_steps=2, **arm)
    loss = reference.loss(logits, labels)
    gradients = dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))
    return (out.logits.double(), out.loss.double(), mine), (logits, loss, gradients)


@every_arm
def test_the_whole_model_agrees_in_float32(arm):
    (logits, loss, mine), (expected_logits, expected_loss, expected) = both(arm, torch.float32)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        assert gradient.abs().max() > 1e-4, f"{name}: a gradient of nothing compares nothing"


@every_arm
def test_the_added_parts_agree_in_float64(arm, monkeypatch):
    """transformers' norms compute in float32; with one that doesn't, what is left are the added parts."""
    monkeypatch.setattr(Qwen2RMSNorm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + self.variance_epsilon))
    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding.forward", rotary)
    (logits, _, mine), (expected_logits, _, expected) = both(arm, torch.float64)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def rotary(self, x, position_ids):
    """(cos, sin), each (B, T, head size), in float64; transformers' own computes them in float32."""
    size = x.shape[-1] // self.config.num_attention_heads
    theta = self.config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = position_ids[..., None].double() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
