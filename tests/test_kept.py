"""Nothing is lost by a save: a checkpoint refers to its base only where that gives the kept layers, bit for bit."""

import copy
import json
import shutil
import threading

import pytest
import torch
from models import convert, ids, refused, shake, tokenizer
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ouroboros import OuroborosForCausalLM
from ouroboros.errors import InputError
from ouroboros.model.checkpoint import Checkpoint

LORA = dict(task_type="CAUSAL_LM", r=2, init_lora_weights=False)


def load(folder, **options):
    return OuroborosForCausalLM.from_pretrained(folder, **options)


def same(one, other):
    """The same logits to the last bit."""
    return torch.equal(one.eval()(ids()).logits, other.eval()(ids()).logits)


def refers(folder):
    """Whether a checkpoint refers to its base, instead of holding the kept layers."""
    return "base.model.norm.weight" not in Checkpoint(folder)


# ------------------------------------------------------------------------------------------------- changed after all

def change(parameter):
    parameter.data[0] += 1


CHANGES = {
    "coda": lambda model: change(model.base.model.layers[2].mlp.up_proj.weight),
    "looped layer": lambda model: change(model.projections[0].weight),
    "norm": lambda model: change(model.base.model.norm.weight),
    "embeddings": lambda model: change(model.base.model.embed_tokens.weight),
    "vocabulary": lambda model: model.resize_token_embeddings(61),
    "smaller vocabulary": lambda model: model.resize_token_embeddings(49),
    "inference mode": lambda model: torch.inference_mode()(change)(model.base.model.norm.weight),
    "half": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_in_place_is_saved(what, model, tmp_path):
    CHANGES[what](model)
    refused("kept layers aren't known to be the base's.*; save with self_contained=True", model.save_pretrained,
            tmp_path / "model", self_contained=False)
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    kept = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("base.")}
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in kept.items())
    assert what == "half" or same(loaded, model)  # loaded, what is trained is float32 again


def test_an_untouched_model_and_its_copy_still_refer(model, tmp_path):
    for number, kept in enumerate([model, copy.deepcopy(model)]):
        kept.save_pretrained(tmp_path / str(number), self_contained=False)
        assert refers(tmp_path / str(number)) and same(load(tmp_path / str(number)), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_at_conversion_or_loading_refers_still(dtype, base, model, tmp_path):
    model.save_pretrained(tmp_path / "first")
    for number, kept in enumerate([shake(convert(base, dtype=dtype)), load(tmp_path / "first", dtype=dtype)]):
        kept.save_pretrained(tmp_path / str(number), self_contained=False)
        again = load(tmp_path / str(number))
        assert refers(tmp_path / str(number)) and again.dtype == dtype and same(again, kept)


def test_what_was_changed_once_stays_saved(model, tmp_path):
    CHANGES["coda"](model)
    model.save_pretrained(tmp_path / "0")
    for number in range(2):
        load(tmp_path / str(number)).save_pretrained(tmp_path / str(number + 1))
        assert same(load(tmp_path / str(number + 1)), model)


def tuned(base):
    base.model.layers[2].mlp.up_proj.weight.data[0] += 1
    return base


@pytest.mark.parametrize("touch", [lambda base: base.to(torch.bfloat16), tuned])
def test_a_base_changed_in_memory_has_no_name_to_refer_to(touch, base, tmp_path):
    memory = AutoModelForCausalLM.from_pretrained(base)
    assert convert(memory).config.base_reference["name"] == str(base)
    model = shake(convert(touch(memory)))
    refused("no name to refer to that gives its tensors", model.save_pretrained, tmp_path / "model",
            self_contained=False)
    model.save_pretrained(tmp_path / "model")
    assert same(load(tmp_path / "model"), model)


def test_a_head_that_is_no_longer_tied_is_not_dropped(model, tmp_path):
    model.base.lm_head.weight = torch.nn.Parameter(model.base.lm_head.weight + 1)
    refused("tie_word_embeddings is true, but base.lm_head.weight", model.save_pretrained, tmp_path / "model")
    model.config.tie_word_embeddings = model.config.base.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "model")
    assert same(load(tmp_path / "model"), model)


def test_a_base_whose_head_is_not_tied_as_it_says_is_refused(base, tmp_path):
    memory = AutoModelForCausalLM.from_pretrained(base)
    memory.lm_head.weight = torch.nn.Parameter(memory.lm_head.weight + 1)
    refused("tie_word_embeddings is true, but lm_head.weight has other values", convert, memory)
    tensors = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refused("tie_word_embeddings is true", convert, base)


def prune(model):
    del model.base.model.layers[2]


def other_head(model):
    model.base.lm_head = torch.nn.Linear(16, 50)


def other_rank(model):
    model.config.rank = 2


def wrapped(model):
    model.add_adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    model.delete_adapter("default")


@pytest.mark.parametrize("touch, tensor", [(prune, "base.model.layers.2"), (other_head, "base.lm_head.bias"),
                                           (other_rank, "base.model.layers.1.*A"), (wrapped, "base.*base_layer")])
def test_what_the_configuration_does_not_make_is_not_saved(touch, tensor, model, tmp_path):
    touch(model)
    refused(f"tensor {tensor}.* isn't what the configuration makes", model.save_pretrained, tmp_path / "model",
            self_contained=True)
    assert not (tmp_path / "model").exists()


def test_a_model_made_of_a_configuration_alone_is_saved_whole(model, tmp_path):
    made = shake(AutoModelForCausalLM.from_config(model.config))
    refused("aren't known to be the base's", made.save_pretrained, tmp_path / "model", self_contained=False)
    made.save_pretrained(tmp_path / "model")
    assert same(load(tmp_path / "model"), made)


def test_a_setting_that_was_changed_is_what_is_computed_or_isnt_saved(model, tmp_path):
    """`alpha` is a part of the modules that were made, `pooling` is read at each call."""
    before = model(ids()).logits
    model.config.pooling = "sequence"
    changed = model(ids()).logits
    assert not torch.equal(before, changed)
    model.save_pretrained(tmp_path)
    assert torch.equal(OuroborosForCausalLM.from_pretrained(tmp_path)(ids()).logits, changed)
    model.config = copy.deepcopy(model.config)  # the modules have the one before
    for field, value in (("pooling", "causal"), ("alpha", 100.0)):
        setattr(model.config, field, value)
        refused(f"config.{field} isn't what is computed with", model.save_pretrained, tmp_path)
        model.config.pooling = "sequence"


def test_two_saves_at_once_leave_one_of_the_two(model, tmp_path):
    models = [model, shake(copy.deepcopy(model))]
    change(models[1].recurrence.gate.linear.weight)
    for _ in range(3):
        threads = [threading.Thread(target=one.save_pretrained, args=[tmp_path / "model"]) for one in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            loaded = load(tmp_path / "model")
        except InputError as mixed:  # of two: said, not loaded
            assert "altered" in str(mixed)
        else:
            assert same(loaded, models[0]) or same(loaded, models[1])
    models[0].save_pretrained(tmp_path / "model")  # and what they left is no hindrance
    assert same(load(tmp_path / "model"), models[0])


def test_a_loaded_model_shares_no_weights_with_the_base_it_was_given(base, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    memory = AutoModelForCausalLM.from_pretrained(base)
    loaded = load(tmp_path / "model", base=memory)
    CHANGES["coda"](loaded)
    assert torch.equal(memory.model.layers[5].mlp.up_proj.weight,
                       load_file(base / "model.safetensors")["model.layers.5.mlp.up_proj.weight"])


def test_the_state_that_is_given_is_what_is_judged_and_saved(model, tmp_path):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["base.model.layers.2.mlp.up_proj.weight"] += 1
    model.save_pretrained(tmp_path / "model", state_dict=state)
    assert torch.equal(load(tmp_path / "model").state_dict()["base.model.layers.2.mlp.up_proj.weight"],
                       state["base.model.layers.2.mlp.up_proj.weight"])
    refused("tensor recurrence.gate.linear.bias isn't what the configuration makes", model.save_pretrained,
            tmp_path / "other", state_dict={n: t for n, t in state.items() if n != "recurrence.gate.linear.bias"})


def test_a_save_in_the_middle_of_training_draws_no_random_number(model, tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------- adapters

def test_a_merged_lora_is_saved(model, tmp_path):
    plain = model(ids()).logits
    adapted = get_peft_model(model, LoraConfig(**LORA, target_modules=["q_proj", "up_proj"]))
    refused("isn't what the configuration makes.*merge_and_unload", adapted.get_base_model().save_pretrained,
            tmp_path / "wrapped")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    assert same(load(tmp_path / "model"), merged) and not torch.equal(merged(ids()).logits, plain)


@pytest.mark.parametrize("adapter", [
    LoraConfig(**LORA, target_modules=["q_proj", "up_proj"]),
    LoraConfig(**LORA, target_modules=["down_proj"], use_dora=True),
    LoraConfig(**LORA, target_modules=["v_proj"], modules_to_save=["recurrence"]),
    IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
              init_ia3_weights=False),
])
def test_an_added_adapter_is_saved_beside_what_it_was_added_to(adapter, model, tmp_path):
    plain = model(ids()).logits
    model.add_adapter(adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "model")
    assert refers(tmp_path / "model")
    for loaded in (load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert same(loaded, model) and not torch.equal(loaded(ids()).logits, plain)
    (tmp_path / "model" / "adapter_config.json").unlink()
    assert torch.equal(load(tmp_path / "model")(ids()).logits, plain)


def test_an_adapter_on_a_changed_model_and_a_second_save_of_it(model, tmp_path):
    CHANGES["coda"](model)
    model.add_adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "0")
    load(tmp_path / "0").save_pretrained(tmp_path / "1")
    assert same(load(tmp_path / "1"), model)


def test_an_adapter_in_the_folder_is_not_put_on_a_model_without_one(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(**LORA, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "model")
    refused("holds an adapter", adapted.merge_and_unload().save_pretrained, tmp_path / "model")


def test_an_adapter_that_peft_saved_alone_is_found_through_the_auto_class(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(load(tmp_path / "model"), LoraConfig(**LORA, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), adapted)


# ------------------------------------------------------------------------------------------------------------ folders

@pytest.mark.parametrize("first, second", [("2KB", "100GB"), ("100GB", "2KB"), ("1KB", "4KB")])
def test_a_second_save_leaves_nothing_of_the_first(first, second, model, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size=first)
    (tmp_path / "model" / "model.notes.safetensors").write_text("someone's own")
    shake(model).save_pretrained(tmp_path / "model", max_shard_size=second)
    shake(model).save_pretrained(tmp_path / "fresh", max_shard_size=second)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert len(names) > 3 and names - {"model.notes.safetensors"} == {p.name for p in (tmp_path / "fresh").iterdir()}
    assert "model.notes.safetensors" in names


def test_the_second_save_is_what_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="2KB")
    shake(model).save_pretrained(tmp_path / "model")
    assert same(load(tmp_path / "model"), model)


@pytest.mark.parametrize("name", ["base", "link", "base/../base"])
def test_the_base_is_not_overwritten(name, base, model, tmp_path):
    (tmp_path / "link").symlink_to(base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for kept in (model, shake(convert(tuned(AutoModelForCausalLM.from_pretrained(base))))):
        refused("is the base's own folder", kept.save_pretrained, tmp_path / name, self_contained=True)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_one_checkpoint_a_folder(model, tmp_path):
    for option in ("variant", "distributed_checkpoint"):
        refused(f"save_pretrained: {option} isn't supported", model.save_pretrained, tmp_path / "model",
                **{option: "fp16"})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["a b", "Überall", "deep/er/still"])
def test_names_of_folders(name, model, tmp_path):
    model.save_pretrained(tmp_path / name)
    assert same(load(str(tmp_path / name)), model)
    (tmp_path / "link").symlink_to(tmp_path / name)
    assert same(load(tmp_path / "link"), model)
    model.save_pretrained(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and same(load(tmp_path / name), model)


def test_files_that_others_link_to_are_replaced_not_written_into(model, tmp_path):
    """As in a clone of the hub's cache, whose snapshots are links into one store."""
    model.save_pretrained(tmp_path / "model")
    store = (tmp_path / "model" / "model.safetensors").rename(tmp_path / "blob")
    before = store.read_bytes()
    (tmp_path / "model" / "model.safetensors").symlink_to(store)
    assert same(load(tmp_path / "model"), model)
    shake(model).save_pretrained(tmp_path / "model")
    assert store.read_bytes() == before and same(load(tmp_path / "model"), model)


# ------------------------------------------------------------------------------------------- what stands beside it

def test_the_generation_configuration_is_a_copy(base):
    memory = AutoModelForCausalLM.from_pretrained(base)
    model = convert(memory)
    model.generation_config.max_new_tokens = 3
    assert memory.generation_config.max_new_tokens is None
    model.config.base.rms_norm_eps = 1.0
    assert memory.config.rms_norm_eps != 1.0


def test_the_bases_tokenizer_goes_with_the_kept_layers_and_another_one_stays(base, tmp_path):
    tokenizer().save_pretrained(base)
    model = convert(base)
    model.save_pretrained(tmp_path / "model", self_contained=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w7 w9")["input_ids"] == [7, 9]
    model.save_pretrained(tmp_path / "reference")
    assert not (tmp_path / "reference" / "tokenizer.json").exists()
    tokenizer(8).save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "own", self_contained=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "own")("w7 w9")["input_ids"] == [7, 0]
    model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path / "grown")
    assert not (tmp_path / "grown" / "tokenizer.json").exists()  # it doesn't know the new tokens


def uploaded(monkeypatch):
    """What the hub would be asked for: the repository, and its files by name."""
    asked = {}

    class Hub:
        def create_repo(self, repo_id, **options):
            asked["repository"], asked["options"] = repo_id, options
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def create_commit(self, repo_id, operations, **options):
            asked["commit"] = repo_id
            asked["files"] = {}
            for operation in operations:
                with operation.as_file() as file:
                    asked["files"][operation.path_in_repo] = file.read()

    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", Hub)
    card = type("Card", (), {"save": lambda self, path: open(path, "w").close()})
    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *args, **options: card(), raising=False)
    return asked


@pytest.mark.parametrize("how", [
    lambda model, folder: model.save_pretrained(folder, push_to_hub=True, token="t"),
    lambda model, folder: model.save_pretrained(folder / "elsewhere", push_to_hub=True, repo_id="my-model"),
    lambda model, folder: model.push_to_hub("my-model", private=True),
])
def test_a_pushed_model_is_named_by_its_folder_and_needs_no_folder_of_ours(how, model, tmp_path, monkeypatch):
    asked = uploaded(monkeypatch)
    how(model, tmp_path / "my-model")
    assert asked["repository"] == "my-model" and asked["commit"] == "me/my-model"
    (tmp_path / "there").mkdir()
    for name, content in asked["files"].items():
        (tmp_path / "there" / name).write_bytes(content)
    assert {"config.json", "model.safetensors", "modeling_ouroboros.py"} <= asked["files"].keys()
    shutil.rmtree(tmp_path / "base")
    assert same(load(tmp_path / "there"), model)


def test_a_pushed_model_holds_what_was_saved(model, tmp_path, monkeypatch):
    """Of a base that others have too, so that a reference would do."""
    asked = uploaded(monkeypatch)
    model.config.base_reference |= {"name": "someone/base", "revision": "0123"}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["recurrence.gate.linear.bias"] += 1
    model.save_pretrained(tmp_path / "model", self_contained=True, state_dict=state, push_to_hub=True)
    assert asked["files"]["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    model.save_pretrained(tmp_path / "refers", push_to_hub=True)
    assert len(asked["files"]["model.safetensors"]) < (tmp_path / "model" / "model.safetensors").stat().st_size / 2


# -------------------------------------------------------------------------------------------------------- the Trainer

def trainer(model, folder, **options):
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 9)]
    options = dict(max_steps=4, save_steps=1, eval_steps=1, eval_strategy="steps", report_to=[], use_cpu=True,
                   learning_rate=0.01, disable_tqdm=True, load_best_model_at_end=True) | options
    return Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("coda", [False, True])
def test_the_trainers_best_checkpoint_is_the_model_that_it_ends_with(coda, model, tmp_path):
    model.base.model.layers[2].requires_grad_(coda)
    found = trainer(model, tmp_path / "run", metric_for_best_model="loss", greater_is_better=True)  # so: not the last
    found.train()
    best = tmp_path / "run" / "checkpoint-1"
    assert found.state.best_model_checkpoint == str(best) and refers(best) != coda
    assert same(load(best), model)
    assert not same(load(tmp_path / "run" / "checkpoint-4"), model)


def test_a_split_that_was_edited_is_not_referred_to(model, tmp_path):
    model.config.recurrent_layer = 2  # the tensors are those of layer 3 still
    model.save_pretrained(tmp_path / "model")
    assert same(load(tmp_path / "model"), model)


def test_weights_in_training_are_saved_though_they_have_not_moved_yet(model, tmp_path):
    """Else the Trainer's best checkpoint, read into the model that trained on, would leave them where they went."""
    model.base.model.layers[2].requires_grad_(True)
    refused("weights of the base are trained", model.save_pretrained, tmp_path / "model", self_contained=False)
