"""--kt-gguf org/repo:NAME against a stand-in of the hub's API."""

import logging
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from kt_vllm import hub as kt_hub
from kt_vllm.errors import HubError
from kt_vllm.explain import read_config
from kt_vllm.gguf import GGUFModel
from tests import gguf_files as files
from tests import hub_server
from tests.hub_server import Hub

FILES = [
    "README.md",
    "Tiny-Q8_0.gguf",
    "Tiny-Q4_K_M/Tiny-Q4_K_M-00001-of-00003.gguf",
    "Tiny-Q4_K_M/Tiny-Q4_K_M-00002-of-00003.gguf",
    "Tiny-Q4_K_M/Tiny-Q4_K_M-00003-of-00003.gguf",
    "UD-Q2_K_XL/Tiny-UD-Q2_K_XL-00001-of-00002.gguf",
    "UD-Q2_K_XL/Tiny-UD-Q2_K_XL-00002-of-00002.gguf",
    "UD-IQ1_S/Tiny-00001-of-00001.gguf",
    "UD-Q4_K_M/Tiny-UD-Q4_K_M.gguf",
    "Tiny.IQ4_XS.gguf",
    "tiny-bf16.gguf",
    "mmproj-Tiny-F16.gguf",
    "Tiny-imatrix.gguf",
    "UD-Q4_K_M/mtp-Tiny-UD-Q4_K_M.gguf",
    "imatrix_unsloth.gguf",
    "Q3_K_S/Tiny-Q3_K_S-00002-of-00002.gguf",
    "Q5_0/Tiny-Q5_0.gguf",
    "old/Tiny-Q5_0.gguf",
]
NAMES = ["Q8_0", "Q4_K_M", "UD-Q2_K_XL", "UD-IQ1_S", "UD-Q4_K_M", "IQ4_XS", "bf16", "Q3_K_S", "Q5_0"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    for name in FILES:
        path = root / "many" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 1000)
    (root / "one").mkdir()
    files.write(root / "one" / "m-Q8_0.gguf", files.random_tensors(), split=12)
    (root / "none").mkdir()
    (root / "none" / "model.safetensors").write_bytes(b"x")
    return {"acme/Many-GGUF": root / "many", "acme/One.GGUF": root / "one", "acme/none": root / "none"}


@pytest.fixture
def hub(tree: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Used by huggingface_hub, and its cache is in tmp_path. (HF_ENDPOINT itself: tests/e2e/test_layouts.py.)"""
    with hub_server.serving(dict(tree)) as running:
        point_at(running.url, monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield running


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kt_hub.find.cache_clear()
    monkeypatch.setattr(kt_hub, "api", lambda token: HfApi(endpoint=url, token=False))


def resolve(gguf: str) -> str:
    return kt_hub.resolve(gguf, cache_dir="cache")


def refusal(gguf: str) -> str:
    with pytest.raises(HubError) as caught:
        resolve(gguf)
    text = str(caught.value)
    assert "\n" not in text and ":" in text and len(text) < 600
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return text


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("Q8_0", ["Tiny-Q8_0.gguf"]),
        ("q8_0", ["Tiny-Q8_0.gguf"]),
        ("Q4_K_M", [f"Tiny-Q4_K_M/Tiny-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]),
        ("UD-Q4_K_M", ["UD-Q4_K_M/Tiny-UD-Q4_K_M.gguf"]),
        ("Q2_K_XL", [f"UD-Q2_K_XL/Tiny-UD-Q2_K_XL-0000{i}-of-00002.gguf" for i in (1, 2)]),
        ("UD-Q2_K_XL", [f"UD-Q2_K_XL/Tiny-UD-Q2_K_XL-0000{i}-of-00002.gguf" for i in (1, 2)]),
        ("UD-IQ1_S", ["UD-IQ1_S/Tiny-00001-of-00001.gguf"]),
        ("IQ4_XS", ["Tiny.IQ4_XS.gguf"]),
        ("BF16", ["tiny-bf16.gguf"]),
        ("old/Tiny-Q5_0.gguf", ["old/Tiny-Q5_0.gguf"]),
    ],
)
def test_what_a_name_means(wanted: str, names: list[str], hub: Hub, tree: dict[str, Path]) -> None:
    path = resolve(f"acme/Many-GGUF:{wanted}")
    root = Path(path[: -len(names[0])])
    assert path.endswith("/" + names[0])
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) == sorted(names)
    for name in names:
        assert (root / name).read_bytes() == (tree["acme/Many-GGUF"] / name).read_bytes()
    assert sorted(hub.asked_for("GET", "/resolve/")) == sorted(p for p in hub.asked_for("GET", ".gguf$"))
    assert len(hub.asked_for("GET", "/resolve/")) == len(names)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("DeepSeek-R1-Q4_K_M", "Q4_K_M"),
        ("UD-Q2_K_XL/DeepSeek-V3-0324-UD-Q2_K_XL", "UD-Q2_K_XL"),
        ("Q4_K_M/model.gguf", "Q4_K_M"),
        ("x.Q6_K.gguf", "Q6_K"),
        ("Kimi-K2-Instruct-IQ4_XS-imat", "IQ4_XS"),
        ("Qwen3-30B-A3B-MXFP4_MOE", "MXFP4_MOE"),
        ("mixtral-8x7b-instruct-v0.1.Q3_K_M.gguf", "Q3_K_M"),
        ("GLM-4.5-Air", "GLM-4.5-Air"),
    ],
)
def test_labels(name: str, label: str) -> None:
    assert kt_hub._label(name) == label


def test_shards_become_a_model(hub: Hub, tree: dict[str, Path]) -> None:
    """The only model of a repository needs no name."""
    model = GGUFModel.open(resolve("acme/One.GGUF"))
    assert len(model.paths) > 2
    here = GGUFModel.open(str(tree["acme/One.GGUF"]))
    assert list(model.tensors) == list(here.tensors)
    before = len(hub.requests)
    kt_hub.find.cache_clear()
    assert resolve("acme/One.GGUF:Q8_0") == model.path
    assert [method for method, path, _ in hub.requests[before:] if "resolve" in path] == []  # from the cache


def test_refusals_say_what_there_is(hub: Hub) -> None:
    text = refusal("acme/Many-GGUF")
    assert "has 10 models: give acme/Many-GGUF:NAME with one of " in text
    text = refusal("acme/Many-GGUF:Q6_K")
    assert "has no quantisation 'Q6_K': give acme/Many-GGUF:NAME with one of " in text
    for name in NAMES:
        assert f" {name}," in text + ",", name
    assert "mmproj" not in text and "imatrix" not in text
    refusal("acme/Many-GGUF:Q4_K")  # not the beginning of a name
    refusal("acme/Many-GGUF:")
    text = refusal("acme/Many-GGUF:Q5_0")
    assert "2 models that 'Q5_0' may mean (Q5_0/Tiny-Q5_0.gguf, old/Tiny-Q5_0.gguf): give acme/Many-GGUF:FILE" in text
    text = refusal("acme/Many-GGUF:Q3_K_S")
    assert "has 1 of the 2 shards of 'Q3_K_S/Tiny-Q3_K_S-00002-of-00002.gguf', and number 1 is missing" in text
    assert "has no .gguf file of a model: give one that has" in refusal("acme/none")
    text = refusal("acme/nothing:Q4_K_M")
    assert "'acme/nothing' is neither a path here nor a repository of http://127.0.0.1:" in text
    assert "check the name" in text and "hf auth login" in text
    assert "neither a path here nor a name" in refusal("acme/-bad--name-:Q4_K_M")
    hub.gated.add("acme/Many-GGUF")
    text = refusal("acme/Many-GGUF:Q8_0")
    assert "'acme/Many-GGUF' is gated: accept its terms at http://" in text and "HF_TOKEN" in text
    assert hub.asked_for("GET", "/resolve/") == []


def test_a_cut_connection_is_resumed(hub: Hub, tree: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # it resumes after whole ones, of 10 MB
    hub.cut_after = 10_000
    path = resolve("acme/Many-GGUF:Q4_K_M")
    for i in (1, 2, 3):
        name = f"Tiny-Q4_K_M/Tiny-Q4_K_M-0000{i}-of-00003.gguf"
        there = Path(path.replace("00001-of", f"0000{i}-of"))
        assert there.read_bytes() == (tree["acme/Many-GGUF"] / name).read_bytes()
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and "/resolve/" in path]
    assert ranges.count("bytes=10000-") == 3 and len(ranges) == 6


def test_a_start_after_a_broken_one_keeps_complete_files(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = HfApi.hf_hub_download, []

    def break_second(self: HfApi, repo: str, name: str, **how: Any) -> str:
        asked.append(name)
        if len(asked) == 2:
            raise OSError("the line went dead\nlong after")
        return real(self, repo, name, **how)

    monkeypatch.setattr(HfApi, "hf_hub_download", break_second)
    text = refusal("acme/Many-GGUF:Q4_K_M")
    assert "failed (the line went dead) while 'Tiny-Q4_K_M/Tiny-Q4_K_M-00002-of-00003.gguf'" in text
    assert "start again; complete files are kept" in text
    resolve("acme/Many-GGUF:Q4_K_M")
    assert [name[-19:-14] for name in asked] == ["00001", "00002", "00002", "00003"]


def test_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline: dict[str, Callable[[], object]] = {
        "the connection to": lambda: point_at("http://127.0.0.1:9", monkeypatch),
        "answered with status 503": lambda: setattr(hub, "fail_with", 503),
        "HF_HUB_OFFLINE is set": lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True),
    }
    kept = resolve("acme/Many-GGUF:Q4_K_M")
    for what, go in offline.items():
        point_at(hub.url, monkeypatch)
        go()
        text = refusal("acme/One.GGUF")
        assert what in text and "and 'acme/One.GGUF' is not in the cache: connect, or give the path" in text
        assert resolve("acme/Many-GGUF:Q4_K_M") == kept
        text = refusal("acme/Many-GGUF:Q8_0")
        assert "has no quantisation 'Q8_0': give acme/Many-GGUF:NAME with one of Q4_K_M" in text
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.fail_with = None


def test_config_of_a_model_on_the_hub(
    hub: Hub, tree: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "hf_hub_download", partialmethod(HfApi.hf_hub_download, cache_dir="cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"large")
    hub.repos["acme/model"] = tmp_path / "model"
    fetched = kt_hub.fetch_config("acme/model")
    assert fetched is not None and fetched.name == "config.json" and fetched.read_text() == "{}"
    assert [path.rsplit("/")[-1] for path in hub.asked_for("GET", "resolve")] == ["config.json"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert kt_hub.fetch_config("acme/model") == fetched  # from the cache
    assert read_config("acme/model") == {}  # as `kt-vllm explain` does
    for name in ("/m", "./m", "gpt2", "s3://bucket/model", "model", "acme/model:Q4_K_M"):
        assert kt_hub.fetch_config(name) is None  # not asked for: another's business
    with pytest.raises(HubError, match=r"config.json of 'acme/other' is not in the cache: connect, or give a model"):
        kt_hub.fetch_config("acme/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=r"'acme/none' has no config.json: give one that has"):
        kt_hub.fetch_config("acme/none")
    with pytest.raises(HubError, match=r"'acme/other' is neither a path here nor a repository of http"):
        kt_hub.fetch_config("acme/other")
    hub.gated.add("acme/One.GGUF")
    with pytest.raises(HubError, match=r"'acme/One.GGUF' is gated: accept its terms"):
        kt_hub.fetch_config("acme/One.GGUF")


def test_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kt_hub.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    text = refusal("acme/Many-GGUF:Q4_K_M")
    assert "needs 0.0 GB on the disk of" in text and "make room" in text
    assert hub.asked_for("GET", "/resolve/") == []


def test_a_full_disk_meanwhile(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **how: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HfApi, "hf_hub_download", full)
    assert "cannot be stored (No space left on device): make room" in refusal("acme/Many-GGUF:Q4_K_M")


def test_names_outside_the_cache_are_not_taken() -> None:
    with pytest.raises(HubError, match=r"no \.gguf file"):
        kt_hub._choose("a/b", None, ["../../x-Q4_0.gguf", "/etc/x-Q4_0.gguf"])


def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What exists here wins, and what looks like a path is one."""
    monkeypatch.chdir(tmp_path)
    assert kt_hub.is_hub_name("acme/Tiny")
    assert kt_hub.is_hub_name("acme/Tiny-GGUF:Q4_K_M")
    (tmp_path / "acme" / "Tiny").mkdir(parents=True)
    assert not kt_hub.is_hub_name("acme/Tiny")
    (tmp_path / "acme" / "Tiny-GGUF:Q4_K_M").write_bytes(b"")
    assert not kt_hub.is_hub_name("acme/Tiny-GGUF:Q4_K_M")
    for path in ("/m/x", "./a/b", "../a/b", "~/m", "m.gguf", "a/b/c", "folder", "models/m.gguf", "a/b:c:d", "C:\\m"):
        assert not kt_hub.is_hub_name(path), path
    with caplog.at_level(logging.INFO):
        assert kt_hub.resolve("/m/x") == "/m/x"
    assert not caplog.records
