"""The block formats, against the gguf package."""

import gguf
import numpy as np
import pytest

from kt_vllm import _native, reference
from tests.compare import assert_same_bits
from tests.moe_case import random_weights

TYPES = sorted(_native.type_sizes())


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
    """Random scales: subnormal, infinite and NaN ones too."""
    block_size, block_bytes = _native.type_sizes()[type]
    data = np.random.default_rng().integers(0, 256, 2000 * block_bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = reference.dequantize(type, data, (2000 * block_size,))
    assert_same_bits(_native.dequantize(type, data), expected, type=type)


@pytest.mark.parametrize("type", TYPES)
def test_every_half_scale(type):
    """All 65536 values of the first scale."""
    if type in ("F32", "BF16"):
        pytest.skip("has no float16 in it")
    block_size, block_bytes = _native.type_sizes()[type]
    blocks = np.random.default_rng().integers(0, 256, (65536, block_bytes), dtype=np.uint8)
    blocks.view(np.uint16)[:, 104 if type == "Q6_K" else 0] = np.arange(65536)
    with np.errstate(all="ignore"):
        expected = reference.dequantize(type, blocks.ravel(), (65536 * block_size,))
    assert_same_bits(_native.dequantize(type, blocks.ravel()), expected, type=type)


def test_decode_errors():
    with pytest.raises(_native.NativeError, match="whole blocks of 144 bytes for type Q4_K"):
        _native.dequantize("Q4_K", np.zeros(143, np.uint8))
    with pytest.raises(_native.NativeError, match="Q9_9"):
        _native.dequantize("Q9_9", np.zeros(144, np.uint8))
    assert _native.dequantize("Q4_K", np.zeros(0, np.uint8)).shape == (0,)
    assert issubclass(_native.NativeError, ValueError)
