// QK_NORM_ROPE: RMS norm and rotary embedding of a row's queries and keys, a task for each row.

#include "kernels.h"
#include "paged.h"
#include "rope.h"

namespace gdn {
namespace {

// Attributes: eps, and those of Rotation.
enum { OUT, Q, K, V, Q_NORM, K_NORM, K_CACHE, V_CACHE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };
enum { EPS, N_ROT };

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
    r.set_position(position);
    for (int64_t h = 0; h < n_heads; h++)
        norm_and_turn(a.v[Q].row(t, h), a.v[Q_NORM].as<float>(), eps, size, r, a.v[OUT].row(t, h));
    for (int64_t h = 0; h < n_kv; h++) {
        norm_and_turn(a.v[K].row(t, h), a.v[K_NORM].as<float>(), eps, size, r, row);
        write_cache(a.v[K_CACHE], table, position, h, row);
        write_cache(a.v[V_CACHE], table, position, h, a.v[V].row(t, h));
    }
}

void run(const Args& a, int64_t begin, int64_t end) {
    const Rotation r(a.attr + N_ROT, a.scratch);
    for (int64_t t = begin; t < end; t++) run_row(a, t, r, r.rest());
}

}  // namespace

const Kernel qk_norm_rope = {"QK_NORM_ROPE", [](const Args& a) { return a.rows(a.v[Q]); }, run};

}  // namespace gdn
