"""The frozen low-rank branch, the Controller and the static table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ouroboros.experiment.arms import ARMS, PROJECTIONS
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modulation import MODULATIONS, Controller, ModulatedLinear, StaticModulation, emitted, pool
from ouroboros.training import blind  # noqa: F401 (it adds its modulations)


def modulated(out_features=6, in_features=5, rank=3, alpha=1.5, dtype=torch.float32):
    torch.manual_seed(0)
    layer = ModulatedLinear(nn.Linear(in_features, out_features, dtype=dtype), rank, alpha)
    layer.A.normal_()
    layer.B.normal_()
    return layer


def test_no_modulation_and_zero_modulation_are_the_linear_layer():
    layer = modulated()
    x = torch.randn(2, 4, 5)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)
    with emitted([id(layer)], [torch.zeros(2, 4, 3)]):
        assert torch.equal(layer(x), plain)


def test_the_branch_is_the_formula_of_section_3():
    layer = modulated(dtype=torch.float64)
    x, m = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    with emitted([id(layer)], [m]):
        y = layer(x)
    for b in range(2):
        for t in range(4):
            weight = layer.weight + 1.5 / 3 * layer.B @ torch.diag(m[b, t]) @ layer.A
            torch.testing.assert_close(y[b, t], weight @ x[b, t] + layer.bias, rtol=0, atol=1e-12)


def test_the_wrapped_weights_are_the_same_storage():
    linear = nn.Linear(5, 6)
    layer = ModulatedLinear(linear, 2, 1.0)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert set(layer.state_dict()) == {"weight", "bias", "A", "B"}  # a base's own names still load


@given(st.integers(1, 3), st.integers(1, 6), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_pooling_is_the_mean_of_what_the_mask_lets_through(batch, length, causal, random):
    torch.manual_seed(random.randint(0, 999))
    h = torch.randn(batch, length, 4, dtype=torch.float64)
    mask = torch.tensor([[random.randint(0, 1) for _ in range(length)] for _ in range(batch)])
    pooled = pool(h, mask, "causal" if causal else "sequence")
    assert pooled.shape == (batch, length if causal else 1, 4)
    for b in range(batch):
        for t in range(pooled.shape[1]):
            seen = [h[b, i] for i in range(t + 1 if causal else length) if mask[b, i]]
            expected = torch.stack(seen).mean(0) if seen else torch.zeros(4, dtype=torch.float64)
            torch.testing.assert_close(pooled[b, t], expected)


def config(**options):
    base = {"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 3}
    return OuroborosConfig(base=base, rank=4, max_steps=5, state_width=6, step_width=3, hidden_width=7, output_width=5,
                           **options)


@pytest.mark.parametrize("pooling, length", [("causal", 3), ("sequence", 1)])
def test_the_controller_starts_at_zero_and_then_depends_on_input_and_step(pooling, length):
    torch.manual_seed(0)
    controller = Controller(config(pooling=pooling))
    h = torch.randn(2, 3, 16)
    m = controller(h, 0, None)
    assert m.shape == (2, length, len(PROJECTIONS), 4) and not m.any()
    nn.init.normal_(controller.heads.weight)
    m = controller(h, 0, None)
    assert not torch.allclose(m, controller(h, 1, None))
    assert not torch.allclose(m, controller(h + 1, 0, None))


def test_the_static_table_starts_at_zero_and_depends_on_the_step_alone():
    static = StaticModulation(config(modulation="static"))
    assert static.table.shape == (5, 7, 4) and not static.table.any()
    nn.init.normal_(static.table)
    h = torch.randn(2, 3, 16)
    assert torch.equal(static(h, 0, None), static(h + 1, 0, None))
    assert not torch.equal(static(h, 0, None), static(h, 1, None))


@pytest.mark.parametrize("name", MODULATIONS)
def test_a_modulation_reads_the_state_if_and_only_if_its_arms_say_so(name):
    """What doesn't read it has no pool and no drawn depth: `trained_under` trains nothing again for those switches."""
    [reads] = {arm.reads for arm in ARMS.values() if arm.modulation == name}
    h = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    vectors = []
    for pooling, seen in (("causal", h), ("causal", h + 1), ("sequence", h)):
        torch.manual_seed(1)
        modulation = MODULATIONS[name](config(pooling=pooling))
        for parameter in modulation.parameters():
            nn.init.normal_(parameter)
        vectors.append(modulation(seen, 1, None).expand(2, 3, len(PROJECTIONS), 4))
    assert torch.equal(vectors[0], vectors[1]) == torch.equal(vectors[0], vectors[2]) == (not reads)
