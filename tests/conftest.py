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


def _no_gpu() -> str | None:
    """Why there is none. Imports torch, which takes seconds, only where a driver is."""
    if not any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl")):
        return "no NVIDIA driver"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _missing() -> dict[str, str]:
    """Marker -> why its tests cannot run here. Imports no vLLM: that would take seconds."""
    missing = {}
    no_gpu = _no_gpu()
    if no_gpu is not None:
        missing["gpu"] = no_gpu
    if not {"amx_tile", "amx_bf16", "avx512_fp16"} <= _cpu_flags():
        missing["amx"] = "the CPU has no AMX"
    if importlib.util.find_spec("vllm") is None:
        missing["e2e"] = "vLLM is not installed"
    return missing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" not in config.getoption("-m"):
        config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
        items[:] = [item for item in items if "full" not in item.keywords]
    missing = _missing()
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
