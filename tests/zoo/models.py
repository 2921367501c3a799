"""Small models, one for each model family: config.json as its makers publish it, in a smaller size."""

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

VOCABULARY = 512  # the 256 bytes of a text, and as many tokens that no text has

_COMMON: Config = {
    "hidden_act": "silu",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

_DEEPSEEK: Config = _COMMON | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # vLLM's CPU attention knows 512 + 64 only
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "rope_theta": 10000,
}

_V3: Config = _DEEPSEEK | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "seq_aux": True,
    "ep_size": 1,
}


def _yarn(factor: float, original: int, **changes: float) -> Config:
    return {
        "max_position_embeddings": int(factor * original),
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": factor,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": original,
            "type": "yarn",
        }
        | changes,
    }


@dataclass(frozen=True)
class Model:
    """config: what config.json holds; mtp_layers: that many layers of multi-token prediction follow in the GGUF."""

    architecture: str
    config: Config
    mtp_layers: int = 0


MODELS: dict[str, Model] = {
    "deepseek-v2": Model(  # and V2.5
        "deepseek2",
        _DEEPSEEK
        | _yarn(40, 64, mscale=0.707, mscale_all_dim=0.707)
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "q_lora_rank": 256,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek-v2-lite": Model(
        "deepseek2",
        _DEEPSEEK
        | _yarn(40, 64, mscale=0.707, mscale_all_dim=0.707)
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "q_lora_rank": None,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
    ),
    "deepseek-v3": Model(  # and V3.1, R1, R1-0528
        "deepseek2",
        _V3
        | _yarn(40, 64)
        | {
            "q_lora_rank": 256,
            "n_routed_experts": 32,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        },
    ),
    "moonlight": Model(
        "deepseek2",
        _V3
        | {
            "q_lora_rank": None,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.446,
            "max_position_embeddings": 8192,
            "rope_theta": 50000.0,
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": 1e-5,
        },
    ),
    "kimi-k2": Model(
        "deepseek2",
        _V3
        | _yarn(32, 64, beta_fast=1.0, beta_slow=1.0)
        | {
            "model_type": "kimi_k2",
            "q_lora_rank": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "n_routed_experts": 48,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "rope_theta": 50000.0,
            "num_nextn_predict_layers": 0,
        },
    ),
    "qwen2-moe": Model(
        "qwen2moe",
        _COMMON
        | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 512,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "max_position_embeddings": 4096,
            "max_window_layers": 2,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "rope_theta": 1000000.0,
        },
    ),
    "qwen3-moe": Model(
        "qwen3moe",
        _COMMON
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "intermediate_size": 768,
            "moe_intermediate_size": 256,
            "num_experts": 32,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 4096,
            "max_window_layers": 2,
            "sliding_window": None,
            "use_sliding_window": False,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
        },
    ),
    "mixtral": Model(
        "llama",
        _COMMON
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
    ),
    "glm-4.5": Model(
        "glm4moe",
        _COMMON
        | {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "attention_bias": True,
            "use_qk_norm": True,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "partial_rotary_factor": 0.5,
            "intermediate_size": 512,
            "moe_intermediate_size": 256,
            "first_k_dense_replace": 1,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 1000000,
        },
        mtp_layers=1,
    ),
}
MODELS["glm-4.5-air"] = Model(
    "glm4moe",
    MODELS["glm-4.5"].config | {"use_qk_norm": False, "head_dim": 64, "routed_scaling_factor": 1.0},
    mtp_layers=1,
)
