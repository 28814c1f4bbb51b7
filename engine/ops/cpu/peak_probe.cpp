// PEAK_PROBE: multiplies and adds in registers as fast as a thread can, to measure a machine's
// peaks.

#include "kernels.h"
#include "matrix.h"

namespace gdn {
namespace {

// Attributes: the unit, and turns of a task. OUT [tasks, 2] float32: a number that depends on all
// sums, and the operations of the task: 2 for a product and its sum, 0 if there is no such unit.
enum { OUT };
enum Unit { FLOATS, INT8_DOTS, BF16_DOTS, INT8_TILES, BF16_TILES };

// Sums that don't wait for each other: more than units take on before the first is done.
constexpr int CHAINS = 12;

struct Done {
    float number;
    double operations;
};

// turn(acc) for all sums of a turn, each of which does so many operations.
template <typename V, typename F>
GDN_INLINE Done repeat(int64_t turns, double operations, F turn) {
    V acc[CHAINS] = {};
    for (int64_t i = 0; i < turns; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) acc[c] = turn(acc[c]);
    }
    float number = 0;
    for (const V& a : acc) number += load_as<float>(&a);
    return {number, operations * CHAINS * static_cast<double>(turns)};
}

Done floats(int64_t turns, const char*) {
    const vf factor = splat(0.5f + static_cast<float>(turns % 2) / 4), one = splat(1.0f);
    return repeat<vf>(turns, 2 * W,
                      [&](vf a) __attribute__((always_inline)) { return fma(a, factor, one); });
}

Done int8_dots(int64_t turns, const char* bytes) {
#if defined(__AVX512VNNI__)
    const auto w = load_as<__m512i>(bytes), x = load_as<__m512i>(bytes + 64);
    return repeat<__m512i>(turns, 2 * 64, [&](__m512i a) __attribute__((always_inline)) {
        return _mm512_dpbusd_epi32(a, w, x);
    });
#elif defined(__AVX2__)
    auto w = load_as<__m256i>(bytes);
    const auto x = load_as<__m256i>(bytes + 32);
    return repeat<__m256i>(turns, 2 * 32, [&](__m256i a) __attribute__((always_inline)) {
        asm("" : "+x"(w));  // The product is another one each time, as far as the compiler knows.
        return _mm256_add_epi16(a, _mm256_maddubs_epi16(w, x));
    });
#else
    (void)turns, (void)bytes;
    return {};
#endif
}

Done bf16_dots(int64_t turns, const char* bytes) {
#if defined(__AVX512BF16__)
    const auto w = load_as<__m512i>(bytes), x = load_as<__m512i>(bytes + 64);
    return repeat<__m512>(turns, 2 * 32, [&](__m512 a) __attribute__((always_inline)) {
        return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)x);
    });
#else
    (void)turns, (void)bytes;
    return {};
#endif
}

#if defined(__AMX_INT8__)
template <int C>
GDN_INLINE void multiply_bytes() {
    asm volatile("tdpbssd %%tmm5, %%tmm4, %%tmm%c0" : : "i"(C));
}

// The four sums of two by two tiles, of tiles 4 and 5.
template <typename F>
Done multiply_tiles(int64_t turns, char* bytes, double operations, F multiply) {
    clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
    load_tile<4>(bytes, 64), load_tile<5>(bytes, 64);
    for (int64_t i = 0; i < turns; i++) multiply();
    store_tile<0>(bytes, 64);
    return {load_as<float>(bytes), 4 * operations * static_cast<double>(turns)};
}

Done int8_tiles(int64_t turns, char* bytes) {
    return multiply_tiles(turns, bytes, 2 * SIDE * SIDE * 64, [] {
        multiply_bytes<0>(), multiply_bytes<1>(), multiply_bytes<2>(), multiply_bytes<3>();
    });
}

Done bf16_tiles(int64_t turns, char* bytes) {
    return multiply_tiles(turns, bytes, 2 * SIDE * SIDE * DEPTH, [] {
        multiply_tile<0, 4, 5>(), multiply_tile<1, 4, 5>();
        multiply_tile<2, 4, 5>(), multiply_tile<3, 4, 5>();
    });
}
#else
Done int8_tiles(int64_t, char*) { return {}; }
Done bf16_tiles(int64_t, char*) { return {}; }
#endif

Done operate(Unit unit, int64_t turns, char* bytes) {
    switch (unit) {
        case FLOATS: return floats(turns, bytes);
        case INT8_DOTS: return int8_dots(turns, bytes);
        case BF16_DOTS: return bf16_dots(turns, bytes);
        case INT8_TILES: return int8_tiles(turns, bytes);
        default: return bf16_tiles(turns, bytes);
    }
}

void run(const Args& a, int64_t begin, int64_t end) {
    const auto turns = static_cast<int64_t>(a.attr[1]);
    for (int64_t i = begin; i < end; i++) {
        // Numbers between -2 and 2 of either type: products of zeros take less power.
        for (int b = 0; b < 1024; b++) a.scratch[b] = static_cast<char>(b % 2 ? 0x3f : b * 37);
        const Done done = operate(static_cast<Unit>(a.attr[0]), turns, a.scratch);
        a.v[OUT].row(i)[0] = done.number;
        a.v[OUT].row(i)[1] = static_cast<float>(done.operations);
    }
}

}  // namespace

const Kernel peak_probe = {"PEAK_PROBE", [](const Args& a) { return a.v[OUT].shape[0]; }, run};

}  // namespace gdn
