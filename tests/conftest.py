"""What every test may ask for: the shipped model, and markers for what this machine may lack."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _missing() -> dict[str, str]:
    """Marker -> why its tests cannot run here. Imports neither torch nor vLLM: that would take seconds."""
    missing = {}
    if not {"amx_tile", "amx_bf16", "avx512_fp16"} <= _cpu_flags():
        missing["amx"] = "the CPU has no AMX"
    if importlib.util.find_spec("vllm") is None:
        missing["e2e"] = "vLLM is not installed"
    return missing


def _has_gpu() -> bool:
    """Imports torch, so that only tests for a GPU should ask."""
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" not in config.getoption("-m"):
        config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
        items[:] = [item for item in items if "full" not in item.keywords]
    missing = _missing()
    if any("gpu" in item.keywords for item in items) and not _has_gpu():
        missing["gpu"] = "torch finds no NVIDIA GPU"
    for item in items:
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return ROOT / "examples" / "models" / "tiny-deepseek-v3"


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Path) -> Path:
    return tiny_model / "tiny-deepseek-v3-Q4_K_M.gguf"
