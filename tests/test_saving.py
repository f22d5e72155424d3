"""Convert, save and load: every family, from memory and from files; wrong, truncated and altered files."""

import json
import os
import shutil

import pytest
import torch
from models import FAMILIES, OPTIONS, SHAPE, convert, ids, refused, shake, small_base
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
)

from ouroboros import OuroborosConfig, OuroborosForCausalLM
from ouroboros.model.checkpoint import Checkpoint, sha256


@pytest.fixture
def saved(tmp_path):
    """A base on disk, and a model converted from it and saved beside it."""
    small_base().save_pretrained(tmp_path / "base")
    model = shake(convert(tmp_path / "base"))
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model", tmp_path / "base"


# -------------------------------------------------------------------------------------------------------- converting

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", ["100GB", "2KB"])
def test_a_checkpoint_converts_as_the_model_in_memory_does(family, shards, tmp_path):
    model = small_base(family)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert ((tmp_path / "model.safetensors.index.json").exists()) == (shards == "2KB")
    one, other = shake(convert(model)), shake(convert(tmp_path))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert torch.equal(one(ids()).logits, other(ids()).logits)
    assert one.config.base_reference["sha256"] == other.config.base_reference["sha256"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_without_gate_and_norm_is_the_cut_model_as_its_family_computes_it(family, tmp_path):
    """The family's own forward, on a checkpoint with the kept layers alone."""
    model = small_base(family)
    config = convert(model).config
    cut = type(model)(config.base).eval()
    kept = {0: 0, 3: 1, 5: 2}
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept[int(parts[2])])
        state[".".join(parts)] = tensor
    cut.load_state_dict(state)
    looped = convert(model, modulation="none", gate=False, step_norm=False, depth=1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    for mine, its in zip(looped(ids(2, 12), attention_mask=mask, output_hidden_states=True).hidden_states,
                         cut(ids(2, 12), attention_mask=mask, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(mine[mask.bool()], its[mask.bool()], rtol=0, atol=1e-5)


def test_sliding_windows_slide():
    model, tokens = convert(small_base("mistral"), modulation="none", depth=1), ids(1, 20)
    changed = tokens.clone()
    changed[:, 0] = 1 + changed[:, 0] % 40
    same = (model(tokens).logits == model(changed).logits).all(-1)[0]
    assert not same[:4].any() and same[-1]  # 3 layers with a window of 4 see 10 tokens, not 20


@pytest.mark.parametrize("kind, config, complaint", [
    (MixtralForCausalLM, MixtralConfig(**SHAPE, num_local_experts=2), "'mixtral' isn't supported"),
    (NemotronForCausalLM, NemotronConfig(**SHAPE), "'nemotron' isn't supported"),
    (Lfm2ForCausalLM, Lfm2Config(**SHAPE, layer_types=["full_attention"] * 6), "'lfm2' isn't supported"),
    (DiffLlamaForCausalLM, DiffLlamaConfig(**SHAPE), "'diffllama' isn't supported"),  # on the layer's index
])
def test_what_is_not_supported_is_named(kind, config, complaint, tmp_path):
    model = kind(config)
    refused(complaint, convert, model)
    model.save_pretrained(tmp_path)
    refused(complaint, convert, tmp_path)


def test_a_base_that_cannot_be_read_is_refused(tmp_path):
    refused("'no/such/base': no such folder; name a folder or a repository", convert, "no/such/base")
    refused("'such/base': no such folder, and the hub doesn't give it", convert, "such/base")
    refused("holds no model.safetensors", convert, _with_config(tmp_path / "a"))
    small_base().save_pretrained(tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("b/model.safetensors: can't be read", convert, tmp_path / "b")
    small_base(hidden_size=32).save_pretrained(tmp_path / "c")
    shutil.copy(_with_config(tmp_path / "d") / "config.json", tmp_path / "c" / "config.json")
    refused(r"tensor model.embed_tokens.weight is \(50, 32\), config.json makes it \(50, 16\)", convert, tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text("{")
    refused("c/config.json: can't be read", convert, tmp_path / "c")
    small_base("llama").save_pretrained(tmp_path / "e")
    tensors = load_file(tmp_path / "e" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, tmp_path / "e" / "model.safetensors")
    refused("the checkpoint has no lm_head.weight", convert, tmp_path / "e")


def _with_config(folder):
    small_base().config.save_pretrained(folder)
    return folder


def test_a_base_of_the_hub_is_read_from_its_cache_and_named_with_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--base"
    small_base().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = convert("someone/base")
    assert model.config.base_reference | {"sha256": ""} == {"name": "someone/base", "revision": commit, "sha256": ""}
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(OuroborosForCausalLM.from_pretrained(tmp_path / "model")(ids()).logits, model(ids()).logits)


def test_half_precision_keeps_what_is_trained_in_float32(tmp_path):
    small_base().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = convert(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    for found in (model, OuroborosForCausalLM.from_pretrained(tmp_path / "model")):
        assert {p.dtype for p in found.base.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in found.recurrence.parameters()} == {torch.float32}
        assert found(ids()).logits.dtype == torch.bfloat16
    assert convert(tmp_path / "base", dtype=torch.float32).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- saving, loading

def test_a_checkpoint_refers_to_its_base_and_loads_everywhere(saved):
    model, folder, base = saved
    names = set(Checkpoint(folder))
    trained = {n for n in model.state_dict() if n.startswith("recurrence") or n.endswith((".A", ".B"))}
    assert names == trained | {"kept_sha256"}
    assert model.config.base_reference["name"] == str(base)
    assert isinstance(AutoConfig.from_pretrained(folder), OuroborosConfig)
    for loaded in (OuroborosForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(loaded(ids()).logits, model(ids()).logits) and not loaded.training
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == \
            {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", ["100GB", "2KB"])
def test_a_self_contained_checkpoint_needs_no_base(family, shards, tmp_path):
    model = shake(convert(small_base(family)))
    model.save_pretrained(tmp_path, self_contained=True, max_shard_size=shards)
    for loaded in (OuroborosForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64)
    assert eager.dtype == torch.float64 and eager.base.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids()).logits.float(), model(ids()).logits, rtol=1e-4, atol=1e-4)


def test_what_a_reference_would_lose_is_saved_whole_or_not_at_all(tmp_path):
    small_base().save_pretrained(tmp_path / "base")
    trained = convert(tmp_path / "base")
    with torch.no_grad():
        trained.base.model.layers[2].requires_grad_(True).mlp.up_proj.weight.add_(1)
    for number, (model, why) in enumerate([(convert(), "no name to refer to"),
                                           (trained, "weights of the base are trained")]):
        folder = tmp_path / str(number)
        refused(f"{why}.*; save with self_contained=True", model.save_pretrained, folder, self_contained=False)
        assert not folder.exists()
        model.save_pretrained(folder)  # as Trainer does: nothing is lost
        assert torch.equal(OuroborosForCausalLM.from_pretrained(folder)(ids()).logits, model(ids()).logits)


def test_a_wrong_base_is_refused_with_both_hashes(saved, tmp_path):
    model, folder, base = saved
    right = model.config.base_reference["sha256"]
    moved = base.rename(tmp_path / "moved")
    refused("its base can.t be had", OuroborosForCausalLM.from_pretrained, folder)
    loaded = OuroborosForCausalLM.from_pretrained(folder, base=moved)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    torch.manual_seed(5)
    other = small_base()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1  # even in a layer that isn't kept
    other.save_pretrained(base)
    refused(f"sha256 {sha256(Checkpoint(base))}, the checkpoint was made from {right}",
            OuroborosForCausalLM.from_pretrained, folder)


def test_a_truncated_or_altered_file_is_refused(saved):
    _, folder, _ = saved
    file, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused("model.safetensors: can't be read", OuroborosForCausalLM.from_pretrained, folder)
    for place in (len(whole) - 3, len(whole) // 2):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        refused("altered", OuroborosForCausalLM.from_pretrained, folder)
    file.unlink()
    refused("holds no model.safetensors", OuroborosForCausalLM.from_pretrained, folder)
    file.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config)[:-20])
    refused("config.json: can't be read", OuroborosForCausalLM.from_pretrained, folder)
    (folder / "config.json").write_text(json.dumps(config | {"base_reference": None}))
    refused("base_reference", OuroborosForCausalLM.from_pretrained, folder)


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    model, folder, _ = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        shake(model).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# -------------------------------------------------------------------------------------------------- the release's own

def released(model, heads=True, norms=True):
    """States as the release lays them out; the names are its own affair."""
    controller = {f"c{i}": tensor for i, tensor in enumerate(model.recurrence.modulation.state_dict().values())}
    if heads:
        last = list(controller)[-1]
        controller |= {f"head{i}": head.clone() for i, head in enumerate(controller.pop(last).split(4))}
    norm = model.recurrence.step_norm.weight
    return {"controller": controller, "gate": dict(model.recurrence.gate.state_dict()),
            "step_norm": {f"weights.{i}": row.clone() for i, row in enumerate(norm)} if norms else {"w": norm}}


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("norms", [True, False])
def test_a_checkpoint_of_the_release_loads(heads, norms, saved, tmp_path):
    model, _, base = saved
    torch.save(released(model, heads, norms), tmp_path / "step.pt")
    loaded = convert_release(tmp_path / "step.pt", base)
    assert loaded.config.pooling == "sequence"
    assert all(torch.equal(tensor, loaded.recurrence.state_dict()[name])
               for name, tensor in model.recurrence.state_dict().items())


def convert_release(path, base, **options):
    options = OPTIONS | options
    return OuroborosForCausalLM.from_release(path, base, n_prelude=1, recurrent_layer=3, n_coda=1, **options)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_checkpoint_that_runs_code_or_does_not_fit_is_refused(saved, tmp_path, monkeypatch):
    model, _, base = saved
    monkeypatch.chdir(tmp_path)
    torch.save(released(model) | {"optimizer": Harm()}, tmp_path / "harm.pt")
    refused("can't be read as tensors alone", convert_release, tmp_path / "harm.pt", base)
    assert not (tmp_path / "harmed").exists()
    good = tmp_path / "good.pt"
    torch.save(released(model), good)
    refused("state 'controller': nothing fits heads.weight", convert_release, good, base, rank=3)
    refused("state 'controller': nothing fits", convert_release, good, base, max_steps=4)
    torch.save({"controller": {}}, tmp_path / "few.pt")
    refused("state 'controller': nothing fits", convert_release, tmp_path / "few.pt", base)
    torch.save([1], tmp_path / "list.pt")
    refused("has no state 'controller'", convert_release, tmp_path / "list.pt", base)
    good.write_bytes(good.read_bytes()[:50])
    refused("can't be read as tensors alone", convert_release, good, base)
    refused("can't be read as tensors alone", convert_release, tmp_path / "none.pt", base)
