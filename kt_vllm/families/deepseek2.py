"""DeepSeek-V2, V2-Lite, V2.5, V3, V3.1, R1 and R1-0528; Moonlight and Kimi-K2, which are DeepSeek-V3 in other sizes."""

from kt_vllm.families.schema import (
    BLOCKS_WITH_MTP,
    COMMON_CHECKS,
    COMPUTED,
    EMBEDDINGS,
    GROUPED_EXPERTS_CHECKS,
    MTP,
    SCORING,
    DenseName,
    FieldCheck,
    ModelFamily,
    MoELayers,
    NeedsSetting,
    field,
    router,
    same,
)

_CORRECTION_BIAS = "mlp.gate.e_score_correction_bias"

FAMILY = ModelFamily(
    gguf_architecture="deepseek2",
    hf_model_types=("deepseek_v2", "deepseek_v3", "kimi_k2"),
    checks=(
        *COMMON_CHECKS,
        BLOCKS_WITH_MTP,
        *GROUPED_EXPERTS_CHECKS,
        FieldCheck("expert_gating_func", (("scoring_func",),), values=SCORING),
        field("attention.q_lora_rank", "q_lora_rank", required=True),
        field("attention.kv_lora_rank", "kv_lora_rank", required=True),
        FieldCheck("attention.key_length_mla", (("qk_nope_head_dim", "qk_rope_head_dim"),)),
        field("attention.value_length_mla", "v_head_dim"),
        field("rope.dimension_count", "qk_rope_head_dim"),
    ),
    moe_layers=MoELayers(first_dense="first_k_dense_replace", every="moe_layer_freq"),
    global_names=EMBEDDINGS,
    layer_names=(
        same("attn_norm.weight", "input_layernorm.weight", "hidden_size"),
        same("attn_q.weight", "self_attn.q_proj.weight"),  # V2-Lite, Moonlight: no low-rank queries
        same("attn_q_a.weight", "self_attn.q_a_proj.weight"),
        same("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"),
        same("attn_q_b.weight", "self_attn.q_b_proj.weight"),
        same("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        same("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"),
        same("attn_kv_b.weight", "self_attn.kv_b_proj.weight"),  # before llama.cpp's MLA support, April 2025
        DenseName(("attn_k_b.weight", "attn_v_b.weight"), "self_attn.kv_b_proj.weight", "mla_kv_b"),
        same("attn_output.weight", "self_attn.o_proj.weight"),
        same("ffn_norm.weight", "post_attention_layernorm.weight", "hidden_size"),
        same("ffn_gate.weight", "mlp.gate_proj.weight", layers="dense"),
        same("ffn_up.weight", "mlp.up_proj.weight", layers="dense"),
        same("ffn_down.weight", "mlp.down_proj.weight", layers="dense"),
        router("ffn_gate_inp.weight", "mlp.gate.weight", "n_routed_experts", "hidden_size"),
        router("exp_probs_b.bias", _CORRECTION_BIAS, "n_routed_experts"),
        router("exp_probs_b", _CORRECTION_BIAS, "n_routed_experts"),  # early DeepSeek-V3 files
        same("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight", layers="moe"),
        same("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight", layers="moe"),
        same("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight", layers="moe"),
    ),
    needs=(
        NeedsSetting(_CORRECTION_BIAS, "topk_method", "noaux_tc"),
        # vLLM takes softmax where config.json is silent, and expert_gating_func is younger than DeepSeek-V3's files.
        NeedsSetting(_CORRECTION_BIAS, "scoring_func", "sigmoid"),
    ),
    ignored=(
        ("rope_freqs.weight", COMPUTED),
        ("nextn.", MTP),
    ),
    mtp_reason=MTP,
    kept=("self_attn.kv_b_proj",),  # MLA's absorbed halves
    replicated=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
)
