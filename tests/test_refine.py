"""The looped last layer of an intact model: what it is, and what of it can be trained."""

import copy

import pytest
import torch
from models import FAMILIES, ids, shake, small_base

from ouroboros.errors import InputError
from ouroboros.model.configuration import PROJECTIONS
from ouroboros.model.modeling import Gate
from ouroboros.model.modulation import emitted
from ouroboros.training.build import part_of
from ouroboros.training.probes import Watch
from ouroboros.training.refine import SCALE, Intact, Refiner
from ouroboros.training.trainer import training_loss

WIDTHS = {"max_steps": 8, "state_width": 8, "step_width": 4, "hidden_width": 8, "output_width": 4}


def refiner(base=None, **options):
    torch.manual_seed(1)
    base = small_base() if base is None else base
    return Refiner(base, **{"depth": 3, "rank": 4} | WIDTHS | options).eval()


def released(**options):
    return refiner(pooling="sequence", dead=True, **options)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, target, updates=5, rate=1e-2, decay=0.0, seen=None):
    """AdamW with its default betas, as in the release's script; `seen` collects the gradients."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=rate, weight_decay=decay)
    for update in range(updates):
        optimizer.zero_grad()
        chunk = ids(length=9, seed=update)
        training_loss(model, model.get_output_embeddings().weight, chunk, None, target).backward()
        if seen is not None:
            seen.append({name: p.grad.clone() for name, p in trained(model).items()})
        optimizer.step()
    return model


def values(model):
    return {name: p.detach().clone() for name, p in trained(model).items()}


def moved(model, before):
    return {name for name, p in trained(model).items() if not torch.equal(p, before[name])}


def layer_by_hand(base, h):
    """The last layer as transformers' own model calls it; full causal attention."""
    positions = torch.arange(h.shape[1])[None]
    return base.model.layers[-1](h, attention_mask=None, position_ids=positions,
                                 position_embeddings=base.model.rotary_emb(h, positions))


# ----------------------------------------------------------------------------------------- the loop

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_depth_0_is_the_intact_model(family, attention):
    base = small_base(family, attention)
    expected = base(ids(), use_cache=False).logits
    assert torch.equal(shake(refiner(base))(ids(), depth=0).logits, expected)
    assert torch.equal(Intact(base)(ids()).logits, expected)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("dead", [True, False])
def test_a_gateless_loop_begins_as_the_last_layer_applied_again(depth, dead):
    base = small_base()
    with torch.no_grad():
        h = base(ids(), use_cache=False, output_hidden_states=True).hidden_states[-2]
        for _ in range(1 + depth):
            h = layer_by_hand(base, h)
        found = refiner(base, gate=False, dead=dead).hidden(ids(), depth=depth)
    assert len(found) == depth + 1
    torch.testing.assert_close(found[-1], base.model.norm(h), rtol=1e-5, atol=1e-5)


def test_a_gated_step_keeps_88_percent_of_the_state_and_lets_in_the_normed_layer():
    base = small_base()
    with torch.no_grad():
        h = base(ids(), use_cache=False, output_hidden_states=True).hidden_states[-2]
        h = layer_by_hand(base, h)
        new = layer_by_hand(base, h)
        new = new / new.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        opening = torch.sigmoid(torch.tensor(-2.0))
        found = refiner(base).hidden(ids(), depth=1)[-1]
    expected = base.model.norm(opening * new + (1 - opening) * h)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_sliding_window_stays_where_the_base_has_one():
    """A window of 4 twice, one layer and one step, reaches six tokens back and no further."""
    base = small_base("mistral", num_hidden_layers=1)
    tokens, changed = ids(length=12), ids(length=12)
    changed[:, 0] = (changed[:, 0] + 1) % 50
    model = shake(refiner(base, gate=False))
    torch.nn.init.zeros_(model.recurrence.modulation.state.weight)  # the pool reaches further
    difference = (model(tokens, depth=1).logits - model(changed, depth=1).logits).abs().amax((0, 2))
    assert difference[:7].min() > 1e-4 and difference[7:].max() == 0


def test_the_branch_is_a_weight_of_each_token_s_own():
    linear = shake(refiner(small_base().double())).projections[0]
    x, m = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    with emitted([id(linear)], [m]):
        y = linear(x)
    for b in range(2):
        for t in range(3):
            coefficients = m[b, t]
            lora_a = sum(c * a for c, a in zip(coefficients[:8], linear.A, strict=True))  # (r, in)
            lora_b = sum(c * linear.B[:, i] for i, c in enumerate(coefficients[8:]))  # (out, r)
            weight = linear.weight + SCALE * lora_b @ lora_a
            expected = weight @ x[b, t] + linear.bias
            torch.testing.assert_close(y[b, t], expected, rtol=0, atol=1e-10)
            updated = linear.weight + linear.update(m[b, t])
            torch.testing.assert_close(updated, weight, rtol=0, atol=1e-10)


def test_the_base_is_shared_and_stays_what_it_was():
    base = small_base()
    kinds = [type(module) for module in base.modules()]
    expected = base(ids(), use_cache=False).logits
    model = shake(refiner(base))
    model(ids())
    assert [type(module) for module in base.modules()] == kinds
    assert torch.equal(base(ids(), use_cache=False).logits, expected)
    assert all(new.weight is old for new, old in zip(
        model.projections, (getattr(getattr(base.model.layers[-1], parent), name).weight
                            for name, parent in PROJECTIONS.items()), strict=True))
    assert not base.model.layers[-1]._forward_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_may_see(family):
    tokens, changed = ids(), ids()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    causal = shake(refiner(small_base(family), pooling="causal"))
    assert torch.equal(causal(tokens).logits[:, :5], causal(changed).logits[:, :5])
    assert not torch.allclose(causal(tokens).logits[:, 5:], causal(changed).logits[:, 5:])
    leaking = shake(refiner(small_base(family), pooling="sequence"))
    assert (leaking(tokens).logits[:, :5] - leaking(changed).logits[:, :5]).abs().max() > 1e-4


@pytest.mark.parametrize("pooling", ["causal", "sequence"])
def test_what_the_controller_emits_depends_on_the_text_and_on_the_step(pooling):
    controller, h = shake(refiner(pooling=pooling)).recurrence.modulation, torch.randn(2, 5, 16)
    m = controller(h, 0, None)
    assert m.shape == (2, 5 if pooling == "causal" else 1, 7, 16)
    assert not torch.allclose(m, controller(h + 1, 0, None))
    assert not torch.allclose(m, controller(h, 1, None))


# ------------------------------------------------------------------------------------- the baseline

def test_the_release_s_baseline_is_normed_twice():
    base = small_base()
    once, twice = (Intact(base, norms).hidden(ids())[-1] for norms in (1, 2))
    h, weight = once.double(), base.model.norm.weight.double()
    expected = weight * h / (h.square().mean(-1, keepdim=True) + base.config.rms_norm_eps).sqrt()
    torch.testing.assert_close(twice.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(once, twice, rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------ what can be trained

def test_what_is_trained_has_the_names_and_parts_of_the_other_arms():
    names = set(trained(refiner()))
    assert all(name.startswith("recurrence.") for name in names)
    assert {part_of(name) for name in names} == {"modulation", "gate", "step_norm"}
    assert {part_of(name) for name in trained(refiner(gate=False))} == {"modulation"}
    assert {f"recurrence.{name}" for name in (
        "gate.linear.weight", "gate.linear.bias", "step_norm.weight", "modulation.heads.A.weight",
        "modulation.A.q_proj")} <= names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_trained_is_in_float32_at_least(dtype):
    model = refiner(small_base().to(dtype))
    assert {p.dtype for p in trained(model).values()} == {torch.promote_types(dtype, torch.float32)}
    assert all(state.dtype == dtype for state in shake(model).hidden(ids()))
    train(model, "t+1", updates=1)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_no_gradient_ever_reaches_a_dead_controller(gate, decay):
    model, seen = released(gate=gate), []
    before = values(model)
    train(model, "t+2", decay=decay, seen=seen)
    of_controller = {name for name in before if name.startswith("recurrence.modulation.")}
    assert len(of_controller) == 7 + 2 + 2 * 7  # trunk, heads, dictionaries
    for gradients in seen:
        assert not any(gradients[name].any() for name in of_controller)
        assert gate == any(gradients[name].any() for name in set(before) - of_controller)
    for name in of_controller:  # all that decay does: it shrinks what nothing reads
        shrunk = before[name] * (1 - 1e-2 * decay)**5
        torch.testing.assert_close(trained(model)[name].detach(), shrunk)
    heads = {name for name in of_controller if ".heads." in name}
    assert not any(before[name].any() for name in heads) and not moved(model, before) & heads


def test_training_changes_no_bit_of_what_the_gateless_release_computes():
    model = released(gate=False)
    before, weights = model(ids()).logits, values(model)
    assert not moved(train(model, "t+2"), weights)
    assert moved(train(model, "t+2", decay=0.1), weights)
    assert torch.equal(model(ids()).logits, before)


def test_in_float32_gate_and_norms_of_the_release_are_trained_around_its_dead_controller():
    model = released()
    before = values(model)
    assert moved(train(model, "t+2"), before) == {f"recurrence.{name}" for name in (
        "gate.linear.weight", "gate.linear.bias", "step_norm.weight")}


@pytest.mark.parametrize("rate", [1e-4, 3e-4])
def test_kept_in_bfloat16_only_the_gate_s_matrix_moves(rate):
    """The next numbers to 1 and -2 are more than two such updates away (protocol.md `precision`)."""
    model = released()
    model.recurrence.bfloat16()
    before, seen = values(model), []
    train(model, "t+2", updates=50, rate=rate, decay=0.01, seen=seen)
    for name in ("step_norm.weight", "gate.linear.bias"):
        assert seen[0][f"recurrence.{name}"].any()
    assert moved(model, before) == {"recurrence.gate.linear.weight"}


def test_corrected_everything_is_trained():
    model, seen = refiner(), []
    before = values(model)
    train(model, "t+1", seen=seen)
    heads = [f"recurrence.modulation.heads.{side}.weight" for side in "AB"]
    # as in LoRA: B leaves zero first, and then A has a gradient
    assert not seen[0][heads[0]].any() and seen[0][heads[1]].any()
    assert all(gradients[name].any() for gradients in seen[1:] for name in heads)
    assert moved(model, before) == set(before)


def test_the_base_gets_no_gradient_and_no_update():
    model = shake(refiner())
    before = copy.deepcopy(model.base.state_dict())
    train(model.train(), "t+1", rate=0.1)
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())
    after = model.base.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_training_lowers_the_loss():
    model, tokens = refiner(), ids(batch=4, length=12)
    head = model.get_output_embeddings().weight
    first = training_loss(model, head, tokens, None, "t+1").item()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = training_loss(model, head, tokens, None, "t+1")
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.5


# -------------------------------------------------------------------------------- as the others are

def test_it_is_called_as_the_other_arms_are():
    model = shake(refiner())
    none = torch.tensor([], dtype=torch.long)
    out = model(ids(), depth=2, logits_to_keep=none, output_hidden_states=True)
    assert out.logits.shape == (2, 0, 50) and len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], model.hidden(ids(), depth=2)[-1])
    last = model(ids(), depth=3).logits[:, -2:]
    torch.testing.assert_close(model(ids(), logits_to_keep=2).logits, last)
    assert model.hidden(ids())[-1].shape == (2, 7, 16) and isinstance(model.recurrence.gate, Gate)
    assert model.device == torch.device("cpu")


def test_the_loop_can_be_watched():
    model, tokens = shake(refiner(pooling="sequence")), ids(batch=1)
    with torch.no_grad(), Watch(model) as watch:
        states = model.hidden(tokens)
    steps = watch.steps()
    assert set(steps) == {"gate_open", "state_norm", "change"}
    assert {len(found) for found in steps.values()} == {3}
    with torch.no_grad():  # of one sequence, pooled as a whole, the mean of m is m
        m, linear = model.recurrence.modulation(states[0], 0, None)[0, 0, -1], model.projections[-1]
        share = linear.update(m).norm() / linear.weight.norm()
    assert watch.modulation()["update/down_proj"][0] == pytest.approx(share.item(), rel=1e-4)


@pytest.mark.parametrize("wrong, said", [({"depth": -1}, "depth -1"), ({"rank": 0}, "rank 0"),
                                         ({"pooling": "max"}, "pooling 'max'")])
def test_what_is_out_of_range_is_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        refiner(**wrong)
    with pytest.raises(InputError, match="depth -1"):
        refiner()(ids(), depth=-1)
    with pytest.raises(InputError, match="norms 0"):
        Intact(small_base(), 0)
