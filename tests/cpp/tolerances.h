// Every tolerance of the C++ tests, with where it comes from.
#pragma once

#include <cmath>

namespace kt::test {

inline constexpr double kUnit = 0x1p-24;  // rounding to nearest float32: relative error at most this

// A kernel against the double precision dot product of the very same numbers (decoded weights, decoded activations).
// Integer parts are exact. Each term then sees at most 12 roundings before it is summed: 3 in decoding it, 1 in each of
// the two conversions, 4 in scaling, 4 in the last horizontal sum. Adding up `chain` partial sums moves the result by
// at most chain * u * magnitude, in practice, with rounding errors of random sign, by less than sqrt(chain) * u *
// magnitude. The longest chain of any kernel is one addition for every 32 weights. magnitude: sum of |terms|, offsets
// apart.
inline double dot_limit(int k, double magnitude) { return (12 + std::sqrt(k / 32.0)) * kUnit * magnitude + 1e-30; }

// An int8 activation is off by at most half a step; the float arithmetic of the quantiser adds a few roundings of 127.
inline constexpr double kHalfStep = 0.5 + 127 * 4 * kUnit;

// Error that int8 activations cause on normally distributed x, root mean square over the outputs, relative to
// |w| |x| / sqrt(k), the typical size of an output. The error of one activation is uniform, so step / sqrt(12) with
// step = max|x| / 127, and the largest of 256 is about 2.8 sigma: 2.8 / 127 / 3.46 = 0.0064. Twice that allows for few
// samples. Under a tenth of the error of 4-bit weights.
inline constexpr double kInt8ActivationError = 0.0128;
// The same for float32 activations: rounding only, sqrt(k) below the bound of dot_limit().
inline constexpr double kFloatActivationError = 2e-6;

// The tile kernels, relative to the typical size of an output as above. bfloat16 has 8 bits: weights and activations
// are off by up to 2^-8, evenly spread, 2^-8 / sqrt(3) * 0.7 (for mantissas as numbers have them) = 0.0016 each.
inline constexpr double kTileErrorBf16 = 0.003;
// int8 with one step for 256: activations as above, 0.0064; weights alike, but the step allows for the largest that the
// scales do, of these tests' random ones up to 4.5 times the rms: 4.5 / 126.5 / 3.46 = 0.0103.
inline constexpr double kTileErrorInt8 = 0.0122;

// silu(g) * u: exp within 2 u and its scaling exact, one addition, one division, one product.
inline constexpr double kSiluError = 8 * kUnit;
// exp(-g) overflows past here and the result is -0; the true value is under 3e-37 and never matters.
inline constexpr float kSiluUnderflow = -88.0f;
inline constexpr double kSiluTiny = 1e-35;

}  // namespace kt::test
