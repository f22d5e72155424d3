"""A small Llama as a GGUF file, and in a wheel."""

import hashlib
import zipfile

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

TOKENS = ["<|endoftext|>", "<|im_end|>", *bytes_to_unicode().values(), "ĠĠ", "th", "the"]
MERGES = ["Ġ Ġ", "t h", "th e"]
LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
MEMBER = "small_model/small.gguf"


def small_llama(**changes):
    """As wide as a block of Q8_0 needs."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**dict(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        rms_norm_eps=2**-10, tie_word_embeddings=True) | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rotary_order(weight, heads):
    """Rows of q or k as GGUF has them: the two of a rotated pair side by side, not half a head apart."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model=None, kind="F32", left_out=(), more=None, rope=None, tokenizer=True):
    """Write `model`; matrices are quantised as `kind` says. Returns the file."""
    model = model or small_llama()
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Small")
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32", "Q8_0": "MOSTLY_Q8_0"}[kind]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    if rope:
        writer.add_rope_scaling_type(rope)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
        writer.add_token_merges(MERGES)
        writer.add_chat_template("{{ messages }}")
    tensors = {"token_embd": state["model.embed_tokens.weight"],
               "output_norm": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        tensors["output"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for name, ours in LAYER.items():
            tensor = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            tensors[f"blk.{layer}.{name}"] = rotary_order(tensor, heads[name]) if name in heads else tensor
    for name, tensor in (tensors | (more or {})).items():
        if name not in left_out:
            used = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(tensor.numpy(), used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(path, content):
    """A wheel with one member, and what a profile pins of it but for the tensors."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, content)
        for name, lines in {"METADATA": "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n",
                            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                            "RECORD": ""}.items():
            wheel.writestr(f"small_model-1.0.dist-info/{name}", lines)
    return {"name": "small-model", "version": "1.0", "member": MEMBER, "bytes": len(content),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "member_sha256": hashlib.sha256(content).hexdigest()}
