"""Small GGUF files for the tests: a DeepSeek-V3-shaped model in any layout, shards, and files no writer makes."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

Array = NDArray[np.float32]
TINY = Path(__file__).parents[1] / "examples" / "models" / "tiny-deepseek-v3"


@dataclass(frozen=True)
class Shape:
    """A model small enough to write in milliseconds; every row is a multiple of 32, so that Q8_0 fits."""

    vocab: int = 64
    hidden: int = 64
    dense_intermediate: int = 96
    intermediate: int = 32
    layers: int = 3
    first_dense: int = 1
    experts: int = 4
    top_k: int = 2
    heads: int = 2
    q_lora: int | None = 32
    kv_lora: int = 32
    nope: int = 32
    rope: int = 32
    v: int = 64


# Of the shipped model in TINY.
TINY_SHAPE = Shape(
    vocab=4096,
    hidden=512,
    dense_intermediate=1024,
    intermediate=256,
    layers=4,
    experts=16,
    top_k=4,
    heads=4,
    q_lora=256,
    kv_lora=512,
    nope=128,
    rope=64,
    v=128,
)


def hf_config(shape: Shape = Shape(), **changes: Any) -> dict[str, object]:
    """config.json of `shape`; a change to None takes the field out."""
    config: dict[str, object] = {
        "model_type": "deepseek_v3",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense_intermediate,
        "moe_intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": shape.first_dense,
        "moe_layer_freq": 1,
        "n_routed_experts": shape.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": shape.top_k,
        "num_attention_heads": shape.heads,
        "q_lora_rank": shape.q_lora,
        "kv_lora_rank": shape.kv_lora,
        "qk_nope_head_dim": shape.nope,
        "qk_rope_head_dim": shape.rope,
        "v_head_dim": shape.v,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
    } | changes
    return {k: v for k, v in config.items() if v is not None or k == "q_lora_rank"}


def gguf_metadata(shape: Shape = Shape(), **changes: Any) -> dict[str, object]:
    """Keys without the architecture; a change to None takes the key out, and __ in its name stands for a dot."""
    metadata: dict[str, object] = {
        "block_count": shape.layers,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.dense_intermediate,
        "attention.head_count": shape.heads,
        "expert_count": shape.experts,
        "expert_used_count": shape.top_k,
        "expert_feed_forward_length": shape.intermediate,
        "expert_shared_count": 1,
        "leading_dense_block_count": shape.first_dense,
        "vocab_size": shape.vocab,
        "attention.q_lora_rank": shape.q_lora,
        "attention.kv_lora_rank": shape.kv_lora,
        "attention.key_length_mla": shape.nope + shape.rope,
        "attention.value_length_mla": shape.v,
        "rope.dimension_count": shape.rope,
    } | {k.replace("__", "."): v for k, v in changes.items()}
    return {k: v for k, v in metadata.items() if v is not None}


def tensor_shapes(shape: Shape = Shape(), fused_kv_b: bool = False) -> dict[str, tuple[int, ...]]:
    """name -> shape as torch has it, in the order llama.cpp's converter writes."""
    s = shape
    shapes: dict[str, tuple[int, ...]] = {
        "output.weight": (s.vocab, s.hidden),
        "output_norm.weight": (s.hidden,),
        "token_embd.weight": (s.vocab, s.hidden),
    }
    for i in range(s.layers):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (s.hidden,),
            "attn_kv_a_mqa.weight": (s.kv_lora + s.rope, s.hidden),
            "attn_kv_a_norm.weight": (s.kv_lora,),
            "attn_output.weight": (s.hidden, s.heads * s.v),
            "ffn_norm.weight": (s.hidden,),
        }
        if s.q_lora is None:
            layer["attn_q.weight"] = (s.heads * (s.nope + s.rope), s.hidden)
        else:
            layer["attn_q_a.weight"] = (s.q_lora, s.hidden)
            layer["attn_q_a_norm.weight"] = (s.q_lora,)
            layer["attn_q_b.weight"] = (s.heads * (s.nope + s.rope), s.q_lora)
        if fused_kv_b:
            layer["attn_kv_b.weight"] = (s.heads * (s.nope + s.v), s.kv_lora)
        else:
            layer["attn_k_b.weight"] = (s.heads, s.kv_lora, s.nope)
            layer["attn_v_b.weight"] = (s.heads, s.v, s.kv_lora)
        if i < s.first_dense:
            layer["ffn_gate.weight"] = layer["ffn_up.weight"] = (s.dense_intermediate, s.hidden)
            layer["ffn_down.weight"] = (s.hidden, s.dense_intermediate)
        else:
            layer["ffn_gate_inp.weight"] = (s.experts, s.hidden)
            layer["exp_probs_b.bias"] = (s.experts,)
            layer["ffn_gate_exps.weight"] = layer["ffn_up_exps.weight"] = (s.experts, s.intermediate, s.hidden)
            layer["ffn_down_exps.weight"] = (s.experts, s.hidden, s.intermediate)
            layer["ffn_gate_shexp.weight"] = layer["ffn_up_shexp.weight"] = (s.intermediate, s.hidden)
            layer["ffn_down_shexp.weight"] = (s.hidden, s.intermediate)
        shapes |= {f"blk.{i}.{name}": dims for name, dims in layer.items()}
    return shapes


def random_tensors(shape: Shape = Shape(), fused_kv_b: bool = False, seed: int = 0) -> dict[str, Array]:
    """The same weights in both layouts of kv_b: what is split here is drawn fused."""
    rng = np.random.default_rng(seed)
    drawn = {n: rng.standard_normal(d, dtype=np.float32) for n, d in tensor_shapes(shape, fused_kv_b=True).items()}
    tensors: dict[str, Array] = {}
    for name, values in drawn.items():
        if name.endswith(".attn_kv_b.weight") and not fused_kv_b:
            k_b = np.empty((shape.heads, shape.kv_lora, shape.nope), np.float32)
            v_b = np.empty((shape.heads, shape.v, shape.kv_lora), np.float32)
            for head in range(shape.heads):
                start = head * (shape.nope + shape.v)
                k_b[head] = values[start : start + shape.nope].T
                v_b[head] = values[start + shape.nope : start + shape.nope + shape.v]
            tensors[name.replace("kv_b", "k_b")], tensors[name.replace("kv_b", "v_b")] = k_b, v_b
        else:
            tensors[name] = values
    return tensors


def write(
    path: Path,
    tensors: Mapping[str, Array],
    metadata: Mapping[str, object] | None = None,
    *,
    architecture: str = "deepseek2",
    type_of: Callable[[str], str] = lambda name: "F32",
    split: int = 0,
    big_endian: bool = False,
) -> Path:
    """Writes `path` with the gguf package; with `split` tensors a shard. Returns the file, or the first shard."""
    endian = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split, endianess=endian)
    for key, value in (gguf_metadata() if metadata is None else metadata).items():
        full = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
        else:
            writer.add_string(full, str(value))
    for name, values in tensors.items():
        type_ = GGMLQuantizationType[type_of(name)]
        if type_ == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not split:
        return path
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))))


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str, type_: GGUFValueType | int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", int(type_)) + value


ARCHITECTURE = key("general.architecture", GGUFValueType.STRING, string("deepseek2"))


def entry(name: str | bytes, ne: Iterable[int], type_: GGMLQuantizationType | int = 0, offset: int = 0) -> bytes:
    """A tensor's place in the directory. ne: sizes in ggml's order."""
    sizes = list(ne)
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, int(type_), offset)


def raw(
    keys: Iterable[bytes] = (ARCHITECTURE,),
    entries: Iterable[bytes] = (),
    *,
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    data: bytes = b"",
) -> bytes:
    """A whole file, byte by byte, with counts that need not be true."""
    keys, entries = list(keys), list(entries)
    counts = (len(entries) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(entries)
    return header + b"\0" * (-len(header) % 32) + data


def write_sparse(path: Path, shape: Shape, type_of: Callable[[str], str], **layout: bool) -> Path:
    """A file of any size with a true header and no data on disk: reads give zeros."""
    header, _, nbytes = _layout(shape, type_of, **layout)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)
    return path


def write_random(path: Path, shape: Shape, type_of: Callable[[str], str], **layout: bool) -> Path:
    """As write_sparse, with small random weights on disk; a gigabyte takes a second or two.

    F32, F16, BF16, Q8_0 and Q4_K.
    """
    header, tensors, nbytes = _layout(shape, type_of, **layout)
    pools: dict[GGMLQuantizationType, bytes] = {}
    with open(path, "wb") as file:
        file.write(header)
        for type_, offset, size in tensors:
            pool = pools.setdefault(type_, _random_blocks(type_))
            file.seek(len(header) + offset)
            for start in range(0, size, len(pool)):
                file.write(pool[: size - start])
        file.truncate(len(header) + nbytes)
    return path


def _layout(
    shape: Shape, type_of: Callable[[str], str], **layout: bool
) -> tuple[bytes, list[tuple[GGMLQuantizationType, int, int]], int]:
    """The header; (type, offset in the data, bytes) of each tensor; bytes of the data."""
    entries, tensors, offset = [], [], 0
    for name, dims in tensor_shapes(shape, **layout).items():
        type_ = GGMLQuantizationType[type_of(name)]
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        entries.append(entry(name, reversed(dims), type_, offset))
        nbytes = int(np.prod(dims, dtype=object)) // block * block_bytes
        tensors.append((type_, offset, nbytes))
        offset += -(-nbytes // 32) * 32
    keys = [ARCHITECTURE]
    keys += [key(f"deepseek2.{k}", 4, struct.pack("<I", v)) for k, v in gguf_metadata(shape).items()]
    return raw(keys, entries), tensors, offset


def _random_blocks(type_: GGMLQuantizationType) -> bytes:
    """2^20 weights."""
    rng = np.random.default_rng(0)
    if type_ != GGMLQuantizationType.Q4_K:
        return gguf.quants.quantize(rng.normal(0, 0.02, (1 << 12, 256)).astype(np.float32), type_).tobytes()
    # The gguf package does not quantise to Q4_K. Any bytes are a block if its two float16 scales are finite.
    blocks = rng.integers(0, 256, (1 << 12, gguf.GGML_QUANT_SIZES[type_][1]), np.uint8)
    blocks[:, :4] = np.array([1e-4, 5e-5], "<f2").view(np.uint8)
    return blocks.tobytes()


def model_folder(path: Path, **changes: object) -> Path:
    """A model folder without weights: the shipped one's tokenizer and its config.json with `changes`."""
    path.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / name).symlink_to(TINY / name)
    config = json.loads((TINY / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path
