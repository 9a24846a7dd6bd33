"""Tiny random models of each architecture we claim, saved as a normal model directory with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

VOCAB_SIZE = 320
# One layer of each type, each with its own angles.
WINDOWS = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
    },
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}"
    "{% endif %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
}
ALL_HEADS = {"num_key_value_heads": 4}  # have keys of their own
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}  # no whole number of matrices' alignment
# Served by a program of our own, all but the last one.
ARCHITECTURES = (
    "llama", "llama-biased", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "granite", "smollm3",
    "olmo2", "olmo3", "glm", "glm4", "stablelm", "stablelm-parallel", "nemotron", "starcoder2", "phi", "cohere",
    "cohere2", "gpt2",
)  # fmt: skip
# Of other builds, served by transformers' own forward pass as GPT-2 is.
OTHER_BUILDS = (
    "stablelm-normed", "cohere-normed", "gpt-neox", "opt", "opt-350m", "qwen2-moe", "qwen3-moe", "mixtral", "phimoe",
    "gpt-oss",
)  # fmt: skip


def tiny_config(architecture: str, *, tied: bool = False) -> PreTrainedConfig:
    """Hidden size 64 (divisible by 8 blocks), two layers, grouped-query attention where the architecture has it."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": VOCAB_SIZE}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
    }
    if architecture == "gemma3-multimodal":
        vision = SiglipVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28
        )
        return Gemma3Config(
            text_config=tiny_config("gemma3"), vision_config=vision, mm_tokens_per_image=1, tie_word_embeddings=False
        )
    if architecture == "gpt2":
        return GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, **ids)
    kinds = {
        "llama": (LlamaConfig, {}),
        "llama-biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 16}),
        "mistral": (MistralConfig, {"sliding_window": 24}),
        "gemma": (GemmaConfig, {"head_dim": 16}),
        "gemma2": (
            Gemma2Config,
            {
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "attn_logit_softcapping": 0.8,
                "final_logit_softcapping": 3.0,
                "sliding_window": 24,
            },
        ),
        "gemma3": (Gemma3TextConfig, {"head_dim": 16, "query_pre_attn_scalar": 24} | WINDOWS),
        "phi3": (Phi3Config, {}),
        "granite": (
            GraniteConfig,
            {
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.2,
                "residual_multiplier": 0.4,
                "logits_scaling": 2.5,
            },
        ),
        "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0]}),
        "olmo2": (Olmo2Config, {}),
        "olmo3": (Olmo3Config, WINDOWS),
        "stablelm": (StableLmConfig, {}),
        "stablelm-parallel": (StableLmConfig, {"use_parallel_residual": True, "use_qkv_bias": True}),
        "stablelm-normed": (StableLmConfig, {"qk_layernorm": True}),
        "nemotron": (NemotronConfig, {}),
        "gpt-neox": (GPTNeoXConfig, ALL_HEADS),
        "opt": (OPTConfig, {"ffn_dim": 128} | ALL_HEADS),
        "opt-350m": (OPTConfig, {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False} | ALL_HEADS),
        "starcoder2": (Starcoder2Config, {"sliding_window": 24}),
        "phi": (PhiConfig, {}),
        "cohere": (CohereConfig, {"logit_scale": 0.5}),
        "cohere-normed": (CohereConfig, {"logit_scale": 0.5, "use_qk_norm": True}),
        "cohere2": (
            Cohere2Config,
            {"logit_scale": 0.5, "sliding_window": 24, "layer_types": WINDOWS["layer_types"]},
        ),
        "glm": (GlmConfig, {"head_dim": 16}),
        "glm4": (Glm4Config, {"head_dim": 16}),
        "qwen2-moe": (Qwen2MoeConfig, {"num_experts": 4, "shared_expert_intermediate_size": 48} | EXPERTS),
        "qwen3-moe": (Qwen3MoeConfig, {"num_experts": 4, "head_dim": 16} | EXPERTS),
        "phimoe": (PhimoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "gpt-oss": (
            GptOssConfig,
            {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 24} | YARN,
        ),
        "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    }
    kind, extra = kinds[architecture]
    return kind(**(sizes | ids | extra))


def tiny_model(architecture: str, seed: int = 0, *, tied: bool = False) -> PreTrainedModel:
    """Random weights, large enough that tokens differ and small enough that logits stay moderate."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, tied=tied)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.5 if "embed" in name or "wte" in name else 0.15)
            elif architecture != "llama":  # whose tokens tests know
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences: any text round-trips, and long words are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|start|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog", "stop here then stop there"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_model(architecture: str, folder: Path, seed: int = 0, *, tied: bool = False) -> Path:
    """A model directory as `--model` takes it."""
    tiny_model(architecture, seed, tied=tied).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
