"""GLM-4.5 and GLM-4.5-Air. Their files carry a multi-token-prediction layer behind the last one."""

from kt_vllm.families.schema import (
    BLOCKS_WITH_MTP,
    COMMON_CHECKS,
    EMBEDDINGS,
    GROUPED_EXPERTS_CHECKS,
    MTP,
    ModelFamily,
    MoELayers,
    NeedsSetting,
    field,
    router,
    same,
)

FAMILY = ModelFamily(
    gguf_architecture="glm4moe",
    hf_model_types=("glm4_moe",),
    checks=(
        *COMMON_CHECKS,
        BLOCKS_WITH_MTP,
        *GROUPED_EXPERTS_CHECKS,
        field("attention.head_count_kv", "num_key_value_heads", required=True),
        field("attention.key_length", "head_dim"),
    ),
    moe_layers=MoELayers(first_dense="first_k_dense_replace"),
    global_names=EMBEDDINGS,
    layer_names=(
        same("attn_norm.weight", "input_layernorm.weight", "hidden_size"),
        same("attn_q.weight", "self_attn.q_proj.weight"),
        same("attn_q.bias", "self_attn.q_proj.bias"),
        same("attn_q_norm.weight", "self_attn.q_norm.weight"),  # GLM-4.5 has them, Air has not
        same("attn_k.weight", "self_attn.k_proj.weight"),
        same("attn_k.bias", "self_attn.k_proj.bias"),
        same("attn_k_norm.weight", "self_attn.k_norm.weight"),
        same("attn_v.weight", "self_attn.v_proj.weight"),
        same("attn_v.bias", "self_attn.v_proj.bias"),
        same("attn_output.weight", "self_attn.o_proj.weight"),
        same("post_attention_norm.weight", "post_attention_layernorm.weight", "hidden_size"),
        same("ffn_gate.weight", "mlp.gate_proj.weight", layers="dense"),
        same("ffn_up.weight", "mlp.up_proj.weight", layers="dense"),
        same("ffn_down.weight", "mlp.down_proj.weight", layers="dense"),
        router("ffn_gate_inp.weight", "mlp.gate.weight", "n_routed_experts", "hidden_size"),
        router("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", "n_routed_experts"),
        router("exp_probs_b", "mlp.gate.e_score_correction_bias", "n_routed_experts"),
        same("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight", layers="moe"),
        same("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight", layers="moe"),
        same("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight", layers="moe"),
    ),
    needs=(
        NeedsSetting("self_attn.q_proj.bias", "attention_bias", True),
        NeedsSetting("self_attn.q_norm.weight", "use_qk_norm", True),
    ),
    ignored=(("nextn.", MTP),),
    mtp_reason=MTP,
    # There vLLM divides the shared experts by it, so that sums stay small, and only DeepSeek's layers make up for that.
    float16_scale="routed_scaling_factor",
)
