// QK_NORM_ROPE: RMS norm and rotary embedding of queries and keys, keys and values to the cache. A
// block is eight heads of a row, a warp for each: first the queries', then the keys' and values'.
//
// Angles count quarter turns in double: the nearest whole number picks the quadrant, and the rest
// is small enough for short series in float.

#include "cache_rows.cuh"

namespace gdn {

enum { OUT, Q, K, V, Q_NORM, K_NORM, K_CACHE, V_CACHE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };
// RATIO is base^(-2 / n_rot), a pair's speed over that of the one before; the others are those of
// RopeScaling. RATIO, FIRST and LAST come as sums of two floats.
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

// put(c, value) gets every column once. A warp's work.
template <typename Put>
DEVICE void norm_and_turn(const float* x, const float* norm, float scale, int size, int half,
                          const Angles& angles, Put put) {
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < half; i += 32) {
        const float first = x[i] * (scale * norm[i]);
        const float second = x[half + i] * (scale * norm[half + i]);
        const float cos = angles.cos[i], sin = angles.sin[i];
        put(i, first * cos - second * sin);
        put(half + i, second * cos + first * sin);
    }
    for (int c = 2 * half + lane; c < size; c += 32) put(c, x[c] * (scale * norm[c]));
}

}  // namespace gdn

// Grid: (rows, (query heads + key heads) / warps).
KERNEL(qk_norm_rope) {
    using namespace gdn;
    __shared__ Angles angles;
    const int t = blockIdx.x, lane = threadIdx.x % 32;
    if (t >= a.rows(a.v[Q])) return;
    const int n_heads = a.v[Q].shape[1], n_kv = a.v[K].shape[1], size = a.v[Q].shape[2];
    const int half = static_cast<int>(a.attr[N_ROT]) / 2;
    const int i = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, h = i - n_heads;
    const int32_t position = a.v[POSITIONS].as<int32_t>()[t];
    // Loads of the head start first; the angles are computed meanwhile.
    const float* x = i < n_heads ? a.v[Q].row(t, i) : a.v[K].row(t, h < n_kv ? h : 0);
    const float* norm = a.v[i < n_heads ? Q_NORM : K_NORM].as<float>();
    float sum = 0.0f;
#pragma unroll 8
    for (int c = lane; c < size; c += 32) sum = fmaf(x[c], x[c], sum);
    for (int pair = threadIdx.x; pair < half; pair += blockDim.x)
        set_angle(angles, a, pair, position);
    const float mean = warp_sum(sum) / static_cast<float>(size);
    const float scale = rsqrt_of(mean + a.attr[EPS]);
    __syncthreads();
    if (h >= n_kv) return;
    if (i < n_heads) {
        float* out = a.v[OUT].row(t, i);
        norm_and_turn(x, norm, scale, size, half, angles, [&](int c, float y) { out[c] = y; });
        return;
    }
    const int32_t* blocks = blocks_of_row(a, a.v[SEQ_STARTS], a.v[BLOCK_TABLES], t);
    const CacheRow key(a.v[K_CACHE], blocks, position, h), value(a.v[V_CACHE], blocks, position, h);
    norm_and_turn(x, norm, scale, size, half, angles, [&](int c, float y) { key.put(c, y); });
    const float* v = a.v[V].row(t, h);
    for (int c = lane; c < size; c += 32) value.put(c, v[c]);
}
