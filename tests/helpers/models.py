"""Small random models of each supported family, and their conversion."""

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ouroboros import OuroborosForCausalLM
from ouroboros.errors import InputError

SHAPE = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.2, bos_token_id=1, eos_token_id=None, pad_token_id=0)
FAMILIES = {  # what each family brings: biases, norms of q and k, tied embeddings, windows
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2-window": (Qwen2ForCausalLM, Qwen2Config, dict(use_sliding_window=True, sliding_window=4,
                                                         max_window_layers=2)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(tie_word_embeddings=False, head_dim=8, attention_bias=True)),
    "llama": (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(sliding_window=4, tie_word_embeddings=False)),
}
OTHERS = {  # by model type: norms after a block, windows and positions by layer, blocks in parallel, caps, multipliers
    "olmo2": dict(),
    "olmo3": dict(sliding_window=4, rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}),
    "stablelm": dict(use_qkv_bias=True, qk_layernorm=True, use_parallel_residual=True),
    "smollm3": dict(no_rope_layers=[1, 0, 0, 1, 1, 0], sliding_window=4, use_sliding_window=True),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(head_dim=8, sliding_window=4, final_logit_softcapping=3.0, layer_types=[
        "sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention",
        "full_attention"]),
    "granite": dict(embedding_multiplier=3.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "cohere": dict(use_qk_norm=True, logit_scale=0.3),
    "cohere2": dict(sliding_window=4, logit_scale=0.3),
    "olmo": dict(clip_qkv=2.0),
    "ministral3": dict(head_dim=8),
    "exaone4": dict(sliding_window=4, head_dim=8),
    "ernie4_5": dict(head_dim=8, use_bias=True),
    "helium": dict(head_dim=4),
    "hunyuan_v1_dense": dict(head_dim=8),
    "seed_oss": dict(head_dim=8),
    "phi3": dict(sliding_window=4),
    "glm": dict(head_dim=8),
    "glm4": dict(head_dim=8),
}
OPTIONS = {"rank": 4, "alpha": 2.0, "depth": 3, "max_steps": 8, "state_width": 8, "step_width": 4, "hidden_width": 8,
           "output_width": 4}


def small_base(family="qwen2", attention="sdpa", **changes):
    torch.manual_seed(0)
    if family in OTHERS:
        config = AutoConfig.for_model(family, **SHAPE | OTHERS[family] | changes)
    else:
        _, config, options = FAMILIES[family]
        config = config(**SHAPE | options | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases at 0 and norms at 1 would hide what is forgotten
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def convert(model=None, **options):
    torch.manual_seed(1)
    model = small_base() if model is None else model
    return OuroborosForCausalLM.from_base(model, 1, 3, 1, **OPTIONS | options).eval()


def shake(model):
    """Give every trained tensor a value that matters."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.recurrence.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(batch=2, length=7, seed=3):
    return torch.randint(2, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def refused(complaint, call, *args, **kwargs):
    """The call raises InputError, in one line that matches."""
    with pytest.raises(InputError, match=complaint) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def tokenizer(words=50):
    """w0 to w49, split at blanks; w0 pads and stands for what is unknown."""
    found = Tokenizer(WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="w0")
