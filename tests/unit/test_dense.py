"""Dense tensors come out as gguf.quants decodes them, in whatever pieces they were read."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kt_vllm.errors import GGUFError
from kt_vllm.gguf import GGUFModel, GGUFTensor
from kt_vllm.gguf.dense import DECODABLE_TYPES, TRANSFORMS, read_dense
from tests import gguf_files as files


def test_every_tensor_of_a_file_of_llama_cpp() -> None:
    model = GGUFModel.open(str(files.TINY))
    for expected in gguf.GGUFReader(model.path).tensors:
        got = read_dense(model.tensors[expected.name])
        values = gguf.quants.dequantize(expected.data, expected.tensor_type)
        assert got.dtype == torch.float32
        assert tuple(got.shape) == model.tensors[expected.name].shape == values.shape
        assert np.array_equal(got.numpy(), values)


def test_the_list_of_types_is_that_of_the_gguf_package() -> None:
    decodable = set()
    for type_ in GGMLQuantizationType:
        try:
            gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
        except NotImplementedError:
            continue
        decodable.add(type_.name)
    assert decodable == DECODABLE_TYPES


def of_random_bytes(path: Path, type_: str, shape: tuple[int, ...], before: int = 40) -> GGUFTensor:
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_]]
    nbytes = int(np.prod(shape)) // block * block_bytes
    rng = np.random.default_rng(5)
    path.write_bytes(bytes(before) + rng.integers(0, 256, nbytes, np.uint8).tobytes() + bytes(8))
    return GGUFTensor("t", type_, shape, str(path), before, nbytes)


def bits(values: torch.Tensor) -> np.ndarray:
    """Their bits; every NaN as one where torch rounds, as its bits then are the CPU's choice."""
    if values.dtype != torch.float32:
        values = torch.where(values.isnan(), torch.tensor(torch.nan, dtype=values.dtype), values)
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16).numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5, 512), (530, 1024)])  # of one chunk, of several
@pytest.mark.parametrize("type_", sorted(DECODABLE_TYPES))
def test_every_type(tmp_path: Path, type_: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = of_random_bytes(tmp_path / "t", type_, shape)
    with np.errstate(all="ignore"):
        got = read_dense(tensor, dtype)
        data = np.fromfile(tensor.path, np.uint8)[tensor.offset : tensor.offset + tensor.nbytes]
        rows = data.reshape(np.prod(shape[:-1]), -1)
        expected = gguf.quants.dequantize(rows, GGMLQuantizationType[type_]).reshape(shape)
    assert got.dtype == dtype
    assert np.array_equal(bits(got), bits(torch.from_numpy(expected).to(dtype)))


def test_bound_to_one_cpu(tmp_path: Path) -> None:
    """As vLLM's CPU workers are."""
    tensor = of_random_bytes(tmp_path / "t", "Q4_K", (600, 1024))
    expected = read_dense(tensor)
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        got = read_dense(tensor)
    finally:
        os.sched_setaffinity(0, cpus)
    assert np.array_equal(bits(got), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_to_nearest(tmp_path: Path, dtype: torch.dtype) -> None:
    values = np.array([[1 + 2**-9, 1 + 3 * 2**-9, -3.14159, 1e-20, 65504.0]], np.float32)
    (tmp_path / "t").write_bytes(values.tobytes())
    got = read_dense(GGUFTensor("t", "F32", (1, 5), str(tmp_path / "t"), 0, 20), dtype)
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize("type_", ["Q8_0", "NVFP4"])
def test_one_dimension(tmp_path: Path, type_: str) -> None:
    assert read_dense(of_random_bytes(tmp_path / "t", type_, (64,))).shape == (64,)


def test_on_the_cpu_whatever_the_default_device_is(tmp_path: Path) -> None:
    tensor = of_random_bytes(tmp_path / "t", "Q4_0", (4, 32))
    with torch.device("meta"):
        assert read_dense(tensor).device.type == "cpu"


@pytest.mark.parametrize("type_", ["F32", "Q4_K", "TQ2_0"])
def test_the_file_changed_since(tmp_path: Path, type_: str) -> None:
    tensor = of_random_bytes(tmp_path / "t", type_, (10, 256))
    os.truncate(tmp_path / "t", 100)
    with pytest.raises(GGUFError, match=r"t' ended inside tensor 't'.*start again"):
        read_dense(tensor)
    (tmp_path / "t").unlink()
    with pytest.raises(GGUFError, match=r"t' cannot be opened any more \(No such file.*start again"):
        read_dense(tensor)


def test_kv_b_from_its_halves() -> None:
    heads, nope, v, kv_lora = 3, 4, 5, 6
    kv_b = torch.arange(heads * (nope + v) * kv_lora, dtype=torch.float32).reshape(heads * (nope + v), kv_lora)
    k_b = torch.empty(heads, kv_lora, nope)
    v_b = torch.empty(heads, v, kv_lora)
    for h in range(heads):
        k_b[h] = kv_b[h * (nope + v) : h * (nope + v) + nope].T
        v_b[h] = kv_b[h * (nope + v) + nope : (h + 1) * (nope + v)]
    assert torch.equal(TRANSFORMS["mla_kv_b"](k_b, v_b), kv_b)


MEASURE = """
import resource, sys, torch
from kt_vllm.gguf import GGUFTensor
from kt_vllm.gguf.dense import MAX_THREADS, read_dense
shape = (int(sys.argv[2]) // 8192, 8192)
tensor = GGUFTensor("t", "Q8_0", shape, sys.argv[1], 0, shape[0] * 8192 // 32 * 34)
read_dense(GGUFTensor("t", "Q8_0", (1, 8192), sys.argv[1], 0, 8192 // 32 * 34))  # what the first call imports
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
values = read_dense(tensor, torch.bfloat16)
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(peak - values.nbytes, MAX_THREADS * (2**18 // 32 * 34))
"""


def test_needs_no_more_than_the_result_and_a_few_chunks(tmp_path: Path) -> None:
    """48 Mi weights: 192 MiB as float32, 96 MiB as bfloat16, 51 MiB in the file."""
    num_weights = 48 << 20
    with open(tmp_path / "t", "wb") as file:
        file.truncate(num_weights // 32 * 34)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "t"), str(num_weights)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    extra, buffers = map(int, output.split())
    assert extra < buffers + (16 << 20)  # for each thread the bytes of a chunk; never the file
