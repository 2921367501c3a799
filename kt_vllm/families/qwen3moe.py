"""Qwen3-MoE: Qwen3-30B-A3B, Qwen3-235B-A22B and their relatives. Norms on queries and keys, no shared expert."""

from kt_vllm.families.schema import COMMON_CHECKS, EMBEDDINGS, HFFields, ModelFamily, MoELayers, field, same

FAMILY = ModelFamily(
    gguf_architecture="qwen3moe",
    hf_model_types=("qwen3_moe",),
    checks=(
        *COMMON_CHECKS,
        field("block_count", "num_hidden_layers", required=True),
        field("expert_count", "num_experts", required=True),
        field("expert_feed_forward_length", "moe_intermediate_size", required=True),
        field("attention.head_count_kv", "num_key_value_heads", required=True),
        field("attention.key_length", "head_dim"),
    ),
    moe_layers=MoELayers(every="decoder_sparse_step", shift=1, dense_list="mlp_only_layers"),
    fields=HFFields(num_experts="num_experts"),
    global_names=EMBEDDINGS,
    layer_names=(
        same("attn_norm.weight", "input_layernorm.weight", "hidden_size"),
        same("attn_q.weight", "self_attn.q_proj.weight"),
        same("attn_q_norm.weight", "self_attn.q_norm.weight"),
        same("attn_k.weight", "self_attn.k_proj.weight"),
        same("attn_k_norm.weight", "self_attn.k_norm.weight"),
        same("attn_v.weight", "self_attn.v_proj.weight"),
        same("attn_output.weight", "self_attn.o_proj.weight"),
        same("ffn_norm.weight", "post_attention_layernorm.weight", "hidden_size"),
        same("ffn_gate_inp.weight", "mlp.gate.weight", "num_experts", "hidden_size", layers="moe"),
    ),
)
