"""One model's weights in every layout that llama.cpp has written, by its rules: for each, a function on raw tensors."""

import random
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray

from kt_vllm.gguf import GGUFModel, Scalar
from tests import gguf_files as files


@dataclass(frozen=True)
class Raw:
    """A tensor as a file holds it. data: one row of bytes for each row of weights, flat."""

    type: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @classmethod
    def f32(cls, values: NDArray[np.float32]) -> "Raw":
        return cls("F32", values.shape, np.ascontiguousarray(values, np.float32).view(np.uint8).reshape(-1))

    def values(self) -> NDArray[np.float32]:
        type_ = GGMLQuantizationType[self.type]
        block, block_bytes = GGML_QUANT_SIZES[type_]
        rows = self.data.reshape(-1, self.shape[-1] // block * block_bytes)
        return dequantize(rows, type_).astype(np.float32).reshape(self.shape)

    def experts(self) -> list["Raw"]:
        """A stacked tensor's parts."""
        return [Raw(self.type, self.shape[1:], part) for part in self.data.reshape(self.shape[0], -1)]


Raws = dict[str, Raw]


def read(model: GGUFModel) -> Raws:
    return {n: Raw(t.type, t.shape, np.fromfile(t.path, np.uint8, t.nbytes, offset=t.offset)) for n, t in
            model.tensors.items()}  # fmt: skip


def stacked(raws: Raws) -> Raws:
    """What llama.cpp's converter writes today: the layout of the files it is given."""
    return dict(raws)


def expert_each(raws: Raws) -> Raws:
    """A tensor an expert, as before April 2024."""
    found: Raws = {}
    for name, raw in raws.items():
        if match := re.fullmatch(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight", name):
            found |= {f"{match[1]}.{i}.weight": part for i, part in enumerate(raw.experts())}
        else:
            found[name] = raw
    return found


def gate_up(raws: Raws) -> Raws:
    """The converter's --fuse-gate-up-exps: each expert's gate rows, then its up rows. Only where types are equal."""
    found = dict(raws)
    for name in raws:
        if name.endswith("ffn_gate_exps.weight"):
            gate, up = raws[name], raws[name.replace("_gate_", "_up_")]
            if gate.type == up.type:
                halves = [raw.data.reshape(raw.shape[0], -1) for raw in (gate, up)]
                shape = (gate.shape[0], 2 * gate.shape[1], gate.shape[2])
                del found[name], found[name.replace("_gate_", "_up_")]
                found[name.replace("_gate_", "_gate_up_")] = Raw(gate.type, shape, np.concatenate(halves, 1).ravel())
    return found


def kv_b_fused(raws: Raws) -> Raws:
    """Before llama.cpp's MLA support of April 2025. In float32, so that transposing the key half rounds nothing."""
    found: Raws = {}
    for name, raw in raws.items():
        if name.endswith(".attn_k_b.weight"):
            k = raw.values().transpose(0, 2, 1)
            kv = np.concatenate([k, raws[name.replace("_k_b", "_v_b")].values()], 1)
            found[name.replace("_k_b", "_kv_b")] = Raw.f32(kv.reshape(-1, kv.shape[-1]))
        elif not name.endswith(".attn_v_b.weight"):
            found[name] = raw
    return found


def kv_b_both(raws: Raws) -> Raws:
    """Files of other converters that keep both forms."""
    return raws | kv_b_fused(raws)


def bare_correction_bias(raws: Raws) -> Raws:
    """Early DeepSeek-V3 files: `exp_probs_b` without `.bias`."""
    return {name.replace("exp_probs_b.bias", "exp_probs_b"): raw for name, raw in raws.items()}


def shuffled(raws: Raws) -> Raws:
    """Tensors in an order of no meaning, so that a shard has some of every layer."""
    names = list(raws)
    random.shuffle(names)
    return {name: raws[name] for name in names}


def with_mtp_layer(raws: Raws) -> Raws:
    """A multi-token-prediction layer after the last: a whole layer of its own, experts and all."""
    layers = max(int(name.split(".")[1]) for name in raws if name.startswith("blk."))
    last = f"blk.{layers}."
    mtp = {f"blk.{layers + 1}.{name.removeprefix(last)}": raw for name, raw in raws.items() if name.startswith(last)}
    hidden = raws["output_norm.weight"].shape[0]
    eh_proj = Raw.f32(np.zeros((hidden, 2 * hidden), np.float32))
    norms = {f"blk.{layers + 1}.nextn.{n}.weight": raws["output_norm.weight"] for n in ("enorm", "hnorm")}
    return raws | mtp | norms | {f"blk.{layers + 1}.nextn.eh_proj.weight": eh_proj}


LAYOUTS: Mapping[str, Callable[[Raws], Raws]] = {
    function.__name__: function
    for function in (
        stacked,
        expert_each,
        gate_up,
        kv_b_fused,
        kv_b_both,
        bare_correction_bias,
        shuffled,
        with_mtp_layer,
    )
}


def write(
    path: Path,
    raws: Raws,
    metadata: Mapping[str, Scalar],
    *,
    version: int = 3,
    shards: int = 1,
    empty_first: bool = False,
    alignment: int = 32,
) -> Path:
    """Writes `path`, or its shards by gguf-split's rules, and returns the first one.

    empty_first: the first shard has no tensors, as with --no-tensor-first-split.
    """
    names = list(raws)
    filled = shards - empty_first
    parts = [[]] * empty_first + [list(part) for part in np.array_split(names, filled)]
    paths = []
    for number, part in enumerate(parts):
        keys = dict(metadata) if number == 0 else {}
        if shards > 1:
            keys |= {"split.no": number, "split.count": shards, "split.tensors.count": len(names)}
        if alignment != 32:
            keys["general.alignment"] = alignment
        encoded = [_key(name, value) for name, value in keys.items()]
        entries, chunks, offset = [], [], 0
        for name in part:
            raw = raws[name]
            entries.append(files.entry(name, reversed(raw.shape), GGMLQuantizationType[raw.type], offset))
            padding = -len(raw.data) % alignment
            chunks.append(raw.data.tobytes() + bytes(padding))
            offset += len(raw.data) + padding
        header = files.raw(encoded, entries, version=version)
        header += bytes(-len(header) % alignment) if part else b""
        name = path.name if shards == 1 else f"{path.stem}-{number + 1:05d}-of-{shards:05d}.gguf"
        paths.append(path.with_name(name))
        paths[-1].write_bytes(header + b"".join(chunks))
    return paths[0]


def _key(name: str, value: Scalar) -> bytes:
    if isinstance(value, bool):
        return files.key(name, GGUFValueType.BOOL, struct.pack("<?", value))
    if isinstance(value, int):
        if name in ("split.no", "split.count"):
            return files.key(name, GGUFValueType.UINT16, struct.pack("<H", value))
        signed = name == "split.tensors.count"
        return files.key(name, GGUFValueType.INT32 if signed else GGUFValueType.UINT32, struct.pack("<I", value))
    if isinstance(value, float):
        return files.key(name, GGUFValueType.FLOAT32, struct.pack("<f", value))
    return files.key(name, GGUFValueType.STRING, files.string(value))
