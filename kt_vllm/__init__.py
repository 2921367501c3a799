"""Routed experts of mixture-of-experts models on the CPU, for stock vLLM.

The files in the order a request meets them:

    plugin      register(): the only place that touches vLLM's registries
    args        the --kt-* flags
    config      KTConfig: what the flags mean, validated once
    hub         --kt-gguf org/repo:NAME
    compat      the only patches of vLLM
    preflight   everything that can be refused is refused here, before the engine starts
    cpus        which logical CPUs the executor's threads are pinned to
    numa        the machine's NUMA nodes, and which of them the executor uses
    memory      does it all fit
    hf_config   config.json without the quantisation of weights we do not load
    gguf/       files to tensors: headers, shards, dequantisation
    families/   tensor names of each model family, as data
    checkpoint  which tensor goes where, complete in both directions
    rules       a YAML file of what runs where, with its lines
    placement   which rule decides which module
    dense_quant      how dense weights may be kept on the device: sizes, shapes, which fits
    dense_placement  what flag and rules come to for each
    gpu_memory       what else a GPU has to hold
    explain     `kt-vllm explain`: the table of it
    dense_methods    vLLM's linear layers and head in fp8 and int4
    int4        weights as integers of 4 bits
    int4_linear      products with them on a GPU, by the number of tokens
    int4_few_tokens  the kernel for one to four
    loader      dense tensors to vLLM, experts to the executor
    layer       RoutedExperts: submit, shared experts, wait
    device_experts  routed experts on vLLM's own device
    expert_spans    single experts of a layer in the files
    executor    tensors to addresses
    _native     the C++ core (csrc/)
    bench/      `kt-vllm bench layer`

Importing this package needs neither vLLM nor torch.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from kt_vllm.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
