// QK_NORM_ROPE: RMS norm and rotary embedding of a row's queries and keys, a task for each row.
//
// Angles count quarter turns in double: the nearest whole number picks the quadrant, and the rest
// is small enough for short series. A call costs one power, and a row no library function.

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "paged.h"

namespace gdn {
namespace {

// Attributes: eps, n_rot, rope_base, and those of RopeScaling.
enum { OUT, Q, K, V, Q_NORM, K_NORM, K_CACHE, V_CACHE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };
enum { EPS, N_ROT, ROPE_BASE, FIRST, LAST, LOW, SPAN, MAGNITUDE };

constexpr double HALF_PI = 1.57079632679489661923;

struct Rotation {
    int64_t half;   // Pairs that turn.
    double* speed;  // Quarter turns a position.
    float *cos, *sin;
    float magnitude;  // Of cos and sin.
};

// base^(-2i / n_rot) as powers of one ratio: the error grows with i, but the angles shrink faster.
void set_speeds(const Rotation& r, const double* attr) {
    const double ratio = std::pow(attr[ROPE_BASE], -1.0 / static_cast<double>(r.half));
    const double first = attr[FIRST], change = attr[LAST] - first;
    double speed = 1.0 / HALF_PI;
    for (int64_t i = 0; i < r.half; i++, speed *= ratio) {
        const double ramp = (static_cast<double>(i) - attr[LOW]) / attr[SPAN];
        r.speed[i] = speed * fma(change, std::min(std::max(ramp, 0.0), 1.0), first);
    }
}

// Taylor series up to an error of 1e-11, for |x| ≤ pi / 4.
double sin_near_zero(double x) {
    const double y = x * x;
    double s = -1.0 / 39916800;
    s = fma(s, y, 1.0 / 362880);
    s = fma(s, y, -1.0 / 5040);
    s = fma(s, y, 1.0 / 120);
    s = fma(s, y, -1.0 / 6);
    return fma(x * y, s, x);
}

double cos_near_zero(double x) {
    const double y = x * x;
    double c = 1.0 / 479001600;
    c = fma(c, y, -1.0 / 3628800);
    c = fma(c, y, 1.0 / 40320);
    c = fma(c, y, -1.0 / 720);
    c = fma(c, y, 1.0 / 24);
    return fma(-y, fma(-y, c, 0.5), 1.0);
}

void set_angles(const Rotation& r, int32_t position) {
    for (int64_t i = 0; i < r.half; i++) {
        const double turned = position;
        const int32_t quadrant = static_cast<int32_t>(fma(r.speed[i], turned, 0.5));
        const double x = fma(r.speed[i], turned, -static_cast<double>(quadrant)) * HALF_PI;
        const float s = static_cast<float>(sin_near_zero(x)) * r.magnitude;
        const float c = static_cast<float>(cos_near_zero(x)) * r.magnitude;
        const float sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
        r.sin[i] = quadrant & 2 ? -sine : sine;
        r.cos[i] = (quadrant + 1) & 2 ? -cosine : cosine;
    }
}

void norm_and_turn(const float* x, const float* norm, float eps, int64_t size, const Rotation& r,
                   float* y) {
    const vf scale = inverse_rms(x, size, eps);
    const auto normed = [&](int64_t i, int n) {
        return load_part(x + i, n) * scale * load_part(norm + i, n);
    };
    for_lanes(r.half, [&](int64_t i, int n) {
        const vf first = normed(i, n), second = normed(r.half + i, n);
        const vf cos = load_part(r.cos + i, n), sin = load_part(r.sin + i, n);
        store_part(y + i, fma(first, cos, -(second * sin)), n);
        store_part(y + r.half + i, fma(second, cos, first * sin), n);
    });
    const int64_t rest = 2 * r.half;
    for_lanes(size - rest,
              [&](int64_t i, int n) { store_part(y + rest + i, normed(rest + i, n), n); });
}

void run_row(const Args& a, int64_t t, const Rotation& r, float* row) {
    const int64_t n_heads = a.v[Q].shape[1], n_kv = a.v[K].shape[1], size = a.v[Q].shape[2];
    const int32_t position = a.v[POSITIONS].as<int32_t>()[t];
    const int32_t* table = block_table_of(a, a.v[SEQ_STARTS], a.v[BLOCK_TABLES], t);
    const float eps = static_cast<float>(a.attr[EPS]);
    set_angles(r, position);
    for (int64_t h = 0; h < n_heads; h++)
        norm_and_turn(a.v[Q].row(t, h), a.v[Q_NORM].as<float>(), eps, size, r, a.v[OUT].row(t, h));
    for (int64_t h = 0; h < n_kv; h++) {
        norm_and_turn(a.v[K].row(t, h), a.v[K_NORM].as<float>(), eps, size, r, row);
        write_cache(a.v[K_CACHE], table, position, h, row);
        write_cache(a.v[V_CACHE], table, position, h, a.v[V].row(t, h));
    }
}

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t half = static_cast<int64_t>(a.attr[N_ROT]) / 2;
    double* speed = reinterpret_cast<double*>(a.scratch);
    float* floats = reinterpret_cast<float*>(speed + half);
    const float magnitude = static_cast<float>(a.attr[MAGNITUDE]);
    const Rotation r = {half, speed, floats, floats + half, magnitude};
    if (half > 0) set_speeds(r, a.attr);
    for (int64_t t = begin; t < end; t++) run_row(a, t, r, floats + 2 * half);
}

}  // namespace

const Kernel qk_norm_rope = {"QK_NORM_ROPE", [](const Args& a) { return a.rows(a.v[Q]); }, run};

}  // namespace gdn
