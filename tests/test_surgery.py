"""Which layers are kept, the mean residual, the truncated SVD."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import convert, ids, refused, small_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ouroboros.errors import InputError
from ouroboros.model.configuration import Split
from ouroboros.model.surgery import kept_layers, mean_residual, open_base, truncated_svd
from ouroboros.training.build import cut_layers


def split(prelude, recurrent, coda):
    return Split(prelude, recurrent, coda)


def base(layers=6):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
                                        num_attention_heads=2, num_key_value_heads=1))


def test_the_papers_split_keeps_17_of_36_layers_and_removes_19():
    kept = kept_layers(36, split(8, 18, 8))
    assert kept == [0, 1, 2, 3, 4, 5, 6, 7, 18, 28, 29, 30, 31, 32, 33, 34, 35]
    assert 36 - len(kept) == 19


@given(st.integers(2, 40), st.data())
@settings(max_examples=50)
def test_kept_layers_are_prelude_recurrent_and_coda(n, data):
    prelude = data.draw(st.integers(0, n - 2))
    coda = data.draw(st.integers(0, n - 2 - prelude))
    recurrent = data.draw(st.integers(prelude, n - coda - 1))
    kept = kept_layers(n, split(prelude, recurrent, coda))
    assert kept == sorted(set(kept)) and len(kept) < n and set(kept) <= set(range(n))
    assert len(kept) == prelude + 1 + coda and recurrent in kept


@pytest.mark.parametrize("sizes, complaint", [
    ((3, 3, 3), "needs 7 layers, the base has 6"),
    ((2, 2, 3), "removes none"),
    ((1, 0, 1), "layer 0 isn't between"),
    ((1, 5, 1), "layer 5 isn't between"),
    ((-1, 2, 1), "needs 1 layers"),
])
def test_a_split_that_does_not_fit_is_refused_in_one_line(sizes, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        kept_layers(6, split(*sizes))
    assert "\n" not in str(error.value)


def test_the_mean_residual_is_over_the_removed_layers():
    model, where = base(), split(1, 3, 1)
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    expected = (weights[1] + weights[2] + weights[4]) / 3 - weights[3]
    torch.testing.assert_close(mean_residual(open_base(model), where, "up_proj", "mlp"), expected)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=30)
def test_truncated_svd_is_the_best_approximation_of_its_rank(rows, columns, seed):
    residual = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    singular = torch.linalg.svdvals(residual.double())
    for rank in range(1, min(rows, columns) + 1):
        a, b = truncated_svd(residual, rank)
        assert a.shape == (rank, columns) and b.shape == (rows, rank)
        # Eckart and Young (1936): the smallest error of rank r is the norm of the singular values left out
        error = torch.linalg.norm(residual.double() - b @ a)
        assert abs(error - singular[rank:].norm()) < 1e-9 * max(1, singular[0])
        torch.testing.assert_close(a @ a.T, torch.eye(rank, dtype=a.dtype))


def test_the_cut_model_is_the_base_without_the_removed_layers():
    model, where = base(), split(1, 3, 1)
    cut, ids = cut_layers(model, where), torch.arange(10)[None]
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 3 and len(model.model.layers) == 6
    assert cut.model.layers[1].mlp.up_proj.weight is model.model.layers[3].mlp.up_proj.weight
    whole = cut(ids, use_cache=False).logits
    for layer in (1, 2, 4):
        for parameter in model.model.layers[layer].parameters():
            parameter.data.zero_()
    text = ids[:, :4]
    cached = cut.generate(text, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(cached, cut.generate(text, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))  # the base's are its own
    # a layer whose every weight is zero is the identity: the base without them is the cut model
    torch.testing.assert_close(model(ids, use_cache=False).logits, whole)


# ------------------------------------------------------------------------------------- what is no weight, or unknown

def rewrite(folder, change, **config):
    """Change a saved model's tensors by `change`, a function of them, and fields of its config.json."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))
    return folder


@pytest.fixture
def folder(tmp_path):
    small_base("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_base_is_refused_by_its_configuration(method, folder):
    quantised = {"quant_method": method, "bits": 8}
    rewrite(folder, lambda tensors: None, quantization_config=quantised)
    refused("quantised \\(config.json has a quantization_config\\)", convert, folder)
    model = small_base()
    model.config.quantization_config = quantised
    refused("quantised \\(config.json has a quantization_config\\)", convert, model)


@pytest.mark.parametrize("layer", [0, 3, 4])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_are_not_read_as_weights(dtype, layer, folder):
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    model = small_base("llama")
    weight = model.model.layers[layer].mlp.up_proj.weight
    model.model.layers[layer].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    for source in (model, folder):
        refused(f"{name} is {dtype}, packed by a quantiser", convert, source)


def test_a_layer_of_another_library_is_not_read_as_weights():
    model = small_base("llama")
    packed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    refused("packed by a quantiser", convert, packed)
    refused("is offloaded; load the model without a device_map", convert, small_base().to("meta"))


@pytest.mark.parametrize("layer", [0, 3, 4])
@pytest.mark.parametrize("tensor", ["self_attn.q_proj.weight_scale", "mlp.extra.weight", "self_attn.q_norm.weight"])
def test_an_unknown_tensor_of_a_layer_is_refused(tensor, layer, folder):
    rewrite(folder, lambda tensors: tensors.update({f"model.layers.{layer}.{tensor}": torch.ones(2)}))
    refused(f"tensor model.layers.\\d.{tensor} isn't in every layer", convert, folder)


@pytest.mark.parametrize("tensor", ["mlp.extra.weight", "self_attn.o_proj.weight_scale_inv"])
def test_an_unknown_tensor_of_every_layer_is_refused(tensor, folder):
    rewrite(folder, lambda tensors: tensors.update({f"model.layers.{i}.{tensor}": torch.ones(2) for i in range(6)}))
    refused(f"tensor model.layers.0.{tensor} is .*, config.json makes none of that name", convert, folder)


def test_a_bias_that_the_configuration_denies_is_refused(folder):
    rewrite(folder, lambda tensors: None, attention_bias=False)
    refused("_proj.bias is .*, config.json makes none of that name", convert, folder)
    rewrite(folder, lambda tensors: None, attention_bias=True)
    rewrite(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.bias"))  # in a layer that is removed
    refused("tensor model.layers.2.mlp.up_proj.bias isn't in every layer", convert, folder)


@pytest.mark.parametrize("name", ["model.layers.6.eh_proj.weight", "model.adapter.weight", "score.weight"])
def test_an_unknown_tensor_elsewhere_is_refused(name, folder):
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    refused(f"tensor {name} (isn't in every layer|is .*, config.json makes none of that name)", convert, folder)


def test_fewer_layers_than_the_file_has_are_refused(folder):
    rewrite(folder, lambda tensors: None, num_hidden_layers=5)
    refused("tensor model.layers.5.* isn't in every layer that config.json says", convert, folder)


def test_rotary_frequencies_of_old_checkpoints_are_left_out(folder, tmp_path):
    expected = convert(folder)(ids()).logits
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)}
    rewrite(folder, lambda tensors: tensors.update(frequencies | {"model.rotary_emb.inv_freq": torch.ones(2)}))
    model = convert(folder)
    assert torch.equal(model(ids()).logits, expected)
    model.save_pretrained(tmp_path / "model", self_contained=False)
    assert torch.equal(type(model).from_pretrained(tmp_path / "model")(ids()).logits, expected)


def test_a_file_counts_before_shards_beside_it_as_in_transformers(folder, tmp_path):
    small_base("llama").save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].add_(1)).joinpath("model.safetensors").rename(
        tmp_path / "shards" / "model.safetensors")
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(convert(tmp_path / "shards")(ids()).logits, convert(memory)(ids()).logits)
