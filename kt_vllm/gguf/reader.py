"""A GGUF model, in one file or in shards, as a list of named tensors and where their bytes are."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kt_vllm.errors import GGUFError
from kt_vllm.gguf.header import GGUFHeader, GGUFTensor, Scalar, read_header, shown

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)  # gguf-split's own pattern

# What llama.cpp's tools write beside a model: vision parts, importance matrices, prediction heads for its own drafts.
_BESIDE = re.compile(r"(.*[-._/])?(mmproj|imatrix|mtp)[-._].*", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class GGUFModel:
    """All the tensors of one model.

    path: absolute path of the file, or of the first shard; paths: of every shard, in order; metadata: the scalars of
    the first shard; array_lengths: numbers of elements of its arrays; tensors: by name, in file order.
    """

    path: str
    paths: tuple[str, ...]
    architecture: str
    metadata: Mapping[str, Scalar]
    array_lengths: Mapping[str, int]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def open(cls, path: str, require_data: bool = True) -> "GGUFModel":
        """Reads the headers (no tensor data) of the file, of the folder's one model, or of the set a shard belongs to.

        require_data: False accepts files that end before their tensors' data does, for who asks the headers alone.
        Raises GGUFError where anything is missing, damaged, cut or ambiguous.
        """
        full = os.path.abspath(os.path.expanduser(path))
        if os.path.isdir(full):
            full = _model_in_folder(full)
        elif not os.path.exists(full) and not os.path.islink(full):
            raise GGUFError(f"{path!r} does not exist: give a GGUF file, its first shard, or the folder of its shards")
        paths = _shard_set(full)
        headers = [read_header(p, require_data) for p in paths]
        _check_split(headers)
        tensors: dict[str, GGUFTensor] = {}
        for header in headers:
            for tensor in sorted(header.tensors, key=lambda t: t.offset):
                if tensor.name in tensors:
                    raise GGUFError(
                        f"tensor {shown(tensor.name)} is both in {tensors[tensor.name].path!r} and in {header.path!r}: "
                        "the shards are not of one model; download them again"
                    )
                tensors[tensor.name] = tensor
        first = headers[0]
        architecture = first.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise GGUFError(
                f"{first.path!r} has no key general.architecture, which every model has: it may be a vocabulary or an "
                "adapter; give a model"
            )
        return cls(first.path, paths, architecture, first.metadata, first.array_lengths, MappingProxyType(tensors))

    def get(self, key: str) -> Scalar | None:
        """The metadata value `ARCHITECTURE.key`, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


def _model_in_folder(folder: str) -> str:
    """The path of the folder's one model (of any one of its shards)."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError as e:
        raise GGUFError(f"the folder {folder!r} cannot be listed ({e.strerror}): check its permissions") from None
    found = [n for n in entries if n.endswith(".gguf") and not n.startswith(".")]
    names = [n for n in found if is_model(n)] or found
    models = {(m["stem"], m["count"]) if (m := SHARD.fullmatch(n)) else (n, ""): n for n in names}
    if not models:
        below = [n for n in entries if _has_gguf(os.path.join(folder, n))]
        hint = f"; its folder(s) {listed(below)} have some: give one of them" if below else ": give one that has"
        raise GGUFError(f"the folder {folder!r} has no .gguf file{hint}")
    if len(models) > 1:
        raise GGUFError(
            f"the folder {folder!r} has {len(models)} models ({listed(sorted(models.values()))}): give the path of "
            "one file, or of a first shard"
        )
    return os.path.join(folder, next(iter(models.values())))


def _has_gguf(folder: str) -> bool:
    try:
        return any(n.endswith(".gguf") for n in os.listdir(folder))
    except OSError:  # not a folder, or not ours to read: no hint then
        return False


def is_model(name: str) -> bool:
    """Whether a file of this name is a model by itself, or a shard of one."""
    return name.endswith(".gguf") and not _BESIDE.fullmatch(name)


def listed(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _shard_set(path: str) -> tuple[str, ...]:
    """Every shard of the set that `path` is one of, in order; `path` alone if it is not a shard."""
    folder, name = os.path.split(path)
    match = SHARD.fullmatch(name)
    if not match:
        return (path,)
    count, number = int(match["count"]), int(match["number"])
    if not 1 <= number <= count:
        raise GGUFError(f"{path!r} cannot be a shard, being number {number} of {count}: restore its name")
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    missing = [n for n in names if not os.path.exists(os.path.join(folder, n))]
    if missing:
        raise GGUFError(
            f"{len(missing)} of {count} shards missing in {folder!r}: {listed(missing)}; download them into it"
        )
    return tuple(os.path.join(folder, n) for n in names)


def _check_split(headers: list[GGUFHeader]) -> None:
    """The files' own split.* keys against their names; a file that was never split has none."""
    for number, header in enumerate(headers):
        count = header.metadata.get("split.count", 0)
        if len(headers) == 1 and count in (0, 1):
            return
        if count != len(headers):
            raise GGUFError(
                f"{header.path!r} says it is one of {count or 'no'} shards and its name says one of {len(headers)}: "
                "give the shards back the names they were made with (NAME-00001-of-0000N.gguf)"
            )
        seen = header.metadata.get("split.no")
        if seen != number:
            raise GGUFError(
                f"{header.path!r} says its split.no is {seen}, and {number} is expected by its name: the shards' names "
                "were mixed up; download them again"
            )
    total = sum(len(h.tensors) for h in headers)
    for header in headers:  # gguf-split writes the count of all shards into each
        expected = header.metadata.get("split.tensors.count", total)
        if total != expected:
            raise GGUFError(
                f"the {len(headers)} shards of {headers[0].path!r} have {total:,} tensors together and "
                f"split.tensors.count of {header.path!r} says {expected}: they are not of one model; download them "
                "again"
            )
