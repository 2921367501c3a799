"""Mixtral 8x7B and 8x22B. llama.cpp knows them as `llama` with experts, and turns the rows of queries and keys."""

from kt_vllm.families.schema import (
    COMMON_CHECKS,
    COMPUTED,
    EMBEDDINGS,
    DenseName,
    HFFields,
    ModelFamily,
    MoELayers,
    field,
    same,
)

FAMILY = ModelFamily(
    gguf_architecture="llama",
    hf_model_types=("mixtral",),
    checks=(
        *COMMON_CHECKS,
        field("block_count", "num_hidden_layers", required=True),
        field("expert_count", "num_local_experts", required=True),
        field("feed_forward_length", "intermediate_size", required=True),
        field("attention.head_count_kv", "num_key_value_heads", required=True),
    ),
    moe_layers=MoELayers(),
    fields=HFFields(num_experts="num_local_experts", intermediate_size="intermediate_size"),
    global_names=EMBEDDINGS,
    layer_names=(
        same("attn_norm.weight", "input_layernorm.weight", "hidden_size"),
        DenseName(("attn_q.weight",), "self_attn.q_proj.weight", "llama_rope_rows", ("num_attention_heads",)),
        DenseName(("attn_k.weight",), "self_attn.k_proj.weight", "llama_rope_rows", ("num_key_value_heads",)),
        same("attn_v.weight", "self_attn.v_proj.weight"),
        same("attn_output.weight", "self_attn.o_proj.weight"),
        same("ffn_norm.weight", "post_attention_layernorm.weight", "hidden_size"),
        same("ffn_gate_inp.weight", "block_sparse_moe.gate.weight", "num_local_experts", "hidden_size"),
    ),
    ignored=(
        ("rope_freqs.weight", COMPUTED),
        ("attn_rot_embd.weight", COMPUTED),
    ),
)
