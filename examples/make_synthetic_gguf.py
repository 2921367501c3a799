"""A GGUF of a giant's real shape with random weights, so that a machine can be measured without a download of 400 GB.

    examples/make_synthetic_gguf.py OUT --like deepseek-r1 --layers 10 [--experts 64] [--type Q4_K_M] [--shard-gb 40]
    examples/make_synthetic_gguf.py OUT --no-experts     # all layers' dense weights, for what they take on a GPU
    kt-vllm serve OUT --kt-gguf OUT

OUT gets the GGUF, config.json and a small tokenizer. Its answers are noise; memory, bytes and times are a real model's.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kt_vllm.bench.random_weights import TYPES, random_weights

TINY = Path(__file__).parent / "models" / "tiny-deepseek-v3"
POOL_BYTES = 64 << 20  # of random blocks a type and row length; tensors are cut from it, each from elsewhere

_YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}
_DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {**_YARN, "factor": 40, "original_max_position_embeddings": 4096},
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
# config.json of each model, less what only its weights need.
MODELS: dict[str, dict[str, Any]] = {
    "deepseek-r1": _DEEPSEEK_V3,
    "kimi-k2": {
        **_DEEPSEEK_V3,
        "vocab_size": 163840,
        "first_k_dense_replace": 1,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 131072,
        "rope_theta": 50000,
        "rope_scaling": {**_YARN, "factor": 32, "original_max_position_embeddings": 4096},
    },
    "tiny-deepseek-v3": json.loads((TINY / "config.json").read_text()),
}


@dataclass(frozen=True)
class Tensor:
    """shape: as torch has it."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // block * size


def make_config(like: str, layers: int | None = None, experts: int | None = None) -> dict[str, Any]:
    """config.json of the model with so many layers and routed experts."""
    config = dict(MODELS[like])
    if layers is not None:
        config["num_hidden_layers"] = layers
    if experts is not None:
        config["n_routed_experts"] = experts
        if experts % config["n_group"] or experts // config["n_group"] < 2:
            config |= {"n_group": 1, "topk_group": 1}
    if config["num_hidden_layers"] <= config["first_k_dense_replace"]:
        sys.exit(f"--layers is {layers}, and the first {config['first_k_dense_replace']} have no experts: give more.")
    if config["n_routed_experts"] < config["num_experts_per_tok"]:
        sys.exit(f"--experts is {experts}, and each token takes {config['num_experts_per_tok']}: give as many or more.")
    return config


def tensors_of(config: dict[str, Any], recipe: str, routed_experts: bool = True) -> Iterator[Tensor]:
    """In the order of a file by llama.cpp's converter. recipe: Q4_K_M, or one GGML type for all matrices."""
    hidden, heads, num_layers = (config[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    q_lora, kv_lora, nope, rope, v = (
        config[k] for k in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )

    def matrix(name: str, *shape: int, more_bits: bool = False) -> Tensor:
        wanted = ("Q6_K" if more_bits else "Q4_K") if recipe == "Q4_K_M" else recipe
        # As llama.cpp's quantiser: rows that are no multiple of 256 get a type with blocks of 32.
        fits = shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]][0] == 0
        return Tensor(f"{name}.weight", wanted if fits else "Q5_0" if recipe == "Q4_K_M" else "Q8_0", shape)

    def vector(name: str, *shape: int) -> Tensor:
        return Tensor(name, "F32", shape)

    yield matrix("token_embd", config["vocab_size"], hidden)
    yield vector("output_norm.weight", hidden)
    yield matrix("output", config["vocab_size"], hidden, more_bits=True)
    for i in range(num_layers):
        blk = f"blk.{i}."
        eighth = num_layers // 8
        more_bits = i < eighth or i >= 7 * num_layers // 8 or (i - eighth) % 3 == 2  # the quantiser's, for down
        yield vector(f"{blk}attn_norm.weight", hidden)
        yield matrix(f"{blk}attn_q_a", q_lora, hidden)
        yield vector(f"{blk}attn_q_a_norm.weight", q_lora)
        yield matrix(f"{blk}attn_q_b", heads * (nope + rope), q_lora)
        yield matrix(f"{blk}attn_kv_a_mqa", kv_lora + rope, hidden)
        yield vector(f"{blk}attn_kv_a_norm.weight", kv_lora)
        yield matrix(f"{blk}attn_k_b", heads, kv_lora, nope)
        yield matrix(f"{blk}attn_v_b", heads, v, kv_lora)
        yield matrix(f"{blk}attn_output", hidden, heads * v)
        yield vector(f"{blk}ffn_norm.weight", hidden)
        if i < config["first_k_dense_replace"]:
            yield matrix(f"{blk}ffn_gate", config["intermediate_size"], hidden)
            yield matrix(f"{blk}ffn_up", config["intermediate_size"], hidden)
            yield matrix(f"{blk}ffn_down", hidden, config["intermediate_size"], more_bits=more_bits)
            continue
        experts, rows = config["n_routed_experts"], config["moe_intermediate_size"]
        shared = config["n_shared_experts"] * rows
        yield vector(f"{blk}ffn_gate_inp.weight", experts, hidden)
        yield vector(f"{blk}exp_probs_b.bias", experts)
        if routed_experts:
            yield matrix(f"{blk}ffn_gate_exps", experts, rows, hidden)
            yield matrix(f"{blk}ffn_up_exps", experts, rows, hidden)
            yield matrix(f"{blk}ffn_down_exps", experts, hidden, rows, more_bits=more_bits)
        yield matrix(f"{blk}ffn_gate_shexp", shared, hidden)
        yield matrix(f"{blk}ffn_up_shexp", shared, hidden)
        yield matrix(f"{blk}ffn_down_shexp", hidden, shared, more_bits=more_bits)


def make_writer(config: dict[str, Any], tensors: list[Tensor], path: Path, name: str, shard_bytes: int) -> Any:
    """A gguf.GGUFWriter that knows all metadata and tensors, with nothing written yet."""
    writer = gguf.GGUFWriter(path, "deepseek2", split_max_size=shard_bytes)
    writer.add_name(f"{name}, random weights")
    for key, value in (
        ("block_count", config["num_hidden_layers"]),
        ("context_length", config["max_position_embeddings"]),
        ("embedding_length", config["hidden_size"]),
        ("feed_forward_length", config["intermediate_size"]),
        ("attention.head_count", config["num_attention_heads"]),
        ("attention.head_count_kv", 1),
        ("attention.q_lora_rank", config["q_lora_rank"]),
        ("attention.kv_lora_rank", config["kv_lora_rank"]),
        ("attention.key_length", config["kv_lora_rank"] + config["qk_rope_head_dim"]),
        ("attention.value_length", config["kv_lora_rank"]),
        ("attention.key_length_mla", config["qk_nope_head_dim"] + config["qk_rope_head_dim"]),
        ("attention.value_length_mla", config["v_head_dim"]),
        ("rope.dimension_count", config["qk_rope_head_dim"]),
        ("leading_dense_block_count", config["first_k_dense_replace"]),
        ("vocab_size", config["vocab_size"]),
        ("expert_feed_forward_length", config["moe_intermediate_size"]),
        ("expert_count", config["n_routed_experts"]),
        ("expert_used_count", config["num_experts_per_tok"]),
        ("expert_shared_count", config["n_shared_experts"]),
        ("expert_group_count", config["n_group"]),
        ("expert_group_used_count", config["topk_group"]),
        ("expert_gating_func", 2),
    ):
        writer.add_uint32(f"deepseek2.{key}", value)
    writer.add_float32("deepseek2.expert_weights_scale", config["routed_scaling_factor"])
    writer.add_bool("deepseek2.expert_weights_norm", config["norm_topk_prob"])
    for tensor in tensors:
        type_ = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=type_)
    return writer


class _Pools:
    """Random blocks, made once for each type and row length: weights of 1 / sqrt(row length) keep a layer's scale."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.pools: dict[tuple[str, int], NDArray[np.uint8]] = {}

    def pieces(self, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes."""
        if len(tensor.shape) == 1:
            value = 0 if tensor.name.endswith(".bias") else 1
            yield np.full(tensor.shape, value, "<f4").view(np.uint8)
            return
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]]
        key = (tensor.type, tensor.shape[-1])
        if key not in self.pools:
            num_blocks = min(POOL_BYTES // size, math.prod(tensor.shape) // block)
            self.pools[key] = random_weights(tensor.type, num_blocks * block, self.rng, tensor.shape[-1] ** -0.5)
        pool, rest = self.pools[key], tensor.nbytes
        while rest:
            start = int(self.rng.integers(len(pool) // size)) * size
            piece = pool[start : start + rest]
            rest -= len(piece)
            yield piece


def _fill(path: Path, parts: list[tuple[int, Tensor]], pools: _Pools, threads: int, progress: tqdm) -> None:
    """Writes the tensors, each at its offset. A mapped file, since threads that write() to one file wait in turn."""
    target = np.memmap(path, np.uint8, "r+")

    def pieces() -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for offset, tensor in parts:
            for piece in pools.pieces(tensor):
                yield offset, piece
                offset += len(piece)

    def copy(job: tuple[int, NDArray[np.uint8]]) -> int:
        offset, piece = job
        target[offset : offset + len(piece)] = piece
        return len(piece)

    with ThreadPoolExecutor(threads) as executor:
        for nbytes in executor.map(copy, pieces()):
            progress.update(nbytes)


def write(
    folder: Path,
    config: dict[str, Any],
    recipe: str,
    name: str,
    shard_bytes: int = 0,
    seed: int = 0,
    routed_experts: bool = True,
    threads: int | None = None,
) -> float:
    """Writes model, config.json and tokenizer; returns GB a second."""
    threads = threads or len(os.sched_getaffinity(0))
    tensors = list(tensors_of(config, recipe, routed_experts))
    total = sum(t.nbytes for t in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: give a folder that is, or one that is not there yet.")
    free = shutil.disk_usage(folder).free
    if total > free:
        sys.exit(f"the model has {total / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB left: give fewer --layers.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, folder / file)
    writer = make_writer(config, tensors, folder / f"{name}-{recipe}.gguf", name, shard_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools, by_name = _Pools(seed), {t.name: t for t in tensors}
    begin = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:
        for out, names in zip(writer.fout, writer.tensors, strict=True):
            writer.write_padding(out, out.tell())
            position, parts = out.tell(), []
            for tensor in map(by_name.__getitem__, names):
                parts.append((position, tensor))
                position += writer.ggml_pad(tensor.nbytes, writer.data_alignment)
            out.truncate(position)
            out.flush()
            _fill(Path(out.name), parts, pools, threads, progress)
    writer.close()
    return total / 1e9 / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--like", choices=MODELS, default="deepseek-r1")
    parser.add_argument("--layers", type=int, help="all layers, the dense ones at the front too; default: the model's")
    parser.add_argument("--experts", type=int, help="routed experts of a layer; default: the model's")
    parser.add_argument("--no-experts", action="store_true", help="leave routed experts out: for --kt-no-experts alone")
    parser.add_argument("--type", choices=("Q4_K_M", *TYPES), default="Q4_K_M", help="the mix, or one for all matrices")
    parser.add_argument("--shard-gb", type=float, default=0, help="cut into files of about so many GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="that write; default: one for each CPU")
    args = parser.parse_args()
    config = make_config(args.like, args.layers, args.experts)
    shard_bytes = int(args.shard_gb * 1e9)
    speed = write(args.folder, config, args.type, args.like, shard_bytes, args.seed, not args.no_experts, args.threads)
    print(
        f"{args.folder}: {sum(f.stat().st_size for f in args.folder.glob('*.gguf')) / 1e9:.2f} GB at {speed:.1f} GB/s"
    )


if __name__ == "__main__":
    main()
