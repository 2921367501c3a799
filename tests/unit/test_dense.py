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
from kt_vllm.gguf import GGUFModel, GGUFTensor, dense
from kt_vllm.gguf.dense import DECODABLE_TYPES, MAX_THREADS, TRANSFORMS, read_dense
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


@pytest.mark.filterwarnings("ignore:invalid value")  # of random scales, in threads that know no np.errstate
@pytest.mark.parametrize("type_", sorted(DECODABLE_TYPES))
@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 1000])
def test_every_type_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_: str, chunk_rows: int) -> None:
    tensor = of_random_bytes(tmp_path / "t", type_, (3, 5, 512))
    monkeypatch.setattr(dense, "CHUNK_BYTES", chunk_rows * 512 * 4)
    sizes = []

    dequantize = dense.dequantize

    def counted(data: np.ndarray, type_: str) -> np.ndarray:
        values = dequantize(data, type_)
        sizes.append(len(values) // 512)
        return values

    monkeypatch.setattr(dense, "dequantize", counted)
    with np.errstate(all="ignore"):
        got = read_dense(tensor).numpy()
        data = np.fromfile(tensor.path, np.uint8)[tensor.offset : tensor.offset + tensor.nbytes].reshape(15, -1)
        expected = gguf.quants.dequantize(data, GGMLQuantizationType[type_]).reshape(3, 5, 512)
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert max(sizes) <= chunk_rows
    assert sum(sizes) == 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_to_nearest(tmp_path: Path, dtype: torch.dtype) -> None:
    values = np.array([[1 + 2**-9, 1 + 3 * 2**-9, -3.14159, 1e-20, 65504.0]], np.float32)
    (tmp_path / "t").write_bytes(values.tobytes())
    got = read_dense(GGUFTensor("t", "F32", (1, 5), str(tmp_path / "t"), 0, 20), dtype)
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(values).to(dtype))


def test_one_dimension_and_rows_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "CHUNK_BYTES", 4)
    tensor = of_random_bytes(tmp_path / "t", "Q8_0", (64,))
    assert read_dense(tensor).shape == (64,)


def test_on_the_cpu_whatever_the_default_device_is(tmp_path: Path) -> None:
    tensor = of_random_bytes(tmp_path / "t", "Q4_0", (4, 32))
    with torch.device("meta"):
        assert read_dense(tensor).device.type == "cpu"


def test_the_file_changed_since(tmp_path: Path) -> None:
    tensor = of_random_bytes(tmp_path / "t", "F32", (10, 10))
    os.truncate(tmp_path / "t", 100)
    with pytest.raises(GGUFError, match=r"ended inside tensor 't'.*start again"):
        read_dense(tensor)
    (tmp_path / "t").unlink()
    with pytest.raises(GGUFError, match=r"cannot be opened any more \(No such file.*start again"):
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
from kt_vllm.gguf.dense import CHUNK_BYTES, read_dense
shape = (int(sys.argv[2]) // 8192, 8192)
tensor = GGUFTensor("t", "Q8_0", shape, sys.argv[1], 0, shape[0] * 8192 // 32 * 34)
read_dense(GGUFTensor("t", "Q8_0", (1, 8192), sys.argv[1], 0, 8192 // 32 * 34))  # what the first call imports
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
values = read_dense(tensor, torch.bfloat16)
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(peak - values.nbytes, CHUNK_BYTES)
"""


def test_needs_no_more_than_the_result_and_a_few_chunks(tmp_path: Path) -> None:
    """48 Mi weights: 192 MiB as float32, 96 MiB as bfloat16, 51 MiB in the file."""
    num_weights = 48 << 20
    with open(tmp_path / "t", "wb") as file:
        file.truncate(num_weights // 32 * 34)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "t"), str(num_weights)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    extra, chunk = map(int, output.split())
    # For each thread the bytes of a chunk, the chunk decoded, and what malloc keeps of earlier ones; never the file.
    assert extra < 2 * chunk * MAX_THREADS + (16 << 20)
