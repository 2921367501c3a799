"""Every bad file ends in one clear sentence: nothing of the gguf package's own, no hang, no big allocation."""

import os
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf.constants import GGUFValueType as T

from kt_vllm.checkpoint import CheckpointPlan, iter_dense
from kt_vllm.errors import GGUFError
from kt_vllm.gguf import GGUFModel
from kt_vllm.gguf.header import _read_header, _Reader
from tests import gguf_files as files


def refusal(path: Path | str) -> str:
    """The sentence with which opening ends: one line, not too long, with what to do after a colon or semicolon."""
    with pytest.raises(GGUFError) as caught:
        GGUFModel.open(str(path))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert ":" in text or ";" in text
    assert caught.value.__cause__ is None
    return text


def of_bytes(tmp_path: Path, data: bytes) -> str:
    (tmp_path / "bad.gguf").write_bytes(data)
    return refusal(tmp_path / "bad.gguf")


def check(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, text


def nested_bomb(depth: int) -> bytes:
    """Arrays of arrays of empty ones: over a million of them, all there."""
    inner = struct.pack("<IQ", T.UINT8, 0) * 128
    for _ in range(depth - 1):
        inner = struct.pack("<IQ", T.ARRAY, 128) + inner
        inner *= 128
    return files.key("a", T.ARRAY, struct.pack("<IQ", T.ARRAY, 128) + inner)


def strings_bomb() -> bytes:
    return files.key("a", T.ARRAY, struct.pack("<IQ", T.STRING, 3_000_000) + bytes(24_000_000))


def half_bomb(name: str) -> bytes:
    return files.key(name, T.ARRAY, struct.pack("<IQ", T.STRING, 700_000) + bytes(8 * 700_000))


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"", ["not a GGUF file", "is empty"]),
        (b"GG", ["not a GGUF file", "b'GG'"]),
        (b"hello, world" * 10, ["not a GGUF file", "b'hell'", "b'GGUF'"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git-lfs pointer", "git lfs pull"]),
        (b"<!DOCTYPE html><html>", ["web page", "download the file itself"]),
        (b"PK\3\4" + bytes(100), ["zip archive or PyTorch"]),
        (struct.pack("<Q", 90) + b'{"a":' + bytes(100), ["safetensors"]),
        (bytes(4096), ["zero bytes", "download it again"]),
        (b"GGUF", ["truncated", "ends after 4 bytes", "the version"]),
        (files.raw(version=1), ["GGUF version 1", "2 and 3"]),
        (files.raw(version=9), ["GGUF version 9", "2 and 3"]),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian", "little-endian", "gguf-convert-endian"]),
        (files.raw(num_tensors=1 << 60), ["1,152,921,504,606,846,976 tensors", "131,072"]),
        (files.raw(num_keys=1 << 63), ["9,223,372,036,854,775,808 keys"]),
        (files.raw(num_keys=4_000), ["damaged"]),
        (files.raw(num_keys=4_097), ["damaged", "4,097 keys", "4,096"]),
        (files.raw(num_tensors=131_073), ["damaged", "131,073 tensors"]),
        (files.raw(entries=[files.entry("t", [4])], num_tensors=2, data=bytes(16)), ["damaged"]),
        (files.raw(num_keys=0, entries=[files.entry("t", [4])], data=bytes(16)), ["tensor 'general.architecture'"]),
        (files.raw([files.key("a", T.STRING, files.string(bytes(17 << 20)))]), ["'a' has 17,825,792 bytes"]),
        (files.raw([files.key("n" * (17 << 20), T.UINT8, b"\1")]), ["name of key 0 has 17,825,792 bytes"]),
        (files.raw([nested_bomb(3)]), ["damaged", "value of key 'a'", "strings and arrays in arrays to 1,"]),
        (files.raw([strings_bomb()]), ["damaged", "value of key 'a'", "to 3,000,000, and no more than 1,048,576"]),
        (files.raw([half_bomb("a"), half_bomb("b")]), ["damaged", "value of key 'b'", "to 1,400,000"]),
        (files.raw([files.key("a", T.ARRAY, struct.pack("<IQ", 13, 1))]), ["damaged", "'a' has type 13"]),
        (files.raw([files.key("a", 4_000_000_000, b"")]), ["damaged", "type 4000000000"]),
        (files.raw([files.key("general.architecture", T.UINT32, bytes(4))]), ["no key general.architecture"]),
        (
            files.raw([files.key("general.architecture", T.ARRAY, struct.pack("<IQ", T.STRING, 0))]),
            ["no key general.architecture"],
        ),
        (files.raw([files.key("general.alignment", T.STRING, files.string("32"))]), ["alignment"]),
        (files.raw([files.key("general.alignment", T.UINT32, struct.pack("<I", 1 << 31))]), ["is 2147483648"]),
        (files.raw([files.key("general.alignment", T.BOOL, b"\1")]), ["alignment"]),
        (files.raw([files.key("general.alignment", T.ARRAY, struct.pack("<IQI", T.UINT32, 1, 32))]), ["alignment"]),
        (files.raw([], num_keys=1), ["truncated", "key ''"]),
        (files.raw([struct.pack("<Q", 1 << 62)]), ["damaged", "key 0", "128 MiB"]),
        (files.raw([files.key("a", T.STRING, struct.pack("<Q", (1 << 64) - 8))]), ["damaged", "'a'"]),
        (files.raw([files.key("a", 13, b"")]), ["damaged", "type 13"]),
        (files.raw([files.key("a", T.UINT8, b"\1")] * 2), ["damaged", "'a'", "twice"]),
        (files.raw([files.key("a", T.STRING, files.string(b"\xff\xfe"))]), ["damaged", "UTF-8"]),
        (files.raw([files.key("a", T.ARRAY, struct.pack("<IQ", T.STRING, 1 << 61))]), ["damaged", "'a'"]),
        (files.raw([files.key("a", T.ARRAY, struct.pack("<IQ", T.UINT64, 1 << 62))]), ["damaged", "'a'"]),
        (files.raw([files.key("a", T.ARRAY, struct.pack("<IQ", T.ARRAY, 1) * 50)]), ["damaged", "nested"]),
        (
            files.raw([files.key("general.alignment", T.UINT32, struct.pack("<I", 0))]),
            ["alignment is 0", "power of two"],
        ),
        (files.raw([files.key("general.alignment", T.UINT32, struct.pack("<I", 24))]), ["alignment is 24"]),
        (files.raw([files.key("general.alignment", T.FLOAT32, struct.pack("<f", 32))]), ["alignment is 32.0"]),
        (
            files.raw([files.key("general.alignment", T.UINT64, struct.pack("<Q", 32))]),
            ["damaged", "general.alignment"],
        ),
        (files.raw([files.key("GGUF.version", T.UINT8, b"\1")]), ["damaged", "'GGUF.version'", "twice"]),
        (
            files.raw([files.key("a", T.UINT8, b"\1")], [files.entry("t", [4])], data=bytes(16)),
            ["general.architecture"],
        ),
        (files.raw(entries=[files.entry("t", [])]), ["'t'", "0 dimensions", "1 to 4"]),
        (files.raw(entries=[files.entry("t", [1] * 9)]), ["'t'", "9 dimensions"]),
        (files.raw(entries=[files.entry("t", [0, 4])]), ["'t'", "impossible shape [4, 0]"]),
        (
            files.raw(entries=[files.string("t") + struct.pack("<I", 0xFFFFFFFF) + bytes(32)]),
            ["damaged", "entry of tensor 't'", "128 MiB"],
        ),
        (files.raw(entries=[files.entry("t", [(1 << 64) - 1])]), ["'t'", "impossible shape"]),
        (files.raw(entries=[files.entry("t", [1 << 63, 2])]), ["'t'", "impossible shape"]),
        (files.raw(entries=[files.entry("t" * (17 << 20), [4])]), ["name of tensor 0 has 17,825,792 bytes"]),
        (files.raw(entries=[files.entry("t", [256], 31)]), ["'t'", "type number 31", "another quantisation"]),
        (files.raw(entries=[files.entry("t", [1 << 32, 1 << 32])]), ["'t'", "impossible shape"]),
        (files.raw(entries=[files.entry("t", [1 << 33] * 4)]), ["'t'", "impossible shape"]),
        (files.raw(entries=[files.entry("t", [32], 4)]), ["'t'", "type number 4", "upgrade"]),
        (files.raw(entries=[files.entry("t", [32], 4_000_000_000)]), ["'t'", "type number 4000000000"]),
        (files.raw(entries=[files.entry("t", [100], 12)]), ["'t'", "rows of 100", "Q4_K", "multiple of 256"]),
        (files.raw(entries=[files.entry(b"\xff", [4])]), ["tensor 0", "UTF-8"]),
        (files.raw(entries=[files.entry("t", [8], 0, 8)], data=bytes(64)), ["'t'", "is at 8", "multiple of 32"]),
        (files.raw(entries=[files.entry("t", [8])] * 2, data=bytes(64)), ["'t'", "twice"]),
        (
            files.raw(entries=[files.entry("t", [16]), files.entry("u", [8], 0, 32)], data=bytes(64)),
            ["'u'", "overlaps", "'t'"],
        ),
        (files.raw(entries=[files.entry("t", [8]), files.entry("u", [8])], data=bytes(64)), ["overlaps"]),
        (files.raw(entries=[files.entry("t", [8], 0, 1 << 40)], data=bytes(64)), ["damaged", "'t'", "end at byte"]),
        (files.raw(entries=[files.entry("t", [8], 0, (1 << 64) - 32)], data=bytes(64)), ["damaged", "'t'"]),
        (files.raw(entries=[files.entry("t", [1 << 40])], data=bytes(64)), ["truncated", "'t'"]),
        (files.raw(entries=[files.entry("t", [(1 << 62) - 1])], data=bytes(64)), ["truncated", "'t'"]),
        (
            files.raw(entries=[files.entry(f"t{i}", [1 << 60], 0, i << 62) for i in range(4)], data=bytes(64)),
            ["truncated", "'t0'"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_bytes(tmp_path: Path, data: bytes, parts: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    check(of_bytes(tmp_path, data), "bad.gguf" if parts[0] != "'t'" else "'t'", *parts)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_name_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    text = of_bytes(tmp_path, files.raw(entries=[files.entry("\x1b[2J\n" + "x" * 5000, [])]))
    check(text, r"\x1b[2J\nxxx", "xxx...")
    assert "\x1b" not in text


def test_paths(tmp_path: Path) -> None:
    check(refusal(tmp_path / "none.gguf"), "none.gguf", "does not exist")
    check(refusal("/m\0.gguf"), r"/m\x00.gguf", "does not exist")
    os.mkfifo(tmp_path / "pipe.gguf")
    check(refusal(tmp_path / "pipe.gguf"), "not a regular file")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "gone")
    check(refusal(tmp_path / "link.gguf"), "link.gguf", "No such file")
    empty = tmp_path / "empty"
    empty.mkdir()
    check(refusal(empty), "no .gguf file", "give one that has")
    (empty / "Q4_K_M").mkdir()
    (empty / "Q4_K_M" / "a.gguf").write_bytes(b"")
    check(refusal(empty), "no .gguf file", "Q4_K_M")
    (empty / "b.gguf").write_bytes(b"")
    (empty / "c-00001-of-00002.gguf").write_bytes(b"")
    (empty / "c-00002-of-00002.gguf").write_bytes(b"")
    check(refusal(empty), "2 models", "b.gguf, c-0000")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write(tmp_path / "m.gguf", files.random_tensors())

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    check(refusal(path), "m.gguf", "Permission denied")


def test_truncated_data_names_the_first_tensor_cut(tmp_path: Path) -> None:
    path = files.write(tmp_path / "m.gguf", files.random_tensors())
    tensors = sorted(GGUFModel.open(str(path)).tensors.values(), key=lambda t: t.offset)
    needed = tensors[-1].offset + tensors[-1].nbytes
    os.truncate(path, tensors[5].offset + 1)
    check(refusal(path), "truncated", f"{tensors[5].offset + 1:,}", f"{needed:,}", repr(tensors[5].name))


def test_a_file_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends in a sentence too: reading a mapping would end the process with SIGBUS."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(files.raw([files.key("a", T.STRING, files.string(bytes(4 << 20)))]))
    real = _Reader._build_fields

    def cut(self: _Reader, offs: int, count: int) -> int:
        os.truncate(path, 2 << 20)
        return real(self, offs, count)

    monkeypatch.setattr(_Reader, "_build_fields", cut)
    check(refusal(path), "cut.gguf", "became shorter")


def shards(tmp_path: Path) -> list[Path]:
    files.write(tmp_path / "m.gguf", files.random_tensors(), split=15)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_missing_shards(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[1].unlink()
    for given in (tmp_path, paths[0], paths[2]):
        check(refusal(given), f"1 of {len(paths)} shards missing", paths[1].name, "download")
    check(refusal(paths[1]), "does not exist")


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_shards_that_are_not_one_model(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    a, b = paths[1].read_bytes(), paths[2].read_bytes()
    paths[1].write_bytes(b)
    paths[2].write_bytes(a)
    check(refusal(tmp_path), paths[1].name, "split.no is 2", "1 is expected")
    paths[1].write_bytes(a)
    paths[2].write_bytes(b)
    name = next(n for n in files.tensor_shapes() if files.string(n) in b)
    other = next(n for n in files.tensor_shapes() if files.string(n) in a)
    edit(paths[2], files.string(name), files.string(other))
    check(refusal(tmp_path), repr(other), paths[1].name, paths[2].name)


def test_split_counts(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    total = len(files.tensor_shapes())
    entry = files.string("split.tensors.count") + struct.pack("<I", T.INT32)
    edit(paths[0], entry + struct.pack("<i", total), entry + struct.pack("<i", total + 1))
    check(refusal(tmp_path), f"{total} tensors", f"says {total + 1}")
    lone = tmp_path / "renamed.gguf"
    paths[0].rename(lone)
    check(refusal(lone), f"one of {len(paths)} shards", "one of 1", "-00001-of-")
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("p-00001-of-00002.gguf", "p-00002-of-00002.gguf"):
        files.write(plain / name, files.random_tensors())
    check(refusal(plain), "one of no shards", "one of 2")
    odd = tmp_path / "p-00003-of-00002.gguf"
    odd.write_bytes(b"")
    check(refusal(odd), "number 3 of 2")


def header_of_everything() -> bytes:
    keys = [
        files.ARCHITECTURE,
        files.key("a", T.ARRAY, struct.pack("<IQ", T.STRING, 2) + files.string("x") * 2),
        files.key("b", T.ARRAY, struct.pack("<IQ3I", T.UINT32, 3, 1, 2, 3)),
        files.key("c", T.UINT64, bytes(8)),
    ]
    entries = [files.entry("t", [32, 2]), files.entry("u", [32, 4, 2], 8, 256), files.entry("v", [5], 0, 544)]
    return files.raw(keys, entries, data=bytes(544 + 20))


def outcome(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    _read_header.cache_clear()
    try:
        GGUFModel.open(str(path))
    except GGUFError as e:
        return str(e)
    return ""


def test_cut_anywhere(tmp_path: Path) -> None:
    data = header_of_everything()
    assert outcome(tmp_path / "m.gguf", data) == ""
    for end in range(len(data)):
        text = outcome(tmp_path / "m.gguf", data[:end])
        assert "truncated" in text or (end < 4 and "not a GGUF" in text), (end, text)


@pytest.mark.parametrize("change", [lambda r, old: r.randrange(256), lambda r, old: old ^ (1 << r.randrange(8))])
def test_any_byte_changed(tmp_path: Path, change: Callable[[random.Random, int], int]) -> None:
    """Opens, or is refused: no other exception, no hang."""
    data = header_of_everything()
    rng = random.Random(2)
    refused = 0
    for i in range(len(data) - 564):
        for _ in range(2):
            damaged = bytearray(data)
            damaged[i] = change(rng, data[i])
            refused += bool(outcome(tmp_path / "m.gguf", bytes(damaged)))
    assert refused > 150


def mutated(rng: random.Random, data: bytes, header_size: int) -> bytes:
    """A few wrong numbers, a piece lost, or a piece twice, in the header."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        at, size = rng.randrange(header_size), rng.choice((1, 4, 8))
        kind = rng.randrange(4)
        if kind == 0:
            del damaged[at : at + size]
        elif kind == 1:
            damaged[at:at] = damaged[at : at + rng.randrange(1, 60)]
        elif kind == 2:
            damaged[at : at + size] = rng.choice((0, 1, 1 << 7, (1 << 8 * size - 1) - 1)).to_bytes(size, "little")
        else:
            damaged[at : at + size] = (b"\xff" * 8)[:size]
    return bytes(damaged)


def test_a_damaged_model_is_loaded_or_refused(tmp_path: Path) -> None:
    """All that reads a file, up to the tensors' values: it works, or GGUFError says why not."""
    path = files.write(tmp_path / "m.gguf", files.random_tensors(), type_of=lambda n: "F32" if "norm" in n else "F16")
    data = path.read_bytes()
    header_size = min(t.offset for t in GGUFModel.open(str(path)).tensors.values())
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    refused, start = 0, time.process_time()
    for i in range(400):
        path.write_bytes(mutated(rng, data, header_size))
        os.utime(path, ns=(i, i))  # parsed anew
        try:
            plan = CheckpointPlan.build(GGUFModel.open(str(path)), files.hf_config())
            assert sum(values.numel() for _, values in iter_dense(plan)) < 1e6
        except GGUFError as e:
            assert "\n" not in str(e) and len(str(e)) < 800, seed
            refused += 1
        except Exception as e:
            raise AssertionError(f"seed {seed}, mutation {i}") from e
    assert 100 < refused < 400, seed
    assert time.process_time() - start < 60, seed


def test_a_giant_of_zeros_does_not_hang(tmp_path: Path) -> None:
    """Counts that the file is long enough for: names of no length, tensors of no size."""
    for data in (
        files.raw(num_tensors=1 << 17),
        files.raw([files.key("a", T.ARRAY, struct.pack("<IQ", T.STRING, 1 << 34))]),
        files.raw([files.key("a", T.ARRAY, struct.pack("<IQ", T.STRING, 1 << 22))]),
        files.raw([files.key("a", T.ARRAY, struct.pack("<IQ", T.ARRAY, 1 << 23))]),
    ):
        path = tmp_path / "zeros.gguf"
        path.write_bytes(data)
        os.truncate(path, 1 << 40)
        start = time.process_time()
        check(refusal(path), "damaged")
        assert time.process_time() - start < 2
