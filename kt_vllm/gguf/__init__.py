"""GGUF files: what is in them and where. Importing this needs neither torch nor vLLM."""

from kt_vllm.gguf.header import GGUFTensor, Scalar
from kt_vllm.gguf.reader import GGUFModel

__all__ = ["GGUFModel", "GGUFTensor", "Scalar"]
