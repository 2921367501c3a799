"""Our loggers, below vLLM's: its handlers, level and process prefixes then apply to them as well."""

import logging


def init_logger(name: str) -> logging.Logger:
    """name: __name__ of the module that logs."""
    return logging.getLogger(f"vllm.{name}")
