"""What a GGUF file says is what the reader says, whichever way the file was named or split."""

import inspect
import os
import shutil
import struct
import time
from importlib.metadata import version
from pathlib import Path

import gguf
import pytest
from gguf.constants import GGUFValueType as T

from kt_vllm.errors import GGUFError
from kt_vllm.gguf import GGUFModel, header
from tests import gguf_files as files


def contents(model: GGUFModel) -> dict[str, bytes]:
    found = {}
    for name, tensor in model.tensors.items():
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            found[name] = file.read(tensor.nbytes)
    return found


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_get", ["offset", "dtype", "count", "override_order"]),
        ("_get_str", ["offset"]),
        ("_push_field", ["field", "skip_sum"]),
        ("_build_fields", ["offs", "count"]),
        ("_get_field_parts", ["orig_offs", "raw_type"]),
        ("_build_tensor_info", ["offs", "count"]),
        ("_build_tensors", ["start_offs", "fields"]),
    ],
)
def test_the_gguf_package_has_the_internal_methods_relied_on(name: str, parameters: list[str]) -> None:
    method = getattr(gguf.GGUFReader, name, None)
    found = None if method is None else list(inspect.signature(method).parameters)
    assert found == ["self", *parameters], (
        f"gguf {version('gguf')} has changed GGUFReader.{name}, which kt_vllm/gguf/header.py overrides: adapt _Reader "
        "there, or keep that release out in pyproject.toml"
    )
    assert name in vars(header._Reader), f"_Reader no longer overrides {name}: take it off this list"


def test_agrees_with_the_gguf_package_on_a_file_of_llama_cpp() -> None:
    """Stepping over arrays, and making no views, leaves the scalars and the tensors as they were."""
    model = GGUFModel.open(str(files.TINY))
    reader = gguf.GGUFReader(model.path)
    expected = {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in reader.tensors
    }
    assert {n: (t.type, t.shape, t.offset, t.nbytes) for n, t in model.tensors.items()} == expected
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    arrays = {k: len(f.data) for k, f in fields.items() if f.types[0] == T.ARRAY}
    assert dict(model.array_lengths) == arrays
    assert dict(model.metadata) == {k: f.contents() for k, f in fields.items() if k not in arrays}
    assert model.architecture == "deepseek2"
    assert model.get("expert_count") == 16
    assert model.get("no_such_key") is None


def test_every_kind_of_value(tmp_path: Path) -> None:
    values = [
        (T.UINT8, "B", 200),
        (T.INT8, "b", -3),
        (T.UINT16, "H", 60000),
        (T.INT16, "h", -300),
        (T.UINT32, "I", 4_000_000_000),
        (T.INT32, "i", -70000),
        (T.FLOAT32, "f", 0.5),
        (T.UINT64, "Q", 1 << 60),
        (T.INT64, "q", -(1 << 60)),
        (T.FLOAT64, "d", 0.1),
        (T.BOOL, "?", True),
    ]
    keys = [files.ARCHITECTURE]
    keys += [files.key(f"k{t.name}", t, struct.pack("<" + f, v)) for t, f, v in values]
    keys.append(files.key("text", T.STRING, files.string("grüß\n")))
    keys.append(files.key("words", T.ARRAY, struct.pack("<IQ", T.STRING, 2) + files.string("a") + files.string("")))
    inner = struct.pack("<IQ3H", T.UINT16, 3, 1, 2, 3)
    keys.append(files.key("nested", T.ARRAY, struct.pack("<IQ", T.ARRAY, 2) + inner + inner))
    keys.append(files.key("after", T.UINT8, b"\7"))
    (tmp_path / "a.gguf").write_bytes(files.raw(keys, [files.entry("t", [4])], data=bytes(16)))
    model = GGUFModel.open(str(tmp_path / "a.gguf"))
    for type_, _, value in values:
        assert model.metadata[f"k{type_.name}"] == value
        assert type(model.metadata[f"k{type_.name}"]) is type(value)
    assert model.metadata["text"] == "grüß\n"
    assert model.metadata["after"] == 7
    assert dict(model.array_lengths) == {"words": 2, "nested": 2}


def test_version_2_and_another_alignment(tmp_path: Path) -> None:
    keys = [files.ARCHITECTURE, files.key("general.alignment", T.UINT32, struct.pack("<I", 256))]
    data = files.raw(keys, [files.entry("a", [3]), files.entry("b", [2, 3], 0, 256)], version=2)
    start = -(-len(data) // 256) * 256
    assert start > len(data)
    (tmp_path / "a.gguf").write_bytes(data.ljust(start, b"\0") + bytes(256 + 24))
    tensors = GGUFModel.open(str(tmp_path / "a.gguf")).tensors
    assert [(t.shape, t.offset, t.nbytes) for t in tensors.values()] == [((3,), start, 12), ((3, 2), start + 256, 24)]


@pytest.mark.parametrize("named", ["folder", "first", "middle", "last", "relative", "home"])
def test_shards_are_one_model(tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = files.random_tensors()
    whole = GGUFModel.open(str(files.write(tmp_path / "whole.gguf", tensors)))
    folder = tmp_path / "shards"
    folder.mkdir()
    first = files.write(folder / "m.gguf", tensors, split=10)
    (folder / "README.md").write_text("not a model")
    (folder / "._m-00001-of-00009.gguf").write_bytes(b"\0\5\x16\7")  # what macOS leaves beside copied files
    shards = sorted(folder.glob("m-*.gguf"))
    assert len(shards) > 3
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    path = {
        "folder": folder,
        "first": first,
        "middle": shards[1],
        "last": shards[-1],
        "relative": first.name,
        "home": "~/shards",
    }[named]
    model = GGUFModel.open(str(path))
    assert model.path == str(first)
    assert model.paths == tuple(map(str, shards))
    assert list(model.tensors) == list(whole.tensors)
    assert contents(model) == contents(whole)
    assert model.get("expert_count") == 4


def test_a_folder_with_one_file_and_a_link(tmp_path: Path) -> None:
    """The hub's cache is made of links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    files.write(tmp_path / "blobs" / "abc", files.random_tensors())
    (tmp_path / "snapshot" / "m.gguf").symlink_to(tmp_path / "blobs" / "abc")
    assert len(GGUFModel.open(str(tmp_path / "snapshot")).tensors) == len(files.tensor_shapes())


def test_parsed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    real = header._parse

    def counted(path: str) -> header.GGUFHeader | str:
        parsed.append(path)
        return real(path)

    monkeypatch.setattr(header, "_parse", counted)
    path = files.write(tmp_path / "m.gguf", files.random_tensors())
    first = GGUFModel.open(str(path))
    assert GGUFModel.open(str(tmp_path)).tensors == first.tensors
    assert len(parsed) == 1
    files.write(path, files.random_tensors(), files.gguf_metadata(expert_count=8))
    os.utime(path, ns=(1, 1))
    assert GGUFModel.open(str(path)).get("expert_count") == 8
    assert len(parsed) == 2


def test_no_mapping_of_the_file_stays(tmp_path: Path) -> None:
    path = files.write(tmp_path / "mapped.gguf", files.random_tensors())
    model = GGUFModel.open(str(path))
    assert model.tensors
    check_neither_mapped_nor_open("mapped.gguf")


@pytest.mark.parametrize(
    "data",
    [
        files.raw([files.key("a", 13, b"")]),
        files.raw([files.key("a", T.STRING, files.string(b"\xff"))]),
        files.raw([files.key("general.alignment", T.UINT64, struct.pack("<Q", 32))]),
        files.raw(entries=[files.entry("t", [32], 4)]),
        files.raw(entries=[files.entry("t", [1 << 20])]),
    ],
    ids=["key", "text", "refused by GGUFReader itself", "tensor", "truncated"],
)
def test_no_mapping_of_a_refused_file_stays(tmp_path: Path, data: bytes) -> None:
    """Not even while the error is kept, whose traceback keeps what its frames refer to."""
    (tmp_path / "refused.gguf").write_bytes(data)
    with pytest.raises(GGUFError, match=r"refused\.gguf") as caught:
        GGUFModel.open(str(tmp_path / "refused.gguf"))
    check_neither_mapped_nor_open("refused.gguf")
    assert caught.value.__traceback__ is not None


def check_neither_mapped_nor_open(name: str) -> None:
    fds = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    assert name not in Path("/proc/self/maps").read_text()
    assert name not in " ".join(os.readlink(f"/proc/self/fd/{fd}") for fd in fds)


def test_a_real_vocabulary_is_quick(tmp_path: Path) -> None:
    words = b"".join(files.string(f"tok{i:06d}") for i in range(130_000))
    keys = [files.ARCHITECTURE]
    keys += [files.key(k, T.ARRAY, struct.pack("<IQ", T.STRING, 130_000) + words) for k in ("tokens", "merges")]
    (tmp_path / "v.gguf").write_bytes(files.raw(keys, [files.entry("t", [4])], data=bytes(16)))
    start = time.process_time()
    model = GGUFModel.open(str(tmp_path / "v.gguf"))
    seconds = time.process_time() - start
    assert dict(model.array_lengths) == {"tokens": 130_000, "merges": 130_000}
    # An absolute bound, since it is one of patience: 0.1 s here, and 8 s for a reader with an object per word.
    assert seconds < 2


R1 = files.Shape(129280, 7168, 18432, 2048, 61, 3, 256, 8, 128, 1536, 512, 128, 64, 128)


def test_a_file_as_large_as_deepseek_r1(tmp_path: Path) -> None:
    """404 GB of zeros that take no disk: offsets past 32 bits, and nothing read but the header."""

    def type_of(name: str) -> str:
        return "F32" if "norm" in name or "_inp" in name or "probs" in name else "Q4_K" if "k_b" not in name else "Q8_0"

    path = files.write_sparse(tmp_path / "r1.gguf", R1, type_of)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system has no sparse files")
    model = GGUFModel.open(str(path))
    experts = [t for n, t in model.tensors.items() if "_exps" in n]
    assert sum(t.nbytes for t in experts) == 58 * 3 * 256 * 2048 * 7168 // 256 * 144
    assert max(t.offset for t in experts) > 1 << 38
    last = max(model.tensors.values(), key=lambda t: t.offset)
    assert last.offset + last.nbytes <= path.stat().st_size < last.offset + last.nbytes + 32
    os.truncate(path, 200 << 30)
    with pytest.raises(
        GGUFError, match=rf"truncated: it has {200 << 30:,} bytes and its tensors need [\d,]{{15}}; .*blk"
    ):
        GGUFModel.open(str(path))


def test_the_headers_alone(tmp_path: Path) -> None:
    """A file cut where its header ends is enough for who asks no data, and quick with a real vocabulary."""
    header_bytes, _, _ = files.header_of(R1, lambda name: "Q4_K" if "_exps" in name else "F32")
    at = header_bytes.index(files.string("deepseek2.block_count"))
    words = b"".join(files.string(f"tok{i:06d}") for i in range(129_280))
    keys = [files.key(f"tokenizer.ggml.{k}", T.ARRAY, struct.pack("<IQ", T.STRING, 129_280) + words) for k in "tm"]
    counts = struct.unpack_from("<QQ", header_bytes, 8)
    data = header_bytes[:8] + struct.pack("<QQ", counts[0], counts[1] + 2) + header_bytes[24:at]
    path = tmp_path / "r1-header.gguf"
    path.write_bytes(data + b"".join(keys) + header_bytes[at:].rstrip(b"\0") + bytes(8))
    start = time.process_time()
    model = GGUFModel.open(str(path), require_data=False)
    assert time.process_time() - start < 1  # patience again: 0.2 s here
    assert model.get("block_count") == 61
    assert sum(t.nbytes for n, t in model.tensors.items() if "_exps" in n) == 58 * 3 * 256 * 2048 * 7168 // 256 * 144
    with pytest.raises(GGUFError, match=r"truncated: it has .* bytes and its tensors need"):
        GGUFModel.open(str(path))
    assert GGUFModel.open(str(path), require_data=False).tensors == model.tensors
    path.write_bytes(data[:-3])
    with pytest.raises(GGUFError, match="truncated: the file ends after"):
        GGUFModel.open(str(path), require_data=False)


def test_shards_renamed_consistently(tmp_path: Path) -> None:
    tensors = files.random_tensors()
    files.write(tmp_path / "m.gguf", tensors, split=20)
    for shard in sorted(tmp_path.glob("m-*.gguf")):
        shutil.move(shard, tmp_path / shard.name.replace("m-", "other name-"))
    model = GGUFModel.open(str(tmp_path))
    assert list(model.tensors) == list(tensors)
