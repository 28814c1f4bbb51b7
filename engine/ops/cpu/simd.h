// Vectors as wide as the instruction set's, and the functions that kernels call on them.
//
// `vf` and `vi` are GCC vectors of W float32 or int32: operators work lane by lane, and the same
// source serves every instruction set. Sums over lanes have a fixed order, so that results do not
// depend on the number of threads.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace gdn {

#if defined(__AVX512F__)
constexpr int W = 16;
// Intrinsics without a mask make GCC 12 warn of uninitialized values.
constexpr __mmask16 ALL = 0xffff;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

#define GDN_INLINE inline __attribute__((always_inline))

// float16: GCC for ARM knows it in C++ by another name.
#if defined(__aarch64__)
typedef __fp16 half;
#else
typedef _Float16 half;
#endif

template <typename T>
GDN_INLINE T load_as(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof(T));
    return v;
}

// Prefetches for N bytes of many that are read one after another. L1 has room for few lines that
// are under way, so those from memory come to L2 first. That is 1.1 to 1.4 times the speed of L1
// alone (Xeon, measured).
template <int N>
GDN_INLINE void prefetch_ahead(const void* p) {
    constexpr int TO_L1 = 1024, TO_L2 = 4096;
    for (int i = 0; i < N; i += 64) {
        __builtin_prefetch(static_cast<const char*>(p) + i + TO_L2, 0, 2);
        __builtin_prefetch(static_cast<const char*>(p) + i + TO_L1);
    }
}

GDN_INLINE vf load(const float* p) { return load_as<vf>(p); }
GDN_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }
GDN_INLINE vf splat(float x) { return x - vf{}; }
GDN_INLINE vi splat(int32_t x) { return x - vi{}; }
GDN_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
GDN_INLINE vi bits(vf v) { return reinterpret_cast<vi>(v); }
GDN_INLINE vf from_bits(vi v) { return reinterpret_cast<vf>(v); }
GDN_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// Bits of a where the mask has ones, and of b elsewhere.
GDN_INLINE vi select_bits(vi mask, vi a, vi b) { return (a & mask) | (b & ~mask); }
GDN_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
GDN_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

typedef float v4 __attribute__((vector_size(16)));

// a · b + c of vectors or numbers, rounded once where the instruction set can, and twice elsewhere
// (portable on x86-64). Kernels are compiled without contraction: what is not written as fma is
// rounded twice, so results don't depend on what an optimizer fuses.
template <typename T>
GDN_INLINE T fma(T a, T b, T c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 64) return (T)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__FMA__)
    if constexpr (sizeof(T) == 32) return (T)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    if constexpr (sizeof(T) == 16) return (T)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(__aarch64__)
    if constexpr (sizeof(T) == 16) return vfmaq_f32(c, a, b);
#endif
#if defined(__FMA__) || defined(__aarch64__)
    if constexpr (sizeof(T) == sizeof(float)) return __builtin_fmaf(a, b, c);
    if constexpr (sizeof(T) == sizeof(double)) return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// Reduces all lanes to four by f, half by half.
template <typename F>
GDN_INLINE v4 fold(vf v, F f) {
#if defined(__AVX512F__)
    const auto half = f(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                        __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
    return f(__builtin_shufflevector(half, half, 0, 1, 2, 3),
             __builtin_shufflevector(half, half, 4, 5, 6, 7));
#elif defined(__AVX2__)
    return f(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7));
#else
    (void)f;
    return v;
#endif
}

// Reduces all lanes to one by f.
template <typename F>
GDN_INLINE float reduce(vf v, F f) {
    const v4 four = fold(v, f), two = f(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
    return f(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}

// The sums of the lanes of four vectors: far fewer steps than `sum` of each.
GDN_INLINE v4 sums(vf a, vf b, vf c, vf d) {
    const auto add = [](auto x, auto y) { return x + y; };
    const v4 p = fold(a, add), q = fold(b, add), r = fold(c, add), s = fold(d, add);
    const v4 pq =
        __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    const v4 rs =
        __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) +
           __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

GDN_INLINE float sum(vf v) {
    return reduce(v, [](auto a, auto b) { return a + b; });
}
GDN_INLINE float max_lane(vf v) {
    return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to about one unit in the last place; 0 below -87, and inf above 88.7. NaN stays NaN.
GDN_INLINE vf exp(vf x) {
    const vf clamped = min(max(x, splat(-88.0f)), splat(89.0f));
    // Rounds to an integer in the low bits.
    const vf n_real = fma(clamped, splat(1.44269504f), splat(12582912.0f));
    const vf n = n_real - 12582912.0f;
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    // 2^n in two factors, so that n = 128 does not overflow on the way.
    const vi exponent = bits(n_real) - 0x4B400000;
    const vi half = exponent >> 1;
    const vf a = from_bits((half + 127) << 23), b = from_bits((exponent - half + 127) << 23);
    vf y = p * a * b;
    y = select(x < splat(-87.0f), vf{}, y);
    return select(x != x, x, y);
}

// 1 / x of positive numbers to about one unit in the last place; 1e-37 above 1e37.
GDN_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
    // An estimate and one Newton step: a division of 16 lanes takes as long as all of exp.
    x = select(x > splat(1e37f), splat(1e37f), x);
    const vf r = reinterpret_cast<vf>(_mm512_maskz_rcp14_ps(ALL, reinterpret_cast<__m512>(x)));
    return fma(r, fma(-x, r, splat(1.0f)), r);
#else
    return 1.0f / x;
#endif
}

GDN_INLINE vf sigmoid(vf x) { return reciprocal(1.0f + exp(-x)); }
GDN_INLINE vf silu(vf x) { return x * sigmoid(x); }

GDN_INLINE vf half_to_float(const uint16_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(ALL, load_as<__m256i>(p)));
#elif defined(__AVX2__)
    return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
    vf v;
    for (int i = 0; i < W; i++) v[i] = static_cast<float>(load_as<half>(p + i));
    return v;
#endif
}

GDN_INLINE void float_to_half(uint16_t* p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(ALL, reinterpret_cast<__m512>(v), 0));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
    for (int i = 0; i < W; i++) {
        const half h = static_cast<half>(v[i]);
        std::memcpy(p + i, &h, 2);
    }
#endif
}

GDN_INLINE float half_to_float(uint16_t h) { return static_cast<float>(load_as<half>(&h)); }
GDN_INLINE uint16_t float_to_half(float x) {
    const half h = static_cast<half>(x);
    return load_as<uint16_t>(&h);
}

// Runs f(i, n) for every n ≤ W elements of a row: n == W but for the last ones, which f reads and
// writes through `load_part` and `store_part`.
template <typename F>
GDN_INLINE void for_lanes(int64_t size, F f) {
    int64_t i = 0;
    for (; i + W <= size; i += W) f(i, W);
    if (i < size) f(i, static_cast<int>(size - i));
}

GDN_INLINE vf load_part(const float* p, int n) {
    if (n == W) return load(p);
    vf v{};
    std::memcpy(&v, p, 4 * static_cast<size_t>(n));
    return v;
}

GDN_INLINE void store_part(float* p, vf v, int n) {
    if (n == W)
        store(p, v);
    else
        std::memcpy(p, &v, 4 * static_cast<size_t>(n));
}

// log(1 + u) to within 1.5 units in the last place, for u from 0 to 2^120.
GDN_INLINE vf log1p(vf u) {
    const vf w = 1.0f + u;
    const vf lost = select(u < splat(1.0f), u - (w - 1.0f), 1.0f - (w - u));  // w + lost == 1 + u.
    // w = 2^k · m with m between sqrt(1/2) and sqrt(2).
    const vi k = (bits(w) - 0x3F3504F3) >> 23;
    const vf f = fma(lost, from_bits((127 - k) << 23), from_bits(bits(w) - (k << 23)) - 1.0f);
    // log(1 + f) = 2·atanh(s) = 2s + s·z·r, where 2s = f - s·f keeps the digits of f.
    const vf s = f / (2.0f + f), z = s * s;
    vf r = fma(z, splat(0.222222222f), splat(0.285714286f));
    r = fma(z, fma(z, r, splat(0.4f)), splat(0.666666667f));
    const vf n = to_float(k);
    return fma(n, splat(0.693359375f), f - fma(s, fma(-z, r, f), n * 2.12194440e-4f));
}

// log(1 + e^x); x itself above 20. NaN stays NaN.
GDN_INLINE vf softplus(vf x) {
    return select(x <= splat(20.0f), log1p(exp(min(x, splat(20.0f)))), x);
}

// Σ x² of a row of n.
GDN_INLINE float sum_of_squares(const float* x, int64_t n) {
    vf squares{};
    for_lanes(n, [&](int64_t i, int w) {
        const vf v = load_part(x + i, w);
        squares = fma(v, v, squares);
    });
    return sum(squares);
}

// 1 / sqrt(mean(x²) + eps) of a row of n, in every lane.
GDN_INLINE vf inverse_rms(const float* x, int64_t n, double eps) {
    const float mean = sum_of_squares(x, n) / static_cast<float>(n);
    return splat(1.0f / __builtin_sqrtf(mean + static_cast<float>(eps)));
}

// out = x · weight / sqrt(mean(x²) + eps) for a row of n.
GDN_INLINE void rms_norm(const float* x, const float* weight, int64_t n, double eps, float* out) {
    const vf scale = inverse_rms(x, n, eps);
    for_lanes(n, [&](int64_t i, int w) {
        store_part(out + i, load_part(x + i, w) * scale * load_part(weight + i, w), w);
    });
}

}  // namespace gdn
