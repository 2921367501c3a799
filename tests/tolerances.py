"""Every limit the numerical tests allow, each named by its cause and derived.

All are relative L2 errors of a whole result: |actual - expected| / |expected|.
"""

# Scalar float32 against float64: partial sums of some thousand products with random signs; each rounding is at most
# 2^-24 = 6e-8, they add up as a random walk, and three matrices follow one another: below 1e-6. 1e-5 leaves room.
MAX_LAYER_ERROR_REFERENCE = 1e-5

# Activations in int8, one scale a block: the step is max/127, its error uniform with an rms of max/127/sqrt(12). In
# blocks of normal values max is 2.1 (of 32) or 2.8 (of 256) rms: an error of 0.5 % or 0.65 %, twice, of gate and of up.
# Their product silu(g) * u has longer tails, max is 3.7 or 7 rms: 0.8 % or 1.6 %. In quadrature 1.1 % or 1.9 %, which
# is what NumPy measures too (1.2 % and 1.9 %); the rest is the spread of a single token. It is the format's error, not
# a kernel's: see MAX_LAYER_ERROR_SAME_QUANTS.
MAX_LAYER_ERROR_INT8 = {32: 0.016, 256: 0.03}

# Kernels with int8 activations against reference.py with the same quants: integer sums are exact, the rest is float32.
MAX_LAYER_ERROR_SAME_QUANTS = 1e-5
# But where the float32 intermediate is within 1e-5 steps of the middle between two quants it may go to the other: some
# 5 % of tokens have one such value, so the limit is for the rest.
SAME_QUANTS_QUANTILE = 0.8

# Vectorised float32: the scalar kernels' sums in another order, bounded alike; exp() may be a polynomial of some 2e-7.
MAX_LAYER_ERROR_FLOAT_ACTIVATIONS = 1e-5

# Rounding the result: half a unit in the last place is 2^-9 for bfloat16 (8 bits of significand) and 2^-12 for float16
# (11 bits) at most, relative to each element; the rms is lower.
MAX_ROUNDING_ERROR = {"float32": 0.0, "bfloat16": 2.0**-9, "float16": 2.0**-12}

# What a worker may use of a core while it has nothing to do. It sleeps; the rest is noise of the measurement.
MAX_IDLE_CPU = 0.01

# Block of the int8 activations a table uses for a type; none: float32.
INT8_BLOCKS = {"avx2": {"Q8_0": 32, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}}


def int8_blocks(isa: str, types: tuple[str, str, str]) -> tuple[int, int, int]:
    gate, up, down = (INT8_BLOCKS.get(isa, {}).get(type, 0) for type in types)
    return gate, up, down


def max_layer_error(isa: str, types: tuple[str, str, str], float_type: str = "float32") -> float:
    """The limit against exact arithmetic, for a layer whose gate, up and down have these GGML types."""
    if isa == "reference":
        limit = MAX_LAYER_ERROR_REFERENCE
    elif block := max(int8_blocks(isa, types)):
        limit = MAX_LAYER_ERROR_INT8[block]
    else:
        limit = MAX_LAYER_ERROR_FLOAT_ACTIVATIONS
    return limit + MAX_ROUNDING_ERROR[float_type]


# End to end, mean over 8 x 255 positions of the tiny model in bfloat16, against exact float32 of the same GGUF.
# bfloat16 rounds every activation to 2^-9; stock vLLM on the dequantised weights shows 0.1 % and KL 0.0013.
MAX_MEAN_NLL_DIFFERENCE = 0.005
MAX_MEAN_KL = 0.003

# A token's log-probability in a batch of 32 against the same request alone. bfloat16 layers sum in another order for
# another batch shape (stock vLLM: mean 0.003, largest 0.044); an activation near the edge of an int8 step then falls on
# its other side, which is worth up to the 1.9 % of a layer above (measured: mean 0.012). A routing near-tie that falls
# the other way exchanges an expert and shows in a single token (measured: 0.28).
MAX_MEAN_BATCHED_LOGPROB_DIFFERENCE = 0.03
MAX_BATCHED_LOGPROB_DIFFERENCE = 0.6

# Probability of the stored top 20 that vLLM's own 256 best do not contain: the comparison must have seen nearly all.
MAX_MISSING_MASS = 1e-3
