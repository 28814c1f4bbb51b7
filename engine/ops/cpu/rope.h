// The angles of rotary embeddings.
//
// They count quarter turns in double: the nearest whole number picks the quadrant, and the rest is
// small enough for short series. A call costs one power, and a row no library function.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace gdn {

constexpr double HALF_PI = 1.57079632679489661923;

// Taylor series up to an error of 1e-11, for |x| ≤ pi / 4.
inline double sin_near_zero(double x) {
    const double y = x * x;
    double s = -1.0 / 39916800;
    s = fma(s, y, 1.0 / 362880);
    s = fma(s, y, -1.0 / 5040);
    s = fma(s, y, 1.0 / 120);
    s = fma(s, y, -1.0 / 6);
    return fma(x * y, s, x);
}

inline double cos_near_zero(double x) {
    const double y = x * x;
    double c = 1.0 / 479001600;
    c = fma(c, y, -1.0 / 3628800);
    c = fma(c, y, 1.0 / 40320);
    c = fma(c, y, -1.0 / 720);
    c = fma(c, y, 1.0 / 24);
    return fma(-y, fma(-y, c, 0.5), 1.0);
}

// cos and sin of the pairs that turn. `attr`: n_rot, rope_base, and those of RopeScaling.
struct Rotation {
    enum { N_ROT, ROPE_BASE, FIRST, LAST, LOW, SPAN, MAGNITUDE };

    int64_t half;   // Pairs that turn.
    double* speed;  // Quarter turns a position.
    float *cos, *sin;
    float magnitude;  // Of cos and sin.

    // `memory` has room for 16 bytes a pair. base^(-2i / n_rot) are powers of one ratio: the error grows with
    // i, but the angles shrink faster.
    Rotation(const double* attr, char* memory)
        : half(static_cast<int64_t>(attr[N_ROT]) / 2),
          speed(reinterpret_cast<double*>(memory)),
          cos(reinterpret_cast<float*>(speed + half)),
          sin(cos + half),
          magnitude(static_cast<float>(attr[MAGNITUDE])) {
        if (half == 0) return;
        const double ratio = std::pow(attr[ROPE_BASE], -1.0 / static_cast<double>(half));
        const double first = attr[FIRST], change = attr[LAST] - first;
        double next = 1.0 / HALF_PI;
        for (int64_t i = 0; i < half; i++, next *= ratio) {
            const double ramp = (static_cast<double>(i) - attr[LOW]) / attr[SPAN];
            speed[i] = next * fma(change, std::min(std::max(ramp, 0.0), 1.0), first);
        }
    }
    // The memory after its own.
    float* rest() const { return sin + half; }

    void set_position(int32_t position) const {
        for (int64_t i = 0; i < half; i++) {
            const double turned = position;
            const int32_t quadrant = static_cast<int32_t>(fma(speed[i], turned, 0.5));
            const double x = fma(speed[i], turned, -static_cast<double>(quadrant)) * HALF_PI;
            const float s = static_cast<float>(sin_near_zero(x)) * magnitude;
            const float c = static_cast<float>(cos_near_zero(x)) * magnitude;
            const float sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
            sin[i] = quadrant & 2 ? -sine : sine;
            cos[i] = (quadrant + 1) & 2 ? -cosine : cosine;
        }
    }
};

}  // namespace gdn
