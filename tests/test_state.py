"""Where a model's numbers live: calls don't share them, weights may be elsewhere, precision may be half."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import convert, ids, shake, small_base
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model

from ouroboros.model.modulation import MODULATIONS
from ouroboros.training import blind  # noqa: F401 (it adds its modulations)

every_modulation = pytest.mark.parametrize("modulation", [*MODULATIONS, "none"])
CPU = torch.device("cpu")


@pytest.mark.parametrize("modulation", ["controller", "static"])
def test_a_call_in_another_thread_changes_nothing(modulation):
    """The other call, at another depth, begins and ends while the looped layer of the first one waits."""
    model = shake(convert(modulation=modulation))
    expected, other = model(ids()).logits, model(ids(3, 5, seed=4), depth=2).logits
    began, found = [], []

    def interrupt(*_):
        if not began:
            began.append(True)
            found.append(other_thread.submit(lambda: model(ids(3, 5, seed=4), depth=2).logits).result())

    for module in (model.recurrent_layer, model.recurrent_layer.mlp):  # before the layer, and in the middle of it
        began.clear()
        hook = module.register_forward_pre_hook(interrupt)
        with ThreadPoolExecutor(1) as other_thread:
            assert torch.equal(model(ids()).logits, expected)
        hook.remove()
    assert len(found) == 2 and all(torch.equal(logits, other) for logits in found)


def test_a_step_that_fails_leaves_nothing_behind():
    model = shake(convert())
    plain = model.recurrent_layer.mlp(torch.ones(1, 2, 16))

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.recurrent_layer.mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(ids())
    hook.remove()
    assert torch.equal(model.recurrent_layer.mlp(torch.ones(1, 2, 16)), plain)


def gradients(model):
    model.zero_grad()
    model(ids(), labels=ids()).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.recurrence.parameters()])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_the_base_alone_leaves_the_step_its_modulation(reentrant):
    model = shake(convert()).train()
    plain = gradients(model)
    model.base.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model), plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("use_cache", [True, False])
def test_hooks_see_every_step_with_a_cache_too(use_cache):
    model, shapes = shake(convert()), []
    model.recurrence.register_forward_hook(lambda module, inputs, out: shapes.append(out.shape))
    model(ids(), depth=4, use_cache=use_cache)
    assert shapes == [(2, 7, 16)] * 4
    plain = model(ids(), use_cache=use_cache).logits
    model.recurrence.register_forward_hook(lambda module, inputs, out: out + 1)  # steering
    assert (model(ids(), use_cache=use_cache).logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize("place", ["model.embed_tokens", "model.layers.0", "model.layers.0.mlp", "model.layers.1"])
def test_a_vector_that_a_hook_adds_gets_its_gradient(place):
    """Steering vectors and the like are trained outside of the model, on a frozen prelude too."""
    found = []
    for frozen in (True, False):
        model, vector = shake(convert()), torch.zeros(16, requires_grad=True)
        model.requires_grad_(not frozen)
        model.base.get_submodule(place).register_forward_hook(lambda module, inputs, out, vector=vector: out + vector)
        model(ids(), labels=ids()).loss.backward()
        found.append(vector.grad)
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 1e-3


PLACES = {"base.model.embed_tokens": "disk", "base.lm_head": "disk", "base.model.layers.0": "cpu",
          "base.model.layers.1": "disk", "base.model.layers.2": "cpu", "base.model.norm": "disk",
          "base.model.rotary_emb": "cpu", "recurrence": "cpu"}


@every_modulation
@pytest.mark.parametrize("how", ["cpu", "disk", "both"])
def test_weights_may_be_offloaded(modulation, how, tmp_path):
    model = shake(convert(modulation=modulation))
    away = copy.deepcopy(model)
    if how == "cpu":
        cpu_offload(away, execution_device=CPU, offload_buffers=True)
    elif how == "disk":
        disk_offload(away, tmp_path, execution_device=CPU)
    else:
        dispatch_model(away, PLACES, main_device="cpu", offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in away.parameters())
    assert torch.equal(away(ids()).logits, model(ids()).logits)
    options = dict(max_new_tokens=3, do_sample=False)
    assert torch.equal(away.generate(ids(), **options), model.generate(ids(), **options))


@every_modulation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(modulation, dtype):
    model = shake(convert(modulation=modulation)).train()
    losses, gradients = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(ids(), labels=ids()).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.recurrence.parameters()]))
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0, abs=5e-3)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("modulation", ["controller", "static", "none"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_precision_base_is_close_to_float32(modulation, autocast):
    exact, half = (shake(convert(small_base(), modulation=modulation)) for _ in range(2))
    half.base.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = half.train()(ids(), labels=ids()).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact(ids(), labels=ids()).loss.item(), rel=0, abs=5e-3)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in half.recurrence.parameters())


LINEAR = ["q_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": lambda layer: LoraConfig(r=2, target_modules=LINEAR, layers_to_transform=[layer]),
    "dora": lambda layer: LoraConfig(r=2, target_modules=LINEAR, layers_to_transform=[layer], use_dora=True),
    "ia3": lambda layer: IA3Config(target_modules=rf".*layers\.{layer}\..*(k_proj|v_proj|down_proj)",
                                   feedforward_modules=rf".*layers\.{layer}\..*down_proj"),
    "oft": lambda layer: OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "up_proj"],
                                   layers_to_transform=[layer]),
}


@pytest.mark.parametrize("layer", [1, 2], ids=["looped", "coda"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("modulation", ["controller", "static"])
def test_an_adapter_learns_and_merges_into_the_weight(modulation, adapter, layer):
    """Those that scale or rotate what they wrap too: the low-rank branch stands outside of them."""
    plain = shake(convert(modulation=modulation))
    untrained = plain(ids()).logits
    model = get_peft_model(plain, ADAPTERS[adapter](layer))
    torch.testing.assert_close(model(ids()).logits, untrained, rtol=0, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = model.eval()(ids()).logits
    assert (adapted - untrained).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(model(ids()).logits, untrained, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids()).logits, adapted, rtol=0, atol=1e-5)
