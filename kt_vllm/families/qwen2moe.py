"""Qwen2-MoE: Qwen2-57B-A14B and Qwen1.5-MoE-A2.7B. A sigmoid gate scales the shared expert."""

from kt_vllm.families.schema import (
    COMMON_CHECKS,
    EMBEDDINGS,
    DenseName,
    HFFields,
    ModelFamily,
    MoELayers,
    field,
    same,
)

FAMILY = ModelFamily(
    gguf_architecture="qwen2moe",
    hf_model_types=("qwen2_moe",),
    checks=(
        *COMMON_CHECKS,
        field("block_count", "num_hidden_layers", required=True),
        field("expert_count", "num_experts", required=True),
        field("expert_feed_forward_length", "moe_intermediate_size", required=True),
        field("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        field("attention.head_count_kv", "num_key_value_heads", required=True),
    ),
    moe_layers=MoELayers(every="decoder_sparse_step", shift=1, dense_list="mlp_only_layers"),
    fields=HFFields(num_experts="num_experts"),
    global_names=EMBEDDINGS,
    layer_names=(
        same("attn_norm.weight", "input_layernorm.weight", "hidden_size"),
        same("attn_q.weight", "self_attn.q_proj.weight"),
        same("attn_q.bias", "self_attn.q_proj.bias"),
        same("attn_k.weight", "self_attn.k_proj.weight"),
        same("attn_k.bias", "self_attn.k_proj.bias"),
        same("attn_v.weight", "self_attn.v_proj.weight"),
        same("attn_v.bias", "self_attn.v_proj.bias"),
        same("attn_output.weight", "self_attn.o_proj.weight"),
        same("ffn_norm.weight", "post_attention_layernorm.weight", "hidden_size"),
        same("ffn_gate_inp.weight", "mlp.gate.weight", "num_experts", "hidden_size", layers="moe"),
        # [hidden_size] or [1, hidden_size], as the converter of the day wrote it
        DenseName(("ffn_gate_inp_shexp.weight",), "mlp.shared_expert_gate.weight", "row", layers="moe"),
        same("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight", layers="moe"),
        same("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight", layers="moe"),
        same("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight", layers="moe"),
    ),
)
