"""The tiny model with a vocabulary of 10240.

`vllm bench latency` draws token ids below 10000 whatever the model has, so vLLM refuses them for the shipped 4096.
"""

from pathlib import Path

import gguf
import numpy as np

from tests.e2e.score import GGUF
from tests.gguf_files import model_folder

VOCABULARY = 10240


def write_wide_model(folder: Path) -> tuple[Path, Path]:
    """Makes `folder`; returns it and the GGUF in it. New tokens repeat the rows of old ones; all else is copied raw."""
    model_folder(folder, vocab_size=VOCABULARY)
    reader = gguf.GGUFReader(GGUF)
    writer = gguf.GGUFWriter(folder / GGUF.name, "deepseek2")
    for name, field in reader.fields.items():
        # The tokenizer's keys are of 4096 tokens, and nobody reads them here.
        if name.startswith("deepseek2.") and not name.endswith(".vocab_size"):
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_vocab_size(VOCABULARY)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in ("token_embd.weight", "output.weight"):
            data = data[np.arange(VOCABULARY) % len(data)]
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, folder / GGUF.name
