"""Every model family as data: how its GGUF tensors are called in Hugging Face's model, and which numbers must agree.

To add a family, add one ModelFamily to FAMILIES. Nothing else in the package knows a model or a tensor by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kt_vllm.errors import GGUFError


@dataclass(frozen=True)
class DenseName:
    """GGUF tensor(s) -> one parameter. Without the prefix `blk.N.` or `layer_prefix` when it is per layer.

    transform: a key of kt_vllm.gguf.dense.TRANSFORMS, called with the sources in order; keep_float32: the model
    computes with it in float32, so that it must not be rounded to the model's type on the way; shape: the config.json
    fields it is shaped by, where that is simple; layers: which layers have it if any has, "all", "moe" or "dense". Of
    several entries with one `hf`, the first whose sources are all there is used.
    """

    gguf: tuple[str, ...]
    hf: str
    transform: str = "copy"
    keep_float32: bool = False
    shape: tuple[str, ...] | None = None
    layers: str = "all"


@dataclass(frozen=True)
class FieldCheck:
    """The metadata value ARCHITECTURE.gguf must equal the sum of the config.json fields of one of `hf`.

    Less the value of `without`, which config.json need not know of, it may equal the first of them. A value that the
    GGUF leaves out is not checked. A field that config.json leaves out is an error if `required`.
    """

    gguf: str
    hf: tuple[tuple[str, ...], ...]
    required: bool = False
    without: str | None = None


@dataclass(frozen=True)
class MoELayers:
    """Which layers have routed experts: i >= first_dense and (i + shift) % every == 0 and i not in dense_list.

    Each is the name of a config.json field (None, or a field that is not there: no such restriction).
    """

    first_dense: str | None = None
    every: str | None = None
    shift: int = 0
    dense_list: str | None = None


@dataclass(frozen=True)
class ExpertNames:
    """Routed experts of a layer, without `blk.N.`.

    gate, up, down: all experts stacked, [num_experts, rows, cols]; gate_up: each one's gate rows, then its up rows;
    *_each: a tensor an expert, [rows, cols], as llama.cpp wrote them before April 2024.
    """

    gate: str = "ffn_gate_exps.weight"
    up: str = "ffn_up_exps.weight"
    down: str = "ffn_down_exps.weight"
    gate_up: str = "ffn_gate_up_exps.weight"
    gate_each: str = "ffn_gate.{expert}.weight"
    up_each: str = "ffn_up.{expert}.weight"
    down_each: str = "ffn_down.{expert}.weight"


@dataclass(frozen=True)
class HFFields:
    """The config.json fields whose values the executor's tensors are shaped by."""

    num_layers: str = "num_hidden_layers"
    hidden_size: str = "hidden_size"
    num_experts: str = "n_routed_experts"
    intermediate_size: str = "moe_intermediate_size"


@dataclass(frozen=True)
class NeedsSetting:
    """A tensor that vLLM has a parameter for only if config.json has this value; without it answers would be wrong."""

    hf: str
    field: str
    value: object


@dataclass(frozen=True)
class ModelFamily:
    """One `general.architecture`. See the classes above for what each part means.

    ignored: tensors no parameter stands for, with the reason a user is told; a name ending in "." stands for all that
    begin with it. mtp_reason: why layers from num_layers on are left out (None: they are an error).
    """

    gguf_architecture: str
    hf_model_types: tuple[str, ...]
    checks: tuple[FieldCheck, ...]
    moe_layers: MoELayers
    global_names: tuple[DenseName, ...]
    layer_names: tuple[DenseName, ...]
    experts: ExpertNames = ExpertNames()
    fields: HFFields = HFFields()
    needs: tuple[NeedsSetting, ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    mtp_reason: str | None = None
    output: str = "lm_head.weight"  # not a parameter of its own where config.json has tie_word_embeddings
    layer_prefix: str = "model.layers.{layer}."


def _same(gguf: str, hf: str, *shape: str, keep_float32: bool = False, layers: str = "all") -> DenseName:
    return DenseName((gguf,), hf, keep_float32=keep_float32, shape=shape or None, layers=layers)


def _router(gguf: str, hf: str, *shape: str) -> DenseName:
    """vLLM computes the choice of experts in float32."""
    return _same(gguf, hf, *shape, keep_float32=True, layers="moe")


_EMBEDDINGS = (
    _same("token_embd.weight", "model.embed_tokens.weight", "vocab_size", "hidden_size"),
    _same("output_norm.weight", "model.norm.weight", "hidden_size"),
    _same("output.weight", "lm_head.weight", "vocab_size", "hidden_size"),
    _same("token_embd.weight", "lm_head.weight", "vocab_size", "hidden_size"),  # a file without output.weight
)

_COMPUTED = "vLLM computes the rotary frequencies from config.json"
_MTP = "a multi-token-prediction layer, which the main model does not use"

_DEEPSEEK2 = ModelFamily(
    gguf_architecture="deepseek2",
    hf_model_types=("deepseek_v2", "deepseek_v3"),
    checks=(
        FieldCheck("embedding_length", (("hidden_size",),), required=True),
        FieldCheck(
            "block_count",
            (("num_hidden_layers",), ("num_hidden_layers", "num_nextn_predict_layers")),
            required=True,
            without="nextn_predict_layer_count",
        ),
        FieldCheck("expert_count", (("n_routed_experts",),), required=True),
        FieldCheck("expert_used_count", (("num_experts_per_tok",),), required=True),
        FieldCheck("expert_feed_forward_length", (("moe_intermediate_size",),), required=True),
        FieldCheck("expert_shared_count", (("n_shared_experts",),)),
        FieldCheck("expert_group_count", (("n_group",),)),
        FieldCheck("expert_group_used_count", (("topk_group",),)),
        FieldCheck("expert_weights_norm", (("norm_topk_prob",),)),
        FieldCheck("leading_dense_block_count", (("first_k_dense_replace",),)),
        FieldCheck("feed_forward_length", (("intermediate_size",),)),
        FieldCheck("vocab_size", (("vocab_size",),), required=True),
        FieldCheck("attention.head_count", (("num_attention_heads",),), required=True),
        FieldCheck("attention.q_lora_rank", (("q_lora_rank",),), required=True),
        FieldCheck("attention.kv_lora_rank", (("kv_lora_rank",),), required=True),
        FieldCheck("attention.key_length_mla", (("qk_nope_head_dim", "qk_rope_head_dim"),)),
        FieldCheck("attention.value_length_mla", (("v_head_dim",),)),
        FieldCheck("rope.dimension_count", (("qk_rope_head_dim",),)),
    ),
    moe_layers=MoELayers(first_dense="first_k_dense_replace", every="moe_layer_freq"),
    global_names=_EMBEDDINGS,
    layer_names=(
        _same("attn_norm.weight", "input_layernorm.weight", "hidden_size"),
        _same("attn_q.weight", "self_attn.q_proj.weight"),  # V2-Lite: no low-rank queries
        _same("attn_q_a.weight", "self_attn.q_a_proj.weight"),
        _same("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"),
        _same("attn_q_b.weight", "self_attn.q_b_proj.weight"),
        _same("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        _same("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"),
        _same("attn_kv_b.weight", "self_attn.kv_b_proj.weight"),  # before llama.cpp's MLA support, April 2025
        DenseName(("attn_k_b.weight", "attn_v_b.weight"), "self_attn.kv_b_proj.weight", "mla_kv_b"),
        _same("attn_output.weight", "self_attn.o_proj.weight"),
        _same("ffn_norm.weight", "post_attention_layernorm.weight", "hidden_size"),
        _same("ffn_gate.weight", "mlp.gate_proj.weight", layers="dense"),
        _same("ffn_up.weight", "mlp.up_proj.weight", layers="dense"),
        _same("ffn_down.weight", "mlp.down_proj.weight", layers="dense"),
        _router("ffn_gate_inp.weight", "mlp.gate.weight", "n_routed_experts", "hidden_size"),
        _router("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", "n_routed_experts"),
        _router("exp_probs_b", "mlp.gate.e_score_correction_bias", "n_routed_experts"),  # early DeepSeek-V3 files
        _same("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight", layers="moe"),
        _same("ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight", layers="moe"),
        _same("ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight", layers="moe"),
    ),
    needs=(NeedsSetting("mlp.gate.e_score_correction_bias", "topk_method", "noaux_tc"),),
    ignored=(
        ("rope_freqs.weight", _COMPUTED),
        ("nextn.", _MTP),
    ),
    mtp_reason=_MTP,
)

FAMILIES: Mapping[str, ModelFamily] = {f.gguf_architecture: f for f in (_DEEPSEEK2,)}


def find_family(gguf_architecture: str, hf_model_type: str | None = None) -> ModelFamily:
    """The family of a GGUF's general.architecture; with hf_model_type, that of config.json is checked to belong to it.

    Raises GGUFError naming what is supported.
    """
    family = FAMILIES.get(gguf_architecture)
    if family is None:
        raise GGUFError(
            f"the GGUF file has architecture {gguf_architecture!r}, which is not supported: use one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if hf_model_type is not None and hf_model_type not in family.hf_model_types:
        raise GGUFError(
            f"the GGUF file has architecture {gguf_architecture!r} and config.json has model_type {hf_model_type!r}, "
            f"where one of {', '.join(family.hf_model_types)} is expected: give the model folder that belongs to the "
            "GGUF file"
        )
    return family
