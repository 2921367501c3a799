"""Our loggers, below vLLM's: its handlers, level and process prefixes then apply to them as well."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.logger import _VllmLogger


def init_logger(name: str) -> "_VllmLogger":
    """name: __name__ of the module that logs."""
    from vllm.logger import init_logger as vllm_init_logger

    return vllm_init_logger(f"vllm.{name}")
