"""Makes a model of the zoo: config.json, a GGUF with random weights, tokens, and the exact log-probabilities.

The weights are random blocks of the GGUF's types. What they decode to is put into Hugging Face's model, whose float32
log-probabilities are the truth: nothing of kt_vllm takes part.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor, nn

from tests.moe_case import random_weights
from tests.zoo.layout import is_float32, metadata, mtp_tensors, tensors, written_shape
from tests.zoo.models import MODELS, VOCABULARY, Config, Model

TEXT = Path(__file__).parents[2] / "LICENSE"
GGUF_NAME, TOKENS, EXPECTED = "model.gguf", "tokens.npy", "expected.npy"
NUM_SEQUENCES, LENGTH = 4, 160  # the first half of the sequences random, the second text

# The part of a tensor's name -> type; the first that fits. Much as llama-quantize's mixes of these names, and as the
# dynamic files that change types from layer to layer.
MIXES: dict[str, dict[str, str]] = {
    "BF16": {"": "BF16"},
    "Q8_0": {"": "Q8_0"},
    "Q6_K": {"": "Q6_K"},
    "Q4_K_M": {"ffn_down": "Q6_K", "attn_v": "Q6_K", "output.weight": "Q6_K", "": "Q4_K"},
    "UD-Q2_K_XL": {
        "blk.1.ffn_down_exps": "Q3_K",
        "ffn_down_exps": "Q4_K",
        "blk.1.ffn_up_exps": "IQ4_XS",
        "ffn_up_exps": "Q2_K",
        "ffn_gate_exps": "Q2_K",
        "shexp": "Q6_K",
        "token_embd": "Q4_K",
        "output.weight": "Q6_K",
        "": "Q5_K",
    },
    "IQ2_XXS": {"ffn_down_exps": "IQ3_XXS", "_exps": "IQ2_XXS", "attn_v": "Q4_K", "output.weight": "Q5_K", "": "IQ3_S"},
}


def type_of(mix: str, name: str, view: Tensor) -> str:
    if is_float32(name, view):
        return "F32"
    chosen = next(type for part, type in MIXES[mix].items() if part in name)
    block = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[chosen]][0]
    return chosen if view.shape[-1] % block == 0 else "Q8_0"  # attn_k_b's rows are shorter than a block of K quants


def _size(name: str, config: Config) -> float:
    """Standard deviation of a matrix's output for inputs of unit size.

    Attention that looks at something, routers that choose clearly, probabilities far from even: what is wrong anywhere
    shows. But two experts of nearly one score change places under any rounding, so a single one must not decide all.
    """
    if "ffn_gate_inp" in name:
        return 2.0
    if name == "output.weight":
        return 1.3
    if "attn_q.weight" in name or "attn_q_b" in name or "attn_k.weight" in name:
        return 1.2
    if "ffn_down_exps" in name:
        return 0.6 * min(1, config["num_experts_per_tok"] / 4) / config.get("routed_scaling_factor", 1.0)
    return 1.0


def draw(type: str, num_weights: int, rng: np.random.Generator, size: float) -> np.ndarray:
    """Bytes of random blocks that decode to weights with a standard deviation of `size`."""
    return _centred(type, random_weights(type, num_weights, rng, size / _spread(type)))


@functools.cache
def _spread(type: str) -> float:
    """What draw() would decode to for a size of 1."""
    data = _centred(type, random_weights(type, 1 << 16, np.random.default_rng(0)))
    return float(gguf.quants.dequantize(data.reshape(256, -1), GGMLQuantizationType[type]).std())


def _centred(type: str, data: np.ndarray) -> np.ndarray:
    """Takes each sub-block's mean away, by making its minimum as large as its scale.

    Random minima give rows with steps of 32 weights, and such rows have large products with one another: not at all
    the outputs that a matrix of independent weights has.
    """
    if type in ("Q4_K", "Q5_K"):
        blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type]][1])
        blocks[:, 8:12] = blocks[:, 4:8]  # six bits of the first four, two of the last four
        blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17
    elif type == "Q2_K":
        blocks = data.reshape(-1, 84)
        blocks[:, :16] = (blocks[:, :16] & 15) * 17
    return data


def fill(model: nn.Module, spec: Model, mix: str, rng: np.random.Generator, writer: gguf.GGUFWriter) -> None:
    """Draws every tensor, gives it to the writer, and puts the values it decodes to into the model."""
    for name, view in tensors(model, spec.architecture, spec.config):
        type = type_of(mix, name, view)
        if view.dim() == 1:
            values = _vector(name, view.shape[0], rng)
            writer.add_tensor(name, values)
        else:
            fan_in = 1 if name == "token_embd.weight" else view.shape[1 if "attn_k_b" in name else -1]
            shape = written_shape(view, spec.architecture)
            data = draw(type, view.numel(), rng, _size(name, spec.config) * fan_in**-0.5)
            data = data.view(np.float32).reshape(shape) if type == "F32" else data.reshape(*shape[:-1], -1)
            if type == "F32":
                writer.add_tensor(name, data)
            else:
                writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[type])
            values = gguf.quants.dequantize(data, GGMLQuantizationType[type])
        view.copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(view.shape))
    for name, shape in mtp_tensors(spec):
        writer.add_tensor(name, np.zeros(shape, np.float32))


def _vector(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Norms around 1, biases around 0."""
    values = rng.standard_normal(size).astype(np.float32)
    if "exp_probs_b" in name:
        return 0.2 * values
    if name.endswith(".bias"):
        return values
    if "attn_q_norm" in name or "attn_k_norm" in name:
        return 1.3 * (1 + 0.3 * values)  # sharper attention, or their order would hardly matter
    return 1 + 0.3 * values


def hf_model(folder: Path) -> nn.Module:
    """Hugging Face's own model of the folder's config.json, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config

    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if config["model_type"] == "kimi_k2":  # code of its own in the repository, a copy of DeepSeek-V3's
        hf_config = DeepseekV3Config(**{k: v for k, v in config.items() if k != "model_type"})
    else:
        hf_config = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager")
    return model.float().eval()


def draw_tokens(rng: np.random.Generator) -> np.ndarray:
    """[NUM_SEQUENCES, LENGTH]."""
    text = np.frombuffer(TEXT.read_bytes(), np.uint8)
    starts = rng.integers(0, text.size - LENGTH, NUM_SEQUENCES // 2)
    pieces = [text[start : start + LENGTH].astype(np.int64) for start in starts]
    return np.concatenate([rng.integers(0, VOCABULARY, (NUM_SEQUENCES // 2, LENGTH)), np.stack(pieces)])


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """[sequences, positions, vocabulary], float32: of the next token at each position."""
    logits = model(torch.from_numpy(tokens)).logits
    return logits.float().log_softmax(-1).numpy()


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    kinds: dict[type, Callable[[str, object], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    kinds[type(value)](key, value)


@torch.no_grad()
def make(folder: Path, name: str, mix: str, seed: int) -> nn.Module:
    """Fills `folder`; returns Hugging Face's model with the weights that the GGUF has."""
    spec, rng = MODELS[name], np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(spec.config, indent=1))
    writer = gguf.GGUFWriter(folder / GGUF_NAME, spec.architecture)
    for key, value in metadata(spec).items():
        _add(writer, f"{spec.architecture}.{key}", value)
    model = hf_model(folder)
    fill(model, spec, mix, rng, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = draw_tokens(rng)
    np.save(folder / TOKENS, tokens)
    np.save(folder / EXPECTED, log_probabilities(model, tokens))
    return model
