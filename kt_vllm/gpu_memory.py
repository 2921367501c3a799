"""What else than dense weights a GPU has to hold, so that --kt-gpu-quant auto can tell which of them fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kt_vllm.dense_quant import DeviceBudget

# The CUDA context, cuBLAS's and NCCL's workspaces, and vLLM's graphs of all captured batch sizes. An estimate: vLLM
# logs the graphs' part when it has captured them.
CONTEXT_AND_GRAPHS_BYTES = 1_500_000_000
# Logits are held in float32 as they are, sorted, and as probabilities, when vLLM tries its sampler.
_LOGITS_BYTES = 3 * 4
# vLLM decompresses the context of chunked prefills for so many tokens at most; the smallest is that of its pages.
_MAX_CONTEXT_TOKENS = 64 * 1024
_PAGE_TOKENS = 64
# A GPU from which on vLLM's server takes larger batches by default.
_LARGE_GPU_BYTES = 70 << 30


@dataclass(frozen=True)
class ServingLimits:
    """What the command line asks of vLLM. itemsize, kv_itemsize: bytes of a number of the model and of the KV cache."""

    max_model_len: int
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    itemsize: int = 2
    kv_itemsize: int = 2
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None


def default_batch(total: int) -> tuple[int, int]:
    """max_num_batched_tokens and max_num_seqs of vLLM's server on a GPU of `total` bytes; it settles them after us."""
    return (8192, 1024) if total >= _LARGE_GPU_BYTES else (2048, 256)


def is_mla(hf: Mapping[str, Any]) -> bool:
    return isinstance(hf.get("kv_lora_rank"), int)


def kv_bytes_per_token(hf: Mapping[str, Any], limits: ServingLimits) -> int:
    """On one GPU. hf: config.json. MLA's latent is on every GPU of a tensor-parallel group, heads are spread."""
    layers = -(-hf["num_hidden_layers"] // limits.pipeline_parallel)
    if is_mla(hf):
        numbers = hf["kv_lora_rank"] + hf["qk_rope_head_dim"]
    else:
        heads = hf.get("num_key_value_heads") or hf["num_attention_heads"]
        numbers = 2 * max(1, heads // limits.tensor_parallel) * _head_dim(hf)
    return layers * numbers * limits.kv_itemsize


def device_budget(hf: Mapping[str, Any], limits: ServingLimits, total: int, expert_bytes: int) -> DeviceBudget:
    """total: bytes of the GPU; expert_bytes: of routed experts that the rules put on GPUs."""
    asked = limits.kv_cache_memory_bytes
    devices = limits.tensor_parallel * limits.pipeline_parallel
    taken = {
        "routed experts": -(-expert_bytes // devices),
        "context and graphs": CONTEXT_AND_GRAPHS_BYTES,
        # One after the other: attention with the context of prefills, and the logits.
        "activations": max(_layer_bytes(hf, limits) + _prefill_context_bytes(hf, limits), _logits_bytes(hf, limits)),
    }
    kv_cache = limits.max_model_len * kv_bytes_per_token(hf, limits) if asked is None else asked
    return DeviceBudget(total, limits.gpu_memory_utilization, kv_cache, taken)


def _head_dim(hf: Mapping[str, Any]) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def _layer_bytes(hf: Mapping[str, Any], limits: ServingLimits) -> int:
    """The residual, its norm, and the wider of a gated MLP (gate, up, product) and of attention's heads."""
    heads = hf["num_attention_heads"]
    if is_mla(hf):
        query = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
        attention = heads * (3 * query + hf["qk_nope_head_dim"] + hf["v_head_dim"])  # query, key, padded value; kv_b
    else:
        attention = (heads + 2 * (hf.get("num_key_value_heads") or heads)) * _head_dim(hf) * 2
    widest = max(3 * (hf.get("intermediate_size") or 0), attention) // limits.tensor_parallel
    return limits.max_num_batched_tokens * (4 * hf["hidden_size"] + widest) * limits.itemsize


def _logits_bytes(hf: Mapping[str, Any], limits: ServingLimits) -> int:
    return limits.max_num_seqs * hf["vocab_size"] * _LOGITS_BYTES


def _prefill_context_bytes(hf: Mapping[str, Any], limits: ServingLimits) -> int:
    """MLA's workspace for the context of chunked prefills: the latent, and what kv_b_proj makes of it."""
    if not is_mla(hf):
        return 0
    tokens = max(8 * limits.max_model_len, 4 * limits.max_num_seqs * _PAGE_TOKENS)
    heads = hf["num_attention_heads"] // limits.tensor_parallel
    numbers = hf["kv_lora_rank"] + hf["qk_rope_head_dim"] + heads * (hf["qk_nope_head_dim"] + hf["v_head_dim"])
    return min(tokens, _MAX_CONTEXT_TOKENS) * numbers * limits.itemsize
