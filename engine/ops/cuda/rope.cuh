// The angles of rotary embeddings.
//
// They count quarter turns in double: the nearest whole number picks the quadrant, and the rest is
// small enough for short series in float.
#pragma once

#include "kernel.cuh"

namespace gdn {

// Attributes of ops with a rope. RATIO is base^(-2 / n_rot), a pair's speed over that of the one
// before; the last ones are those of RopeScaling. RATIO, FIRST and LAST come as sums of two floats.
enum { EPS, N_ROT, LOW, SPAN, MAGNITUDE, RATIO, FIRST = RATIO + 2, LAST = FIRST + 2 };

constexpr int MAX_PAIRS = ROPE_MAX_ROT / 2;
constexpr double QUARTER_TURNS = 0.63661977236758134308;  // In a radian.
constexpr float HALF_PI = 1.57079632679489661923f;

struct Angles {
    float cos[MAX_PAIRS], sin[MAX_PAIRS];
};

// ratio^n by squaring: its error grows with n, but the angles shrink faster.
DEVICE double power(double ratio, int n) {
    double result = 1.0;
    for (; n; n >>= 1, ratio *= ratio)
        if (n & 1) result *= ratio;
    return result;
}

DEVICE double two_floats(const float* parts) { return static_cast<double>(parts[0]) + parts[1]; }

// Of pair i, in quarter turns a position.
DEVICE double speed_of(const Args& a, int i) {
    const double first = two_floats(a.attr + FIRST), change = two_floats(a.attr + LAST) - first;
    double scale = first;
    // A division of doubles is slow, and few models need it.
    if (change != 0.0) {
        const double ramp = (i - static_cast<double>(a.attr[LOW])) / a.attr[SPAN];
        scale += change * fmin(fmax(ramp, 0.0), 1.0);
    }
    return power(two_floats(a.attr + RATIO), i) * QUARTER_TURNS * scale;
}

// Taylor series for |x| ≤ pi / 4, exact to float.
DEVICE float sin_near_zero(float x) {
    const float y = x * x;
    float s = fmaf(y, 2.75573192e-6f, -1.98412698e-4f);
    s = fmaf(s, y, 8.33333333e-3f);
    s = fmaf(s, y, -1.66666667e-1f);
    return fmaf(x * y, s, x);
}

DEVICE float cos_near_zero(float x) {
    const float y = x * x;
    float c = fmaf(y, -2.75573192e-7f, 2.48015873e-5f);
    c = fmaf(c, y, -1.38888889e-3f);
    c = fmaf(c, y, 4.16666667e-2f);
    c = fmaf(c, y, -0.5f);
    return fmaf(c, y, 1.0f);
}

DEVICE void set_angle(Angles& angles, const Args& a, int i, int32_t position) {
    const double turns = speed_of(a, i) * position;
    const int32_t quadrant = static_cast<int32_t>(turns + 0.5);
    const float x = static_cast<float>(turns - quadrant) * HALF_PI;
    const float s = sin_near_zero(x) * a.attr[MAGNITUDE], c = cos_near_zero(x) * a.attr[MAGNITUDE];
    const float sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
    angles.sin[i] = quadrant & 2 ? -sine : sine;
    angles.cos[i] = (quadrant + 1) & 2 ? -cosine : cosine;
}

}  // namespace gdn
