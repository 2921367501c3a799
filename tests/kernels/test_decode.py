"""The block formats, against the gguf package."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest

from kt_vllm import _native, reference
from tests.compare import assert_same_bits
from tests.moe_case import random_weights, write_first_scale

TYPES = sorted(_native.type_sizes())
ROOT = Path(__file__).resolve().parents[2]


def test_types_of_the_project():
    """Every type GGUF files of large models use for experts; no test below would miss one that was dropped."""
    assert set(TYPES) == {
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4"),
    }


@pytest.mark.parametrize("type", TYPES)
def test_block_sizes(type):
    assert _native.type_sizes()[type] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]


def test_every_isa_names_known_types():
    for isa in _native.isas():
        assert set(_native.supported_types(isa)) <= set(TYPES)
    assert set(_native.supported_types("reference")) == set(TYPES)


@pytest.mark.parametrize("type", TYPES)
def test_decode_is_bit_exact(type):
    block_size, _ = _native.type_sizes()[type]
    data = random_weights(type, 300 * block_size, np.random.default_rng())
    expected = reference.dequantize(type, data, (300 * block_size,))
    assert_same_bits(_native.dequantize(type, data), expected, type=type)


@pytest.mark.parametrize("type", TYPES)
def test_decode_any_bytes(type):
    """Random scales: subnormal, infinite and NaN ones too. Enough blocks for every entry of every codebook."""
    block_size, block_bytes = _native.type_sizes()[type]
    data = np.random.default_rng().integers(0, 256, 2000 * block_bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = reference.dequantize(type, data, (2000 * block_size,))
    assert_same_bits(_native.dequantize(type, data), expected, type=type)


@pytest.mark.parametrize("type", [type for type in TYPES if type not in ("F32", "BF16")])
def test_every_scale(type):
    """All 65536 float16 values (of MXFP4 256 exponents) of the first scale."""
    block_size, block_bytes = _native.type_sizes()[type]
    count = 256 if type == "MXFP4" else 65536
    blocks = np.random.default_rng().integers(0, 256, (count, block_bytes), dtype=np.uint8)
    write_first_scale(type, blocks, np.arange(count, dtype=np.uint16))
    with np.errstate(all="ignore"):
        expected = reference.dequantize(type, blocks.ravel(), (count * block_size,))
    assert_same_bits(_native.dequantize(type, blocks.ravel()), expected, type=type)


@pytest.mark.parametrize("type", TYPES)
def test_random_weights_are_what_they_say(type):
    """Every other test of a type relies on it: weights too large or too small would hide errors or make them."""
    block_size, _ = _native.type_sizes()[type]
    count = 2000 * 256
    weights = reference.dequantize(type, random_weights(type, count, np.random.default_rng(), 0.1), (count,))
    assert 0.095 <= weights.std() <= 0.12
    # Of a whole block too: a scale's sign is random, so the mean of all weights says nothing.
    block_means = weights.reshape(-1, max(block_size, 32)).mean(axis=1)
    assert block_means.std() <= 0.04


def test_codebooks_are_what_the_tool_makes():
    path = ROOT / "tools" / "make_iq_grids.py"
    spec = importlib.util.spec_from_file_location("make_iq_grids", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, text in tool.files().items():
        assert (tool.FOLDER / name).read_text() == text, f"{name}: run tools/make_iq_grids.py"


def test_decode_errors():
    with pytest.raises(_native.NativeError, match="whole blocks of 144 bytes for type Q4_K"):
        _native.dequantize("Q4_K", np.zeros(143, np.uint8))
    with pytest.raises(_native.NativeError, match="Q9_9"):
        _native.dequantize("Q9_9", np.zeros(144, np.uint8))
    assert _native.dequantize("Q4_K", np.zeros(0, np.uint8)).shape == (0,)
    assert issubclass(_native.NativeError, ValueError)
