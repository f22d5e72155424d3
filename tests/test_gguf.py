"""GGUF bases: read, converted, saved and loaded again; broken, incomplete and packed ones are refused."""

import importlib.util

import pytest
import torch
from gguf import RopeScalingType
from gguf_files import rotary_order, small_llama, write_gguf
from models import OPTIONS, refused, shake
from transformers import AutoModelForCausalLM, GgufConfig

from ouroboros import OuroborosForCausalLM
from ouroboros.model import surgery
from ouroboros.model.checkpoint import Checkpoint, read_gguf, sha256, tensors_of

IDS = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def convert(base, **options):
    torch.manual_seed(1)
    return OuroborosForCausalLM.from_base(base, 1, 3, 1, **OPTIONS | options).eval()


def loaded(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="small.gguf", **how).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_an_unquantised_file_gives_the_model_that_it_was_written_from(tied, tmp_path):
    model = small_llama(tie_word_embeddings=tied)
    read = read_gguf(write_gguf(tmp_path / "small.gguf", model))
    assert sha256(tensors_of(read)) == sha256(tensors_of(model))
    assert torch.equal(read(IDS).logits, model(IDS).logits) and not read.training


def test_a_quantised_file_is_dequantised_to_within_half_a_step(tmp_path):
    model = small_llama()
    read = read_gguf(write_gguf(tmp_path / "small.gguf", model, "Q8_0"))
    gate, exact = (m.model.layers[2].mlp.gate_proj.weight for m in (read, model))
    step = exact.abs().max() / 127
    assert 0 < (gate - exact).abs().max() < 0.6 * step  # and scales are rounded to half precision
    assert read.dtype == torch.float32


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_every_way_to_name_the_file_converts_the_same(kind, tmp_path):
    file = write_gguf(tmp_path / "small.gguf", kind=kind)
    ways = [convert(file), convert(str(file)), convert(tmp_path, gguf_file="small.gguf"), convert(loaded(tmp_path)),
            convert(read_gguf(file))]
    for other in ways[1:]:
        assert torch.equal(ways[0](IDS).logits, other(IDS).logits)
        assert ways[0].config.base_reference["sha256"] == other.config.base_reference["sha256"]
    assert {way.config.base_reference.get("gguf_file") for way in ways[:4]} == {"small.gguf"}


def test_a_reference_to_a_gguf_file_is_saved_and_read_again(tmp_path):
    for number, base in enumerate([tmp_path / "small.gguf", "loaded"]):
        write_gguf(tmp_path / "small.gguf", kind="Q8_0")
        model = shake(convert(loaded(tmp_path) if base == "loaded" else base))
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        assert not any("embed_tokens" in name for name in Checkpoint(folder))  # a reference, not the layers
        assert "quantization_config" not in (folder / "config.json").read_text()
        again = OuroborosForCausalLM.from_pretrained(folder)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        again.save_pretrained(tmp_path / f"{number}-again")
        third = AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}-again")
        assert torch.equal(third(IDS).logits, model(IDS).logits)


def test_a_moved_file_or_its_tensors_as_safetensors_serve_as_the_base(tmp_path):
    file = write_gguf(tmp_path / "small.gguf", kind="Q8_0")
    model = shake(convert(file))
    model.save_pretrained(tmp_path / "model")
    read_gguf(file).save_pretrained(tmp_path / "saved")
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved" / "other.gguf")
    refused("small.gguf: can't be read", OuroborosForCausalLM.from_pretrained, tmp_path / "model")
    for base in (moved, tmp_path / "saved", read_gguf(moved)):
        again = OuroborosForCausalLM.from_pretrained(tmp_path / "model", base=base)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    torch.manual_seed(9)
    other = small_llama()
    other.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    write_gguf(file, other, "Q8_0")
    refused("sha256 .*, the checkpoint was made from", OuroborosForCausalLM.from_pretrained, tmp_path / "model")


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"quantization_config": GgufConfig(dequantize=True)}])
def test_a_model_whose_file_would_not_give_its_tensors_again_is_saved_whole(how, tmp_path):
    write_gguf(tmp_path / "small.gguf", kind="Q8_0")
    model = shake(convert(loaded(tmp_path, **how)))
    refused("no name to refer to", model.save_pretrained, tmp_path / "refused", self_contained=False)
    model.save_pretrained(tmp_path / "model")
    again = OuroborosForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_file_that_transformers_would_read_in_part_is_refused(tmp_path):
    bias = {"blk.0.attn_q.bias": torch.zeros(32)}
    for number, (wrong, complaint) in enumerate([
            (dict(left_out=["blk.2.ffn_up"]), "holds 55 tensors, .* takes 55 and misses 1"),
            (dict(more={"rope_freqs": torch.ones(4)}), "holds 57 tensors, .* takes 56 and misses 0"),
            (dict(more=bias), "holds 57 tensors"),
            (dict(rope=RopeScalingType.YARN), r"rotary positions are scaled \(yarn\)")]):
        refused(complaint, read_gguf, write_gguf(tmp_path / f"{number}.gguf", **wrong))


def test_a_broken_file_is_refused(tmp_path):
    file = write_gguf(tmp_path / "small.gguf")
    content = file.read_bytes()
    for cut in (0, 3, 100, len(content) // 2, len(content) - 40):
        file.write_bytes(content[:cut])
        refused(r"small.gguf: .*can't (be )?read", read_gguf, file)
    file.write_bytes(b"not at all a GGUF file" * 10)
    refused("small.gguf: can't be read as GGUF", convert, file)
    refused("none.gguf", convert, tmp_path / "none.gguf")


def test_without_the_package_that_reads_it_nothing_is_read(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "small.gguf")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    refused("package 'gguf'.*requirements.lock", convert, file)


def test_packed_weights_are_refused(tmp_path):
    model = small_llama()
    packed = torch.zeros(32, 34, dtype=torch.uint8)  # as transformers keeps blocks of Q8_0
    model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    refused("q_proj.weight is torch.uint8, packed by a quantiser", surgery.open_base, model)


def test_rows_are_reordered_as_llama_cpp_does():
    # one head of four rows: those of a rotated pair are 0 and 2, 1 and 3
    assert rotary_order(torch.arange(4.0)[:, None], 1).flatten().tolist() == [0, 2, 1, 3]
