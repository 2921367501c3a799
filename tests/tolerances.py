"""Every limit the numerical tests allow, each named by its cause and derived.

All are relative L2 errors of a whole result: |actual - expected| / |expected|.
"""

# Scalar float32 against float64: partial sums of some thousand products with random signs; each rounding is at most
# 2^-24 = 6e-8, they add up as a random walk, and three matrices follow one another: below 1e-6. 1e-5 leaves room.
MAX_LAYER_ERROR_REFERENCE = 1e-5

# Activations in int8, one scale a block: the step is max/127, its error uniform with rms max/127/sqrt(12). For normal
# activations max of 256 is about 2.8 sigma, so 0.65 % of the row's rms; gate and up add theirs (x 1.4), down once more
# quantises a peakier row (about 1 %). In quadrature 1.3 %.
MAX_LAYER_ERROR_INT8_ACTIVATIONS = 0.015

# Vectorised float32: the scalar kernels' sums in another order, bounded alike; exp() may be a polynomial of some 2e-7.
MAX_LAYER_ERROR_FLOAT_ACTIVATIONS = 1e-5

# Rounding the result: half a unit in the last place is 2^-9 for bfloat16 (8 bits of significand) and 2^-12 for float16
# (11 bits) at most, relative to each element; the rms is lower.
MAX_ROUNDING_ERROR = {"float32": 0.0, "bfloat16": 2.0**-9, "float16": 2.0**-12}

# What a worker may use of a core while it has nothing to do. It sleeps; the rest is noise of the measurement.
MAX_IDLE_CPU = 0.01

FLOAT_TYPES = ("F32", "F16", "BF16")


def max_layer_error(isa: str, types: tuple[str, ...], float_type: str = "float32") -> float:
    """The limit for a layer whose gate, up and down have these GGML types."""
    if isa == "reference":
        limit = MAX_LAYER_ERROR_REFERENCE
    elif all(type in FLOAT_TYPES for type in types):
        limit = MAX_LAYER_ERROR_FLOAT_ACTIVATIONS
    else:
        limit = MAX_LAYER_ERROR_INT8_ACTIVATIONS
    return limit + MAX_ROUNDING_ERROR[float_type]
