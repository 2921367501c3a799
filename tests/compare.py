"""One way to compare numbers, whose failure says where and by how much."""

import numpy as np
from numpy.typing import NDArray


def relative_l2(actual: NDArray, expected: NDArray) -> float:
    """|actual - expected| / |expected|; 0 when both are 0."""
    error = np.linalg.norm(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    size = np.linalg.norm(np.asarray(expected, np.float64))
    return float(error / size) if size > 0 else float(error)


def assert_close_to_reference(actual: NDArray, expected: NDArray, *, tolerance: float, isa: str, type: str) -> None:
    """Relative L2 error of the whole at most tolerance, and not finite exactly where expected is not."""
    assert actual.shape == expected.shape, f"shape is {actual.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    same_places = bool(np.array_equal(np.isfinite(actual), finite))
    error = relative_l2(np.where(finite, actual, 0), np.where(finite, expected, 0)) if same_places else np.inf
    if error <= tolerance:
        return
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    difference[~finite & ~np.isfinite(actual)] = 0
    worst = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
    raise AssertionError(
        f"relative L2 error {error:.3g} > {tolerance:.3g}; worst at {tuple(map(int, worst))}: "
        f"actual {actual[worst]:.8g}, expected {expected[worst]:.8g}; "
        f"{int((difference > 0).sum())} of {difference.size} differ; shape {actual.shape}, isa {isa}, type {type}"
    )


def assert_same_bits(actual: NDArray, expected: NDArray, *, isa: str = "", type: str = "") -> None:
    """Equal bit for bit; any NaN equals any NaN."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"{actual.dtype}{actual.shape}, expected {expected.dtype}{expected.shape}"
    )
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    same = np.ascontiguousarray(actual).view(bits) == np.ascontiguousarray(expected).view(bits)
    if actual.dtype.kind == "f":
        same |= np.isnan(actual) & np.isnan(expected)
    if same.all():
        return
    worst = np.unravel_index(np.argmin(same), same.shape)
    raise AssertionError(
        f"{int((~same).sum())} of {same.size} differ; first at {tuple(map(int, worst))}: actual {actual[worst]!r}, "
        f"expected {expected[worst]!r}; shape {actual.shape}, isa {isa}, type {type}"
    )
