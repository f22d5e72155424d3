"""A base with missing, extra, misshapen or infinite tensors, and a GGUF file that lies about its sizes, are refused."""

import struct

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from ouroboros import OuroborosForCausalLM, cli
from ouroboros.errors import InputError
from ouroboros.model.checkpoint import read_gguf

UP = "model.layers.{}.mlp.up_proj.weight"


def without(tensors, layer):
    del tensors[UP.format(layer)]


def with_value(tensors, layer, value):
    tensors[UP.format(layer)][0, 0] = value


def narrow(tensors, layer):
    tensors[UP.format(layer)] = tensors[UP.format(layer)][:-1].contiguous()


def more(tensors, layer):
    tensors[f"model.layers.{layer}.mlp.side_proj.weight"] = torch.zeros(2, 2)


TENSORS = {  # what is done to a tensor of a layer, and what a run says
    "missing": (without, "misses 1 tensors, 'model.layers.{}.mlp.up_proj.weight' first"),
    "extra": (more, "has no place for 1 tensors, 'model.layers.{}.mlp.side_proj.weight' first"),
    "misshapen": (narrow, "has another shape for 1 tensors, 'model.layers.{}.mlp.up_proj.weight' first"),
    "no number": (lambda t, layer: with_value(t, layer, float("nan")), "has numbers that aren't finite in 1 tensors"),
    "infinite": (lambda t, layer: with_value(t, layer, float("inf")), "has numbers that aren't finite in 1 tensors"),
}
FILES = {  # a file, its content from what it was, what a run says
    "half the weights": ("model.safetensors", lambda content: content[:len(content) // 2], "can't be loaded"),
    "no safetensors": ("model.safetensors", lambda content: b"\x80\x04pickle" * 99, "can't be loaded"),
    "a header as long as the universe": (
        "model.safetensors", lambda content: struct.pack("<Q", 2**63) + content[8:], "can't be loaded"),
    "no JSON": ("config.json", lambda content: content[:-9], "can't be loaded"),
    "another architecture": ("config.json", lambda content: content.replace(b'"qwen2"', b'"qwen9"'), "can't be loaded"),
}
LAYERS = {"kept": 0, "looped": 3, "removed": 1}


def refused(arguments, said: str, root, capfd) -> None:
    before = {path: path.read_bytes() for path in root.glob("results/*/runs/*")}
    assert cli.main(arguments, root) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1 and said in err[0], err
    assert {path: path.read_bytes() for path in root.glob("results/*/runs/*")} == before


@pytest.fixture
def folder(profile, root, monkeypatch):
    """The base of the profile that the command line is given."""
    monkeypatch.setattr(cli, "load_profile", lambda name: profile)
    return profile.base_folder(root)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_of_the_base(case, layer, folder, root, capfd):
    spoil, said = TENSORS[case]
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors, LAYERS[layer])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(["run", "controller-d2-r4-corrected-s0"], said.format(LAYERS[layer]), root, capfd)
    with pytest.raises(InputError) as error:
        OuroborosForCausalLM.from_base(folder, 1, 3, 1, rank=4)
    assert ("side_proj" if case == "extra" else "up_proj") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_the_base(case, folder, root, capfd):
    name, spoil, said = FILES[case]
    (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    refused(["run", "controller-d2-r4-corrected-s0"], said, root, capfd)
    with pytest.raises(InputError) as error:
        OuroborosForCausalLM.from_base(folder, 1, 3, 1, rank=4)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def tensor_info(content: bytes, name: bytes) -> int:
    """Where a tensor's number of dimensions stands: u32, then u64 each, u32 kind, u64 offset."""
    return content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def patched(content: bytes, place: int, kind: str, value) -> bytes:
    return content[:place] + struct.pack(kind, value) + content[place + struct.calcsize(kind):]


def field(content: bytes, name: bytes) -> int:
    """Where a metadata value stands, after its name and its type."""
    return content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4


NAME = b"blk.1.ffn_up.weight"
LIES = {
    "more tensors than there are": lambda c: patched(c, 8, "<Q", 2**20),
    "more fields than there are": lambda c: patched(c, 16, "<Q", 2**20),
    "a row more": lambda c: patched(c, tensor_info(c, NAME) + 12, "<Q", 65),
    "a huge tensor": lambda c: patched(c, tensor_info(c, NAME) + 12, "<Q", 2**40),
    "a tensor of no rows": lambda c: patched(c, tensor_info(c, NAME) + 12, "<Q", 0),
    "a tensor of more dimensions": lambda c: patched(c, tensor_info(c, NAME), "<I", 4000),
    "a tensor beyond the end": lambda c: patched(c, tensor_info(c, NAME) + 24, "<Q", 2**50),
    "a tensor of no known kind": lambda c: patched(c, tensor_info(c, NAME) + 20, "<I", 999),
    "a layer more": lambda c: patched(c, field(c, b"llama.block_count"), "<I", 7),
    "a wider model": lambda c: patched(c, field(c, b"llama.embedding_length"), "<I", 64),
    "no heads": lambda c: patched(c, field(c, b"llama.attention.head_count"), "<I", 0),
    "a name without an end": lambda c: patched(c, tensor_info(c, NAME) - len(NAME) - 8, "<Q", 2**50),
}


def test_the_file_that_is_spoilt_below_can_be_read(tmp_path):
    assert read_gguf(write_gguf(tmp_path / "small.gguf"))


@pytest.mark.parametrize("lie", LIES)
def test_a_gguf_file_that_lies_about_its_sizes(lie, tmp_path):
    file = write_gguf(tmp_path / "small.gguf")
    file.write_bytes(LIES[lie](file.read_bytes()))
    with pytest.raises(InputError, match="small.gguf") as error:
        read_gguf(file)
    assert "\n" not in str(error.value)
