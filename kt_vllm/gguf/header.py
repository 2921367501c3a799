"""One GGUF file's header: GGUFReader of the `gguf` package, held within fixed bounds, and checks of what it reads."""

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from kt_vllm.errors import GGUFError

Scalar = str | int | float | bool

MAX_HEADER_BYTES = 128 << 20  # the largest real header (300k-token vocabulary with merges) is near 20 MB
MAX_TENSORS = 1 << 17  # Kimi-K2 with one tensor per expert has 70,000
MAX_KEYS = 1 << 12  # real files have under 100
MAX_TEXT_BYTES = 16 << 20  # of one string that is read; chat templates have 20 kB
MAX_ELEMENTS = 1 << 20  # strings and arrays in all arrays; the largest vocabularies with merges have 800,000
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NESTING = 4  # of arrays in arrays; real files have none
MAX_WEIGHTS = 1 << 62  # so that no product of sizes leaves 64 bits in the C++ core
VERSIONS = (2, 3)

_START = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of keys
_ARRAY = struct.Struct("<IQ")  # element type, length
_U64 = struct.Struct("<Q")
_SIZES = {type_: np.dtype(scalar).itemsize for type_, scalar in GGUFReader.gguf_scalar_to_np.items()}

# First bytes of what people download by mistake: (bytes, what it is, what to do).
_LOOKALIKES = (
    (b"version https://git-lfs", "a git-lfs pointer", "run `git lfs pull` to fetch the file it stands for"),
    ((b"<!DOCTYPE", b"<!doctype", b"<html"), "a web page", "download the file itself, not the page that shows it"),
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
    """What one file says. metadata has the scalars; array_lengths the number of elements of each array.

    cut: what of the tensors' data is not there, as the end of a sentence; "" where all is.
    """

    path: str
    size: int
    cut: str
    metadata: Mapping[str, Scalar]
    array_lengths: Mapping[str, int]
    tensors: tuple[GGUFTensor, ...]


def read_header(path: str, require_data: bool = True) -> GGUFHeader:
    """The header of the regular file `path`, parsed once per process and content (path, time, size).

    Raises GGUFError: not there, not readable, not a GGUF, damaged, or shorter than its tensors need (if require_data).
    """
    try:
        info = os.stat(path)
    except (OSError, ValueError) as e:
        raise GGUFError(f"{path!r} cannot be opened ({_why(e)}): give the path of a GGUF file that exists") from None
    if not stat.S_ISREG(info.st_mode):
        raise GGUFError(f"{path!r} is not a regular file: give a GGUF file or a folder of its shards")
    header = _read_header(path, info.st_mtime_ns, info.st_size)
    if require_data and header.cut:
        raise GGUFError(_truncated(path, header.cut))
    return header


@lru_cache(maxsize=256)
def _read_header(path: str, _mtime_ns: int, _size: int) -> GGUFHeader:
    header = _parse(path)
    if isinstance(header, str):
        raise GGUFError(header)
    return header


def _parse(path: str) -> GGUFHeader | str:
    """The header, or the sentence to refuse it with: an error's traceback would keep the file mapped."""
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            _check_start(file.read(64))
            reader = _Reader(path, file)
        metadata, array_lengths = MappingProxyType(reader.metadata), MappingProxyType(reader.array_lengths)
        return GGUFHeader(path, len(reader.data), reader.cut, metadata, array_lengths, tuple(reader.tensors))
    except GGUFError as e:
        return f"{path!r} {e}"
    except OSError as e:
        return f"{path!r} cannot be read ({_why(e)}): check its permissions and its disk"
    except EOFError as e:
        return _truncated(path, str(e))
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as e:  # ours, and any of GGUFReader's
        return f"{path!r} is damaged: {e}; download or convert it again"


def _truncated(path: str, what: str) -> str:
    return f"{path!r} is truncated: {what}; download or copy it again"


def shown(name: str) -> str:
    """A name out of a file, safe to print."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _check_start(start: bytes) -> None:
    """Refuses what does not begin as a GGUF file, and counts that GGUFReader would believe."""
    if not start.startswith(b"GGUF"):
        for mark, what, advice in _LOOKALIKES:
            if start.startswith(mark):
                raise GGUFError(f"is not a GGUF file but {what}: {advice}")
        if start[8:9] == b"{":
            raise GGUFError("is not a GGUF file but safetensors: convert it with llama.cpp first")
        seen = f"starts with {start[:4]!r}" if start else "is empty"
        raise GGUFError(f"is not a GGUF file: it {seen} where b'GGUF' is expected; give a GGUF file")
    if len(start) < _START.size:
        raise EOFError(f"the file ends after {len(start)} bytes, before the version and the counts do")
    _, version, num_tensors, num_keys = _START.unpack_from(start)
    if version & 0xFFFF == 0 and version:
        raise GGUFError("is big-endian and only little-endian files are read: convert it with `gguf-convert-endian`")
    if version not in VERSIONS:
        raise GGUFError(
            f"has GGUF version {version}, and versions {VERSIONS[0]} and {VERSIONS[1]} are read: convert the model "
            "with a current llama.cpp"
        )
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise ValueError(
            f"it claims {num_tensors:,} tensors and {num_keys:,} keys, and no more than {MAX_TENSORS:,} and "
            f"{MAX_KEYS:,} are believable"
        )


class _Reader(GGUFReader):
    """GGUFReader that stays inside the file, steps over arrays, and has GGUFTensor for tensors.

    GGUFReader keeps an object for every vocabulary entry (5 s and 0.4 GB for 130,000 tokens), slices past the file's
    end, and reads a mapping, so that the process dies where the disk fails or the file is cut meanwhile; here the
    mapping, made read-only, is only asked for its length. What is overridden is internal to gguf 0.19: pyproject.toml
    keeps 0.20 out, and test_gguf_reader.py lists what has to be as it is.

    Raises ValueError (damaged), EOFError (truncated), or GGUFError; _parse begins and ends their sentences.
    """

    what, named = "the header", ""  # what is read now; and, while that is a name, what the name is of

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self.file, self.elements = path, file, 0
        super().__init__(file, "r")

    def need(self, offset: int, count: int) -> int:
        """Where `count` bytes at `offset` end, if the header may be that long."""
        end, size = offset + count, len(self.data)
        if end <= size and end <= MAX_HEADER_BYTES:
            return end
        if max(size, count) > MAX_HEADER_BYTES:
            raise ValueError(
                f"{self.what} would take the header to byte {end:,}, past the {MAX_HEADER_BYTES >> 20} MiB no real "
                "header needs"
            )
        raise EOFError(
            f"the file ends after {size:,} bytes inside its header, where {self.what} at byte {offset:,} needs "
            f"{count:,} bytes"
        )

    def read(self, offset: int, count: int) -> bytes:
        self.need(offset, count)
        self.file.seek(offset)
        data = self.file.read(count)
        if len(data) != count:
            raise GGUFError("became shorter while it was read: wait until it is complete, then retry")
        return data

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        """As GGUFReader's where both the machine and the file are little-endian."""
        return np.frombuffer(self.read(offset, int(count) * np.dtype(dtype).itemsize), dtype)

    def _get_str(self, offset: int) -> Any:
        (size,) = _U64.unpack(self.read(offset, _U64.size))
        if size > MAX_TEXT_BYTES and self.need(offset + _U64.size, size):
            raise ValueError(f"{self.what} has {size:,} bytes, and no more than {MAX_TEXT_BYTES:,} are believable")
        length, data = super()._get_str(offset)
        try:
            text = data.tobytes().decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.what} is not UTF-8 text") from None
        if self.named:
            self.what, self.named = f"{self.named} {shown(text)}", ""
        return length, data

    def _push_field(self, field: Any, skip_sum: bool = False) -> Any:
        if field.name in self.fields:
            raise ValueError(f"the key {shown(field.name)} is there twice")
        return super()._push_field(field, skip_sum)

    def _build_fields(self, offs: int, count: int) -> int:
        self.metadata: dict[str, Scalar] = {}
        self.array_lengths: dict[str, int] = {}
        for i in range(count):
            self.what, self.named = f"the name of key {i}", "the value of key"
            offs = super()._build_fields(offs, 1)
            name, field = next(reversed(self.fields.items()))
            if field.types[0] == GGUFValueType.ARRAY:
                self.array_lengths[name] = int(field.parts[-1][0])
            else:
                self.metadata[name] = field.contents()
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_HEADER_BYTES or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, and a power of two is expected")
        return offs

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """As GGUFReader's, but of an array only the length."""
        if raw_type != GGUFValueType.ARRAY:
            self.check_type(raw_type)
            return super()._get_field_parts(orig_offs, raw_type)
        end = self.end_of_array(orig_offs, 1)
        return end - orig_offs, [self._get(orig_offs + 4, np.uint64)], [0], [GGUFValueType.ARRAY]

    def check_type(self, number: int) -> None:
        if number > max(GGUFValueType):
            raise ValueError(f"{self.what} has type {number}, which GGUF does not have")

    def end_of_array(self, offset: int, depth: int) -> int:
        type_, length = _ARRAY.unpack(self.read(offset, _ARRAY.size))
        end = offset + _ARRAY.size
        if type_ in _SIZES:
            return self.need(end, length * _SIZES[type_])
        self.check_type(type_)
        self.need(end, length * _U64.size)  # every string or array in it has a 64-bit length
        self.elements += length
        if self.elements > MAX_ELEMENTS:
            raise ValueError(
                f"{self.what} brings the strings and arrays in arrays to {self.elements:,}, and no more than "
                f"{MAX_ELEMENTS:,} are believable"
            )
        if type_ == GGUFValueType.STRING:
            for _ in range(length):
                end = self.need(end + _U64.size, *_U64.unpack(self.read(end, _U64.size)))
            return end
        if depth == MAX_NESTING:
            raise ValueError(f"{self.what} is arrays nested more than {MAX_NESTING} deep")
        for _ in range(length):
            end = self.end_of_array(end, depth + 1)
        return end

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[GGUFTensor]]:
        tensors: dict[str, GGUFTensor] = {}
        for i in range(count):
            self.what, self.named = f"the name of tensor {i}", "the entry of tensor"
            offs, [field] = super()._build_tensor_info(offs, 1)
            if field.name in tensors:
                raise ValueError(f"tensor {shown(field.name)} is there twice")
            tensors[field.name] = self.tensor(field.name, *field.parts[3:])
        return offs, list(tensors.values())

    def tensor(self, name: str, dims: Any, type_id: Any, offset: Any) -> GGUFTensor:
        what = f"tensor {shown(name)}"
        if not 1 <= len(dims) <= MAX_DIMS:
            raise ValueError(f"{what} has {len(dims)} dimensions, and 1 to {MAX_DIMS} are possible")
        sizes = dims.tolist()
        num_weights = prod(sizes)
        if not 0 < num_weights < MAX_WEIGHTS:
            raise ValueError(f"{what} has the impossible shape {sizes[::-1]} ({num_weights:,} weights)")
        try:
            type_ = GGMLQuantizationType(type_id[0])
        except ValueError:
            raise GGUFError(
                f"has {what} of GGML type number {type_id[0]}, which the installed `gguf` package does not know: "
                "upgrade that package, or use another quantisation"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if sizes[0] % block:
            raise ValueError(f"{what} has rows of {sizes[0]:,} weights, and {type_.name} needs a multiple of {block}")
        nbytes = num_weights // block * block_bytes
        return GGUFTensor(name, type_.name, tuple(sizes[::-1]), self.path, int(offset[0]), nbytes)

    def _build_tensors(self, start_offs: int, fields: list[GGUFTensor]) -> None:
        """Absolute offsets, after checking that the tensors lie side by side; and what of them is cut."""
        start, alignment, size = int(start_offs), int(self.alignment), len(self.data)
        packed = start + sum(-(-t.nbytes // alignment) * alignment for t in fields)  # where they end without gaps
        self.tensors = [replace(t, offset=start + t.offset) for t in fields]
        end, before, first_cut = start, "the header", ""
        for t in sorted(self.tensors, key=lambda t: t.offset):
            what = f"tensor {shown(t.name)}"
            if t.offset % alignment:
                raise ValueError(f"{what} is at {t.offset - start:,}, and a multiple of {alignment} is expected")
            if t.offset < end:
                raise ValueError(f"{what} overlaps {before}")
            end, before = t.offset + t.nbytes, what
            if end > packed:
                raise ValueError(
                    f"{what} is said to end at byte {end:,}, and all tensors together end by byte {packed:,}"
                )
            first_cut = first_cut or (shown(t.name) if end > size else "")
        self.cut = first_cut and (
            f"it has {size:,} bytes and its tensors need {end:,}; the first one cut is {first_cut}"
        )
