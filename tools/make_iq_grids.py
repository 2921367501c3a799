"""Writes csrc/gguf/iq_grids/*.inc, the codebooks of the IQ types: python tools/make_iq_grids.py

The codebooks are constants of the GGUF format; they are taken from the `gguf` package. iq_grids.cpp includes them.
"""

from pathlib import Path

import gguf
import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / "csrc" / "gguf" / "iq_grids"
TYPES = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
WORDS_PER_LINE = 8

TEXT = """\
// Made by tools/make_iq_grids.py: the {count} entries of the codebook of {type}, {bits} bits a weight, weight 0 lowest.
// A code is the position of the weight among the levels {levels}.
// clang-format off
{words}
"""


def codes(type: str) -> np.ndarray:
    """The codebook of a type, [number of entries] uint16."""
    quant = getattr(gguf.quants, type)
    quant.init_grid()
    entries = quant.grid.reshape(quant.grid_shape).astype(np.int64)
    positions = np.searchsorted(quant.grid_map, entries)
    if not np.array_equal(np.asarray(quant.grid_map)[positions], entries):
        raise ValueError(f"{type}: the levels {quant.grid_map} are not in ascending order")
    shifts = np.arange(entries.shape[1]) * (16 // entries.shape[1])
    return (positions << shifts).sum(axis=1).astype(np.uint16)


def files() -> dict[str, str]:
    """Name and text of each file."""
    texts = {}
    for type in TYPES:
        quant, grid = getattr(gguf.quants, type), codes(type)
        lines = [
            " ".join(f"KT_CODES({word:04x})" for word in grid[start : start + WORDS_PER_LINE])
            for start in range(0, len(grid), WORDS_PER_LINE)
        ]
        texts[type.replace("_", "").lower() + ".inc"] = TEXT.format(
            type=type,
            count=len(grid),
            bits=16 // quant.grid_shape[1],
            levels=", ".join(map(str, quant.grid_map)),
            words="\n".join(lines),
        )
    return texts


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
