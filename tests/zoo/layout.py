"""What llama.cpp's converter makes of a Hugging Face model: tensors by name, and the metadata beside them.

A tensor is given as a view of the parameter: what is written into the view is in the model. Names and rules were compared
with files of the converter itself, for every model of the zoo.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from tests.zoo.models import Config, Model

_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# In a layer. What GLM-4.5 calls otherwise is in _OF_GLM.
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_expert.{p}_proj": f"ffn_{p}_shexp" for p in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{p}_proj": f"ffn_{p}_shexp" for p in ("gate", "up", "down")},
}
_OF_GLM = {"post_attention_layernorm.weight": "post_attention_norm.weight"}


def tensors(model: nn.Module, architecture: str, config: Config) -> Iterator[tuple[str, Tensor]]:
    """(name in the GGUF, the part of the model's own memory it is) for all parameters and correction biases."""
    for name, value in model.state_dict(keep_vars=False).items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if not match:
            yield _GLOBAL[name], value
            continue
        for inner, view in _in_layer(match[2], value, architecture, config):
            yield f"blk.{match[1]}.{inner}", view


def _in_layer(name: str, value: Tensor, architecture: str, config: Config) -> Iterator[tuple[str, Tensor]]:
    if name == "mlp.experts.gate_up_proj":  # [experts, 2 * intermediate, hidden]
        half = value.shape[1] // 2
        yield "ffn_gate_exps.weight", value[:, :half]
        yield "ffn_up_exps.weight", value[:, half:]
    elif name == "self_attn.kv_b_proj.weight":  # [heads * (nope + v), kv_lora]
        heads = value.unflatten(0, (config["num_attention_heads"], -1))
        nope = config["qk_nope_head_dim"]
        yield "attn_k_b.weight", heads[:, :nope].transpose(1, 2)
        yield "attn_v_b.weight", heads[:, nope:]
    else:
        table = _LAYER | (_OF_GLM if architecture == "glm4moe" else {})
        stem, _, kind = name.rpartition(".")
        inner = table.get(name) or f"{table[stem]}.{kind}"
        if architecture == "llama" and inner in ("attn_q.weight", "attn_k.weight"):
            heads = config["num_attention_heads" if inner == "attn_q.weight" else "num_key_value_heads"]
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2)  # row i and i + half side by side
        yield inner, value


def written_shape(name: str, view: Tensor, architecture: str) -> tuple[int, ...]:
    """The shape in the GGUF, in torch's order."""
    if architecture == "llama" and view.dim() == 4:
        return (view.shape[0] * view.shape[1] * view.shape[2], view.shape[3])
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return (view.shape[-1],)
    return tuple(view.shape)


def mtp_tensors(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of some tensors of the layers behind the last one; the main model uses none of them."""
    for i in range(model.mtp_layers):
        hidden = model.config["hidden_size"]
        experts, intermediate = model.config["n_routed_experts"], model.config["moe_intermediate_size"]
        blk = f"blk.{model.config['num_hidden_layers'] + i}"
        yield f"{blk}.attn_norm.weight", (hidden,)
        yield f"{blk}.ffn_gate_exps.weight", (experts, intermediate, hidden)
        yield f"{blk}.nextn.eh_proj.weight", (hidden, 2 * hidden)
        yield f"{blk}.nextn.enorm.weight", (hidden,)
        yield f"{blk}.nextn.hnorm.weight", (hidden,)
        yield f"{blk}.nextn.shared_head_norm.weight", (hidden,)


# Metadata key -> field of config.json, in the converter's order; a field that config.json leaves out is left out.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_KEYS_OF: Mapping[str, Mapping[str, str]] = {
    "deepseek2": {
        "leading_dense_block_count": "first_k_dense_replace",
        "vocab_size": "vocab_size",
        "attention.q_lora_rank": "q_lora_rank",
        "attention.kv_lora_rank": "kv_lora_rank",
        "attention.value_length": "kv_lora_rank",
        "attention.value_length_mla": "v_head_dim",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "expert_weights_scale": "routed_scaling_factor",
        "rope.dimension_count": "qk_rope_head_dim",
    },
    "glm4moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "leading_dense_block_count": "first_k_dense_replace",
        "expert_weights_scale": "routed_scaling_factor",
        "nextn_predict_layers": "num_nextn_predict_layers",
    },
    "qwen2moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
    "llama": {"vocab_size": "vocab_size"},
}


def metadata(model: Model) -> dict[str, object]:
    """Keys without the architecture."""
    config, architecture = model.config, model.architecture
    fields = _KEYS | _KEYS_OF[architecture]
    values: dict[str, object] = {"block_count": config["num_hidden_layers"] + model.mtp_layers}
    values |= {key: config[name] for key, name in fields.items() if config.get(name) is not None}
    values["rope.freq_base"] = float(config["rope_theta"])
    experts = (config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    values["expert_count"] = next(count for count in experts if count is not None)
    if config.get("norm_topk_prob") and architecture in ("deepseek2", "glm4moe"):
        values["expert_weights_norm"] = True
    scoring = "sigmoid" if architecture == "glm4moe" else config.get("scoring_func")
    if scoring:
        values["expert_gating_func"] = {"softmax": 1, "sigmoid": 2}[scoring]
    if "head_dim" in config:
        values["attention.key_length"] = values["attention.value_length"] = config["head_dim"]
    if architecture == "deepseek2":
        values["attention.head_count_kv"] = 1
        values["attention.key_length"] = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        values["attention.key_length_mla"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    elif architecture == "llama":
        values["rope.dimension_count"] = config["hidden_size"] // config["num_attention_heads"]
    elif architecture == "glm4moe":
        values["rope.dimension_count"] = int(config["head_dim"] * config["partial_rotary_factor"])
    yarn = config.get("rope_scaling")
    if yarn:
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(yarn["factor"]),
            "rope.scaling.original_context_length": yarn["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * yarn["mscale_all_dim"],
            "rope.scaling.yarn_beta_fast": float(yarn["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(yarn["beta_slow"]),
        }
    return values


def is_float32(name: str, view: Tensor) -> bool:
    """Whether llama.cpp's converter and quantiser leave the tensor in float32."""
    return view.dim() == 1 or "ffn_gate_inp" in name
