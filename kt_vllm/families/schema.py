"""What a model family is made of, as data; one file beside this one for each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DenseName:
    """GGUF tensor(s) -> one parameter. Without the prefix `blk.N.` or `layer_prefix` when it is per layer.

    transform: a key of kt_vllm.gguf.dense.TRANSFORMS, called with the sources in order and then the config.json fields
    `arguments`; keep_float32: the model computes with it in float32, so that it must not be rounded to the model's
    type on the way; shape: the config.json fields it is shaped by, where that is simple; layers: which layers have it
    if any has, "all", "moe" or "dense". Of several entries with one `hf`, the first whose sources are all there is
    used.
    """

    gguf: tuple[str, ...]
    hf: str
    transform: str = "copy"
    arguments: tuple[str, ...] = ()
    keep_float32: bool = False
    shape: tuple[str, ...] | None = None
    layers: str = "all"


@dataclass(frozen=True)
class FieldCheck:
    """The metadata value ARCHITECTURE.gguf must equal the sum of the config.json fields of one of `hf`.

    values: (in the GGUF, in config.json) where the two spell one thing differently. Less the value of `without`, which
    config.json need not know of, it may equal the first of the sums. A value that the GGUF leaves out is not checked. A
    field that config.json leaves out is an error if `required`.
    """

    gguf: str
    hf: tuple[tuple[str, ...], ...]
    required: bool = False
    values: tuple[tuple[int, str], ...] = ()
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
    """A tensor that vLLM has a parameter for only if config.json has this value; without it answers would be wrong.

    hf: the parameter's name, in global_names or layer_names.
    """

    hf: str
    field: str
    value: object


@dataclass(frozen=True)
class ModelFamily:
    """One `general.architecture`. See the classes above for what each part means.

    ignored: tensors no parameter stands for, with the reason a user is told; a name ending in "." stands for all that
    begin with it. mtp_reason: why layers from num_layers on are left out (None: they are an error). float16_scale: the
    config.json field whose value vLLM's model loses in float16, unless it is 1.
    output: the head's weight. Of vLLM's model, modules of a layer: kept, which stay in the model's type, as vLLM
    computes with views of them and of others would keep a second, dequantised copy; replicated, which tensor
    parallelism does not cut.
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
    float16_scale: str | None = None
    output: str = "lm_head.weight"  # not a parameter of its own where config.json has tie_word_embeddings
    layer_prefix: str = "model.layers.{layer}."
    kept: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()


def same(gguf: str, hf: str, *shape: str, keep_float32: bool = False, layers: str = "all") -> DenseName:
    """One tensor that is the parameter as it is."""
    return DenseName((gguf,), hf, keep_float32=keep_float32, shape=shape or None, layers=layers)


def router(gguf: str, hf: str, *shape: str) -> DenseName:
    """One tensor of the choice of experts, where vLLM computes that in float32."""
    return same(gguf, hf, *shape, keep_float32=True, layers="moe")


def field(gguf: str, hf: str, required: bool = False) -> FieldCheck:
    """The metadata value `gguf` is the config.json field `hf`."""
    return FieldCheck(gguf, ((hf,),), required)


EMBEDDINGS = (
    same("token_embd.weight", "model.embed_tokens.weight", "vocab_size", "hidden_size"),
    same("output_norm.weight", "model.norm.weight", "hidden_size"),
    same("output.weight", "lm_head.weight", "vocab_size", "hidden_size"),
    same("token_embd.weight", "lm_head.weight", "vocab_size", "hidden_size"),  # a file without output.weight
)

# Layers, where the file may count those of multi-token prediction, which config.json has a field for or leaves out.
BLOCKS_WITH_MTP = FieldCheck(
    "block_count",
    (("num_hidden_layers",), ("num_hidden_layers", "num_nextn_predict_layers")),
    required=True,
    without="nextn_predict_layer_count",
)

# Of every family: what its files have, must be in config.json.
COMMON_CHECKS = (
    field("embedding_length", "hidden_size", required=True),
    field("expert_used_count", "num_experts_per_tok", required=True),
    field("vocab_size", "vocab_size", required=True),
    field("attention.head_count", "num_attention_heads", required=True),
)

# Of families with DeepSeek-V3's way of choosing experts: in groups, beside shared ones, after some dense layers.
GROUPED_EXPERTS_CHECKS = (
    field("expert_count", "n_routed_experts", required=True),
    field("expert_feed_forward_length", "moe_intermediate_size", required=True),
    field("expert_shared_count", "n_shared_experts"),
    field("expert_group_count", "n_group"),
    field("expert_group_used_count", "topk_group"),
    field("expert_weights_norm", "norm_topk_prob"),
    field("expert_weights_scale", "routed_scaling_factor"),
    field("leading_dense_block_count", "first_k_dense_replace"),
    field("feed_forward_length", "intermediate_size"),
)

# GGUF's expert_gating_func.
SCORING = ((1, "softmax"), (2, "sigmoid"))

COMPUTED = "vLLM computes the rotary frequencies from config.json"
MTP = "a multi-token-prediction layer, which the main model does not use"
