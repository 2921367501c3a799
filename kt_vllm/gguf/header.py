"""One GGUF file's header: key-value pairs and tensor directory, read within fixed bounds.

The types and block sizes come from the `gguf` package, whose GGUFReader is what the tests compare this file with. It is
not used here because it keeps an array object for every vocabulary entry (7.7 s and 0.6 GB for 130,000 tokens) and
believes the counts it reads, so that a damaged file can hang it.
"""

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from kt_vllm.errors import GGUFError

Scalar = str | int | float | bool

MAX_HEADER_BYTES = 128 << 20  # the largest real header (300k-token vocabulary with merges) is near 20 MB
MAX_TENSORS = 1 << 20  # DeepSeek-R1 with one tensor per expert has 45,000
MAX_KEYS = 1 << 16  # real files have under 100
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NESTING = 4  # of arrays in arrays; real files have none
MAX_WEIGHTS = 1 << 62  # so that no product of sizes leaves 64 bits in the C++ core
DEFAULT_ALIGNMENT = 32  # bytes; GGUF specification
VERSIONS = (2, 3)

_SCALARS: dict[GGUFValueType, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<?"),
}
_U32, _U64 = _SCALARS[GGUFValueType.UINT32], _SCALARS[GGUFValueType.UINT64]

# First bytes of what people download by mistake: (bytes, what it is, what to do).
_LOOKALIKES = (
    (b"version https://git-lfs", "a git-lfs pointer", "run `git lfs pull` to fetch the file it stands for"),
    (b"<!DOCTYPE", "a web page", "download the file itself, not the page that shows it"),
    (b"<!doctype", "a web page", "download the file itself, not the page that shows it"),
    (b"<html", "a web page", "download the file itself, not the page that shows it"),
    (b"PK\x03\x04", "a zip archive or PyTorch checkpoint", "give a GGUF file"),
    (b"tjgg", "a GGML file from before GGUF", "convert the model again with a current llama.cpp"),
    (b"\0\0\0\0", "a run of zero bytes, as an unfinished download leaves it", "download it again"),
)


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor's bytes are.

    type: GGML type name, e.g. "Q4_K"; shape: as torch has it (rows before columns; the reverse of ggml's `ne`);
    offset: bytes from the start of `path`; nbytes: its size there.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What one file says. metadata has the scalars; array_lengths the number of elements of each array."""

    path: str
    size: int
    metadata: Mapping[str, Scalar]
    array_lengths: Mapping[str, int]
    tensors: tuple[GGUFTensor, ...]


def read_header(path: str) -> GGUFHeader:
    """The header of the regular file `path`, parsed once per process and content (path, time, size).

    Raises GGUFError: not there, not readable, not a GGUF, damaged, or shorter than its tensors need.
    """
    try:
        info = os.stat(path)
    except (OSError, ValueError) as e:
        raise GGUFError(f"{path!r} cannot be opened ({_why(e)}): give the path of a GGUF file that exists") from None
    if not stat.S_ISREG(info.st_mode):
        raise GGUFError(f"{path!r} is not a regular file: give a GGUF file or a folder of its shards")
    return _read_header(path, info.st_mtime_ns, info.st_size)


@lru_cache(maxsize=256)
def _read_header(path: str, _mtime_ns: int, size: int) -> GGUFHeader:
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            return _Parser(file, path, size).parse()
    except OSError as e:
        raise GGUFError(f"{path!r} cannot be read ({_why(e)}): check its permissions and its disk") from None


def shown(name: str) -> str:
    """A name out of a file, safe to print."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class _Parser:
    """Reads forward through one header; refuses anything that cannot fit into what is left of the file."""

    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.end = min(size, MAX_HEADER_BYTES)
        self.pos = 0

    def damaged(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path!r} is damaged: {what}; download or convert it again")

    def need(self, count: int, what: str) -> None:
        if count <= self.end - self.pos:
            return
        if count > MAX_HEADER_BYTES or self.end < self.size:
            raise self.damaged(
                f"{what} would take the header to byte {self.pos + count:,}, past the {MAX_HEADER_BYTES >> 20} MiB no "
                "real header needs"
            )
        raise GGUFError(
            f"{self.path!r} is truncated: the file ends after {self.size:,} bytes inside its header, where {what} at "
            f"byte {self.pos:,} needs {count:,} bytes; download or copy it again"
        )

    def read(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise GGUFError(f"{self.path!r} became shorter while it was read: wait until it is complete, then retry")
        self.pos += count
        return data

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.file.seek(count, os.SEEK_CUR)
        self.pos += count

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.read(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.read(8, what))[0])

    def string(self, what: str) -> str:
        data = self.read(self.u64(what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8 text") from None

    def parse(self) -> GGUFHeader:
        self.check_magic()
        num_tensors, num_keys = self.u64("the number of tensors"), self.u64("the number of keys")
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise self.damaged(
                f"it claims {num_tensors:,} tensors and {num_keys:,} keys, and no more than {MAX_TENSORS:,} and "
                f"{MAX_KEYS:,} are believable"
            )
        metadata: dict[str, Scalar] = {}
        array_lengths: dict[str, int] = {}
        for i in range(num_keys):
            key = self.string(f"the name of key {i}")
            if key in metadata or key in array_lengths:
                raise self.damaged(f"the key {shown(key)} is there twice")
            what = f"the value of key {shown(key)}"
            type_ = self.value_type(what)
            if type_ is GGUFValueType.ARRAY:
                array_lengths[key] = self.skip_array(what, 1)
            else:
                metadata[key] = self.scalar(type_, what)
        raw = [self.tensor_info(i) for i in range(num_tensors)]
        tensors = self.place(raw, self.alignment(metadata))
        return GGUFHeader(
            self.path, self.size, MappingProxyType(metadata), MappingProxyType(array_lengths), tuple(tensors)
        )

    def check_magic(self) -> None:
        start = self.file.read(64)
        self.file.seek(0)
        if not start.startswith(b"GGUF"):
            for mark, what, advice in _LOOKALIKES:
                if start.startswith(mark):
                    raise GGUFError(f"{self.path!r} is not a GGUF file but {what}: {advice}")
            if start[8:9] == b"{":
                raise GGUFError(f"{self.path!r} is not a GGUF file but safetensors: convert it with llama.cpp first")
            seen = f"starts with {start[:4]!r}" if start else "is empty"
            raise GGUFError(f"{self.path!r} is not a GGUF file: it {seen} where b'GGUF' is expected; give a GGUF file")
        self.skip(4, "the magic")
        version = self.u32("the version")
        if version & 0xFFFF == 0 and version:
            raise GGUFError(
                f"{self.path!r} is big-endian and only little-endian files are read: convert it with "
                "`gguf-convert-endian`"
            )
        if version not in VERSIONS:
            raise GGUFError(
                f"{self.path!r} has GGUF version {version}, and versions {VERSIONS[0]} and {VERSIONS[1]} are read: "
                "convert the model with a current llama.cpp"
            )

    def value_type(self, what: str) -> GGUFValueType:
        raw = self.u32(what)
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise self.damaged(f"{what} has type {raw}, which GGUF does not have") from None

    def scalar(self, type_: GGUFValueType, what: str) -> Scalar:
        if type_ is GGUFValueType.STRING:
            return self.string(what)
        format_ = _SCALARS[type_]
        value: Scalar = format_.unpack(self.read(format_.size, what))[0]
        return value

    def skip_array(self, what: str, depth: int) -> int:
        type_ = self.value_type(what)
        length = self.u64(what)
        if type_ in _SCALARS:
            self.skip(length * _SCALARS[type_].size, what)
            return length
        self.need(length * 8, what)  # every string or array in it starts with a 64-bit length
        if type_ is GGUFValueType.STRING:
            for _ in range(length):
                self.skip(self.u64(what), what)
            return length
        if depth == MAX_NESTING:
            raise self.damaged(f"{what} is arrays nested more than {MAX_NESTING} deep")
        for _ in range(length):
            self.skip_array(what, depth + 1)
        return length

    def alignment(self, metadata: Mapping[str, Scalar]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or value <= 0 or value & (value - 1) or value > MAX_HEADER_BYTES:
            raise self.damaged(f"general.alignment is {value!r}, and a power of two is expected")
        return value

    def tensor_info(self, index: int) -> tuple[str, str, tuple[int, ...], int, int]:
        """(name, type, shape in torch order, offset in the data section, bytes)"""
        name = self.string(f"the name of tensor {index}")
        what = f"the entry of tensor {shown(name)}"
        num_dims = self.u32(what)
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.damaged(f"tensor {shown(name)} has {num_dims} dimensions, and 1 to {MAX_DIMS} are possible")
        sizes = struct.unpack(f"<{num_dims}Q", self.read(8 * num_dims, what))
        type_id, offset = self.u32(what), self.u64(what)
        num_weights = 1
        for size in sizes:
            num_weights *= size
        if not 0 < num_weights < MAX_WEIGHTS:
            raise self.damaged(
                f"tensor {shown(name)} has the impossible shape {list(reversed(sizes))} ({num_weights:,} weights)"
            )
        try:
            type_ = GGMLQuantizationType(type_id)
        except ValueError:
            raise GGUFError(
                f"tensor {shown(name)} of {self.path!r} has GGML type number {type_id}, which the installed `gguf` "
                "package does not know: upgrade that package, or use another quantisation"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if sizes[0] % block:
            raise self.damaged(
                f"tensor {shown(name)} has rows of {sizes[0]:,} weights, and {type_.name} needs a multiple of {block}"
            )
        return name, type_.name, tuple(reversed(sizes)), offset, num_weights // block * block_bytes

    def place(self, raw: list[tuple[str, str, tuple[int, ...], int, int]], alignment: int) -> list[GGUFTensor]:
        """Absolute offsets, after checking that the tensors lie in the file side by side."""
        start = _padded(self.pos, alignment)
        seen: set[str] = set()
        packed = start  # where the data ends if nothing but padding is between the tensors
        for name, _, _, offset, nbytes in raw:
            if name in seen:
                raise self.damaged(f"tensor {shown(name)} is there twice")
            seen.add(name)
            if offset % alignment:
                raise self.damaged(f"tensor {shown(name)} is at {offset:,}, and a multiple of {alignment} is expected")
            packed += _padded(nbytes, alignment)
        tensors = [GGUFTensor(n, t, s, self.path, start + offset, nbytes) for n, t, s, offset, nbytes in raw]
        end, before, cut = start, "the header", None
        for tensor in sorted(tensors, key=lambda t: t.offset):
            if tensor.offset < end:
                raise self.damaged(f"tensor {shown(tensor.name)} overlaps {before}")
            end, before = tensor.offset + tensor.nbytes, f"tensor {shown(tensor.name)}"
            if end > packed:
                raise self.damaged(
                    f"tensor {shown(tensor.name)} is said to end at byte {end:,}, and all tensors together end by "
                    f"byte {packed:,}"
                )
            cut = cut or (tensor if end > self.size else None)
        if cut:
            raise GGUFError(
                f"{self.path!r} is truncated: it has {self.size:,} bytes and its tensors need {end:,}; the first one "
                f"cut is {shown(cut.name)}; download or copy it again"
            )
        return tensors


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
