"""from_pretrained, from_base and the Auto classes take what those of transformers do; errors are one line."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from gguf_files import small_llama, write_gguf
from models import OPTIONS, SHAPE, convert, ids, refused, shake, small_base, tokenizer
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    T5Config,
    T5ForConditionalGeneration,
)

from ouroboros import OuroborosConfig, OuroborosForCausalLM

ROOT = Path(__file__).resolve().parents[1]
LOADERS = [OuroborosForCausalLM, AutoModelForCausalLM]


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def gives(loaded, model):
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------- from_pretrained

@pytest.mark.parametrize("loader", LOADERS)
def test_fields_of_the_configuration(loader, model, folder):
    loaded = loader.from_pretrained(folder, depth=5, use_cache=False, output_hidden_states=True)
    assert (loaded.config.depth, loaded.config.use_cache) == (5, False)
    out = loaded(ids())
    assert out.past_key_values is None and len(out.hidden_states) == 1 + 1 + 5 + 1
    assert torch.equal(out.logits, model(ids(), depth=5).logits)
    assert OuroborosConfig.from_pretrained(folder, depth=4).depth == 4


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("field, value", [("recurrent_layer", 2), ("n_prelude", 2), ("rank", 2), ("max_steps", 4),
                                          ("modulation", "static"), ("gate", False), ("state_width", 4)])
def test_a_field_that_the_weights_were_made_with_stays(loader, field, value, folder):
    refused(f"{field} {value!r}: the weights were made with", loader.from_pretrained, folder, **{field: value})


@pytest.mark.parametrize("loader", LOADERS)
def test_fields_out_of_range_and_unknown_options_are_refused(loader, folder):
    refused("depth 0: must be a whole number", loader.from_pretrained, folder, depth=0)
    refused("pooling 'some': unknown", loader.from_pretrained, folder, pooling="some")
    with pytest.raises(TypeError, match="deepth"):
        loader.from_pretrained(folder, deepth=3)
    for option in ("variant", "quantization_config"):
        refused(f"from_pretrained: {option} isn't supported", loader.from_pretrained, folder, **{option: {"a": 1}})


@pytest.mark.parametrize("loader", LOADERS)
def test_a_configuration_that_is_given_counts(loader, folder):
    config = AutoConfig.from_pretrained(folder, depth=6)
    assert loader.from_pretrained(folder, config=config).config.depth == 6
    config.rank = 2
    refused("rank 2", loader.from_pretrained, folder, config=config)
    generation = GenerationConfig(max_new_tokens=3)
    assert loader.from_pretrained(folder, generation_config=generation).generation_config.max_new_tokens == 3


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", torch.float64])
def test_dtypes(loader, dtype, folder):
    loaded = loader.from_pretrained(folder, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    assert loaded.dtype == expected
    assert loaded.recurrence.gate.linear.weight.dtype == torch.promote_types(expected, torch.float32)
    assert loaded(ids()).logits.dtype == expected


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_device_maps(loader, device_map, model, folder, base):
    gives(loader.from_pretrained(folder, device_map=device_map), model)
    gives(shake(convert(base, device_map=device_map)), model)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_base_that_is_elsewhere_now(loader, model, folder, base, tmp_path):
    moved = base.rename(tmp_path / "moved")
    refused("its base can.t be had .*, or pass base=", loader.from_pretrained, folder)
    for now in (moved, str(moved), AutoModelForCausalLM.from_pretrained(moved)):
        loaded = loader.from_pretrained(folder, base=now)
        gives(loaded, model)
        assert isinstance(loaded.config.base, Qwen2Config)
    other = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.bfloat16)
    refused("^base: its weights have sha256", loader.from_pretrained, folder, base=other)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_loaded_is_whole_in_evaluation_and_named(loader, folder):
    loaded, report = loader.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not loaded.training
    assert loaded.name_or_path == loaded.config.name_or_path == str(folder)


def test_a_subfolder(model, base, tmp_path):
    model.save_pretrained(tmp_path / "many" / "one")
    for loader in LOADERS:
        gives(loader.from_pretrained(tmp_path / "many", subfolder="one"), model)
    base.rename(tmp_path / "many" / "base")
    other = shake(convert(tmp_path / "many", subfolder="base"))
    gives(other, model)
    assert other.config.base_reference["name"] == str(tmp_path / "many" / "base")
    refused("no such folder", OuroborosForCausalLM.from_pretrained, tmp_path / "many", subfolder="two")


def cached(folder, cache, name):
    """A folder's files as the hub's cache keeps a repository's."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--someone--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / commit)
    return commit


def test_a_cache_that_is_named(base, tmp_path):
    cache = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    commit = cached(base, tmp_path / "cache", "base")
    model = shake(convert("someone/base", **cache))
    gives(shake(convert("someone/base", revision=commit, **cache)), model)
    model.save_pretrained(tmp_path / "model", self_contained=False)
    for loader in LOADERS:
        gives(loader.from_pretrained(tmp_path / "model", **cache), model)
    cached(tmp_path / "model", tmp_path / "cache", "model")
    for loader in LOADERS:
        gives(loader.from_pretrained("someone/model", **cache), model)
    memory = AutoModelForCausalLM.from_pretrained("someone/base", **cache)
    refused("no name to refer to", convert(memory).save_pretrained, tmp_path / "no", self_contained=False)


def test_an_adapter_comes_from_the_hub_too(model, tmp_path, monkeypatch):
    def fetched(name, allow_patterns, **options):
        there = tmp_path / "fetched"
        shutil.copytree(tmp_path / "model", there, ignore=lambda _, files: [
            file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)])
        return there

    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("ouroboros.model.checkpoint.snapshot_download", fetched)
    gives(OuroborosForCausalLM.from_pretrained("someone/model"), model)


def test_a_base_in_a_subfolder_of_a_repository(base, tmp_path):
    cache = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    (tmp_path / "many").mkdir()
    base.rename(tmp_path / "many" / "one")
    cached(tmp_path / "many", tmp_path / "cache", "many")
    model = shake(convert("someone/many", subfolder="one", **cache))
    model.save_pretrained(tmp_path / "model")
    gives(OuroborosForCausalLM.from_pretrained(tmp_path / "model", **cache), model)


def test_a_relative_name_is_found_from_another_directory(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = shake(convert("base"))
    model.save_pretrained("deep/er/model")
    monkeypatch.chdir(tmp_path / "deep")
    gives(OuroborosForCausalLM.from_pretrained("er/model"), model)
    file = tmp_path / "deep/er/model/config.json"
    config = json.loads(file.read_text())
    config["base_reference"]["name"] = "base"  # as the committed ones have it
    file.write_text(json.dumps(config))
    monkeypatch.chdir("/")
    gives(OuroborosForCausalLM.from_pretrained(tmp_path / "deep/er/model"), model)


def test_a_gguf_base_that_was_renamed(tmp_path):
    file = write_gguf(tmp_path / "small.gguf", small_llama())
    torch.manual_seed(1)
    model = OuroborosForCausalLM.from_base(tmp_path, 1, 3, 1, **OPTIONS, gguf_file="small.gguf").eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "moved").mkdir()
    file.rename(tmp_path / "moved" / "other.gguf")
    gives(OuroborosForCausalLM.from_pretrained(tmp_path / "model", base=tmp_path / "moved", gguf_file="other.gguf"),
          model)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", gguf_file="other.gguf", dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    whole.save_pretrained(tmp_path / "plain", max_shard_size="10KB")
    assert len([*(tmp_path / "plain").glob("*.safetensors")]) > 1
    gives(OuroborosForCausalLM.from_pretrained(tmp_path / "model", base=tmp_path / "plain"), model)


def test_a_checkpoint_that_was_moved_or_loaded_with_accelerate(model, folder, tmp_path):
    moved = folder.rename(tmp_path / "elsewhere")
    gives(OuroborosForCausalLM.from_pretrained(moved), model)
    model.save_pretrained(tmp_path / "whole", self_contained=True, max_shard_size="12KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    with accelerate.init_empty_weights():
        empty = OuroborosForCausalLM(AutoConfig.from_pretrained(tmp_path / "whole"))
    empty.tie_weights()
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "whole"), device_map={"": "cpu"})
    gives(loaded.eval(), model)
    accelerate.Accelerator().save_model(model, tmp_path / "state")
    other = convert(small_base())
    accelerate.load_checkpoint_in_model(other, str(tmp_path / "state"))
    gives(other, model)


def test_an_offloaded_model_is_saved(model, folder, tmp_path):
    parts = {"base.model.embed_tokens": "cpu", "base.model.layers.0": "disk", "base.model.layers.1": "cpu",
             "base.model.layers.2": "disk", "base.model.norm": "cpu", "base.model.rotary_emb": "cpu",
             "base.lm_head": "cpu", "recurrence": "cpu"}
    loaded = OuroborosForCausalLM.from_pretrained(folder, device_map=parts, offload_folder=tmp_path / "offload")
    assert loaded.base.model.layers[2].mlp.up_proj.weight.is_meta
    loaded.save_pretrained(tmp_path / "again", self_contained=False)
    gives(OuroborosForCausalLM.from_pretrained(tmp_path / "again"), model)
    loaded.save_pretrained(tmp_path / "whole", self_contained=True)
    gives(OuroborosForCausalLM.from_pretrained(tmp_path / "whole"), model)


# ------------------------------------------------------------------------------------------------------- from_base

@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", torch.float16])
def test_from_base_takes_dtypes_as_words(dtype, base):
    expected = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    assert convert(base, dtype=dtype).dtype == expected


@pytest.mark.parametrize("dtype", ["float7", "int8", "Tensor", torch.int8, torch.float8_e4m3fn, 3])
def test_from_base_refuses_other_dtypes(dtype, base):
    refused("dtype .*: must be one of torch.float16", convert, base, dtype=dtype)


def test_what_is_trained_begins_in_float32_whatever_the_base_is(base):
    model = convert(base, dtype=torch.bfloat16, gate_bias=-2.1)
    assert (model.recurrence.gate.linear.bias == torch.tensor(-2.1)).all()
    assert {p.dtype for p in model.recurrence.parameters()} == {torch.float32}


def test_numbers_of_numpy_are_saved_as_pythons(base, tmp_path):
    convert(base, alpha=np.float32(4), gate_bias=np.float64(-2)).save_pretrained(tmp_path / "model")
    assert OuroborosForCausalLM.from_pretrained(tmp_path / "model").config.alpha == 4


def test_models_arrive_in_evaluation(base):
    assert not OuroborosForCausalLM.from_base(base, 1, 3, 1, **OPTIONS).training


# ---------------------------------------------------------------------------------------------------- what is wrong

def test_broken_files_are_named(base, folder):
    state = load_file(base / "model.safetensors")
    save_file({name: state[name] for name in state if name != "model.embed_tokens.weight"}, base / "model.safetensors")
    refused("the checkpoint has no model.embed_tokens.weight", convert, base)
    (base / "model.safetensors").unlink()
    for broken in ("[]", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 3}}'):
        (base / "model.safetensors.index.json").write_text(broken)
        refused("no JSON with a weight_map", convert, base)
    (folder / "config.json").write_text("[]")
    refused("config.json: can't be read", OuroborosForCausalLM.from_pretrained, folder)


def test_a_family_that_is_none_of_ours_is_named_whatever_its_tensors_hold(tmp_path):
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                     num_attention_heads=2)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"gpt_neox.layers.0.attention.bias": torch.ones(4, 4, dtype=torch.bool)},
              tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused("model_type 'gpt_neox' isn't supported", convert, tmp_path)


def test_what_is_the_bases_can_not_be_given_anew(folder):
    for name, value in (("tie_word_embeddings", True), ("vocab_size", 3)):
        refused(f"{name} is the base's", OuroborosForCausalLM.from_pretrained, folder, **{name: value})


def test_a_folder_of_another_kind_is_named(base, folder, tmp_path):
    refused("base: holds a qwen2 model, no Ouroboros model; convert it with from_base",
            OuroborosForCausalLM.from_pretrained, base)
    refused("model: holds a ouroboros model, converted already; load it with from_pretrained", convert, folder)
    refused("converted already; load it with from_pretrained", convert, OuroborosForCausalLM.from_pretrained(folder))
    refused("'.*none': no such folder", OuroborosForCausalLM.from_pretrained, tmp_path / "none")
    refused("must be a folder or a repository's name", OuroborosForCausalLM.from_pretrained, "")


@pytest.mark.parametrize("loader", LOADERS)
def test_a_config_without_its_base_is_named(loader, folder):
    config = json.loads((folder / "config.json").read_text())
    for broken in (config | {"base": None}, {name: value for name, value in config.items() if name != "base"}):
        (folder / "config.json").write_text(json.dumps(broken))
        refused("config.json: field 'base' is missing", loader.from_pretrained, folder)


@pytest.mark.parametrize("kind", [Qwen2Model, Qwen2ForSequenceClassification])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_a_head_is_no_base(kind, tied, tmp_path):
    other = kind(Qwen2Config(**SHAPE, tie_word_embeddings=tied))
    refused("has no language model's head; give a causal LM", convert, other)
    other.save_pretrained(tmp_path)
    refused("base.*: (tensor (score|embed_tokens).weight|the checkpoint has no lm_head)", convert,
            tmp_path)


def test_a_model_of_another_kind_is_no_base(tmp_path):
    other = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4))
    refused("'t5' isn't supported .* one of llama", convert, other)
    other.save_pretrained(tmp_path)
    refused("'t5' isn't supported .* one of llama", convert, tmp_path)


# -------------------------------------------------------------------------------------------- without the import first

FRESH = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
folder = sys.argv[1]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "ouroboros"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__ == "ouroboros.model.modeling"
again = sys.argv[2]
model.save_pretrained(again)
model.config.save_pretrained(again + "-config")
assert AutoModelForCausalLM.from_pretrained(again).config.auto_map == model.config.auto_map
written = pipeline("text-generation", model=folder, trust_remote_code=True)("w5 w6", max_new_tokens=4, do_sample=False)
print(written[0]["generated_text"])
"""


def fresh(code, *arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=900)


def test_auto_classes_find_ours_in_a_process_that_never_imported_it(base, tmp_path):
    tokenizer().save_pretrained(base)
    model = shake(convert(base))
    model.save_pretrained(tmp_path / "model", self_contained=True)
    done = fresh(FRESH, tmp_path / "model", tmp_path / "again", HF_MODULES_CACHE=str(tmp_path / "modules"))
    expected = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)[0]
    assert done.returncode == 0, done.stderr
    assert re.findall(r"w\d+", done.stdout) == [f"w{i}" for i in expected]
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {"modeling_ouroboros.py"}
    assert not list((tmp_path / "again-config").glob("*.py"))


def test_code_beside_the_weights_runs_only_where_that_is_asked_for(folder):
    done = fresh("import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])", folder)
    assert done.returncode == 1 and "trust_remote_code=True" in done.stderr
    (folder / "modeling_ouroboros.py").write_text("raise SystemExit('run')")
    gives(AutoModelForCausalLM.from_pretrained(folder), OuroborosForCausalLM.from_pretrained(folder))
