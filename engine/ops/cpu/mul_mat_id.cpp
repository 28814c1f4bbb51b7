// MUL_MAT_ID: rows times the matrices of the experts that they chose.
//
// SORT_BY_EXPERT lists the pairs (token, choice) by expert, those of tiled rows first. With a BF16
// matrix, a task gathers pairs of tiled rows and multiplies them as tiles with a few panels. Other
// pairs are multiplied with panels as they are stored, on matrix units 16 of an expert's at once by
// tiles of int8: experts have too few rows to pay for expanding panels to bfloat16. SUM_EXPERTS
// adds a token's results in the router's order, so that they do not depend on the rest of the
// batch.

#include <algorithm>

#include "kernels.h"
#include "mul_mat.h"

namespace gdn {
namespace {

namespace sorting {

// STARTS [2 · experts + 1]: where an expert's pairs of rows in row tiles begin, then of other rows.
enum { ORDER, STARTS, IDS };

// A counting sort; pairs of one kind stay in their order.
void run(const Args& a, int64_t, int64_t) {
    const View& ids = a.v[IDS];
    const int64_t n_tokens = a.rows(ids), n_used = ids.shape[1], n_starts = a.v[STARTS].shape[0];
    auto *order = a.v[ORDER].as<int32_t>(), *starts = a.v[STARTS].as<int32_t>();
    const auto for_pairs = [&](auto f) {
        const int32_t *next = a.step->by_kind, *stop = next + a.step->n_coarse;
        for (int64_t t = 0; t < n_tokens; t++) {
            const bool is_remainder = next == stop || *next != t;
            next += !is_remainder;
            for (int64_t u = 0; u < n_used; u++) {
                const int32_t id = ids.as<int32_t>()[t * ids.stride[0] + u * ids.stride[1]];
                f(2 * id + is_remainder, static_cast<int32_t>(t * n_used + u));
            }
        }
    };
    std::fill(starts, starts + n_starts, 0);
    for_pairs([&](int32_t kind, int32_t) { starts[kind + 1]++; });
    for (int64_t i = 1; i < n_starts; i++) starts[i] += starts[i - 1];
    for_pairs([&](int32_t kind, int32_t pair) { order[starts[kind]++] = pair; });
    for (int64_t i = n_starts - 1; i > 0; i--) starts[i] = starts[i - 1];
    starts[0] = 0;
}

}  // namespace sorting

namespace products {

enum { OUT, X, Q, SCALE, SUM, PACKED_X, MATRIX, ORDER, STARTS, IDS };

int64_t n_experts(const Args& a) { return a.v[MATRIX].shape[0]; }

int64_t n_panels(const Args& a) { return (a.v[MATRIX].shape[1] + PANEL - 1) / PANEL; }

const uint8_t* panel_at(const Args& a, int64_t expert, int64_t p) {
    const View& m = a.v[MATRIX];
    return m.as<uint8_t>() + expert * m.stride[0] + p * m.stride[1];
}

// The row of [T, in], or of [T, U, in] taken as [T · U, in], that a pair multiplies.
int64_t row_index(const Args& a, int64_t pair) {
    return a.v[X].rank == 2 ? pair / a.v[IDS].shape[1] : pair;
}

void put(const Args& a, int64_t pair, int64_t p, const float* values) {
    const int64_t n_out = a.v[MATRIX].shape[1], n = std::min<int64_t>(PANEL, n_out - p * PANEL);
    std::memcpy(a.v[OUT].as<float>() + pair * n_out + p * PANEL, values,
                4 * static_cast<size_t>(n));
}

namespace tiles {

// Panels of a task, and pairs whose rows are gathered at a time at most.
constexpr int64_t TASK_PANELS = 2 * MAX_PAIRS, MAX_GATHERED = 128;
constexpr int64_t GATHERED = SIDE * MAX_GATHERED_COLUMNS;  // Elements.

int64_t n_groups(const Args& a) { return (n_panels(a) + TASK_PANELS - 1) / TASK_PANELS; }

int64_t n_tasks(const Args& a) {
    return a.v[PACKED_X] && a.step->n_tiled ? n_experts(a) * n_groups(a) : 0;
}

void gather(const Args& a, const int32_t* pairs, int64_t n, bf16* to) {
    const int64_t n_in = a.v[MATRIX].shape[2];
    for (int64_t i = 0; i < n; i++) {
        const bf16* row = a.v[PACKED_X].as<bf16>() + row_index(a, pairs[i]) * n_in;
        bf16* tile = to + i / SIDE * SIDE * n_in + i % SIDE * DEPTH;
        for (int64_t k = 0; k < n_in; k += DEPTH, tile += TILE_SIZE)
            std::memcpy(tile, row + k, 2 * DEPTH);
    }
}

struct Scratch {
    TileScratch tiles;
    bf16 gathered[GATHERED];
};
static_assert(sizeof(Scratch) <= SCRATCH_BYTES);

// An expert's matrix as a weight of its own.
View matrix_of(const Args& a, int64_t expert) {
    View m = a.v[MATRIX];
    m.data += expert * m.stride[0];
    for (int i = 0; i < 2; i++) m.shape[i] = m.shape[i + 1], m.stride[i] = m.stride[i + 1];
    return m;
}

void run_task(const Args& a, int64_t task) {
    const auto *order = a.v[ORDER].as<int32_t>(), *starts = a.v[STARTS].as<int32_t>();
    const int64_t expert = task / n_groups(a), first = task % n_groups(a) * TASK_PANELS;
    const int64_t last = std::min(n_panels(a), first + TASK_PANELS);
    const int64_t most = std::min(MAX_GATHERED, GATHERED / a.v[MATRIX].shape[2] / SIDE * SIDE);
    const View m = matrix_of(a, expert);
    Pair panels[MAX_PAIRS] = {};
    int64_t n_pairs = 0;
    for (int64_t p = first; p < last; p += 2) panels[n_pairs++] = {&m, p / 2, (p - first) * PANEL};
    auto& s = *reinterpret_cast<Scratch*>(a.scratch);
    for (int64_t i = starts[2 * expert]; i < starts[2 * expert + 1]; i += most) {
        const int64_t n = std::min(most, starts[2 * expert + 1] - i);
        gather(a, order + i, n, s.gathered);
        const auto done = [&](int64_t row, int64_t n_rows, const float* sums) {
            for (const int32_t* pair = order + i + row; n_rows-- > 0; pair++, sums += SUMS)
                for (int64_t p = first; p < last; p++) put(a, *pair, p, sums + (p - first) * PANEL);
        };
        multiply_pairs(s.gathered, n, panels, n_pairs, s.tiles, nowhere, done);
    }
}

}  // namespace tiles

namespace rows {

// Panels of a task where rows are gathered for int8 tiles, and the fewest tokens for that: of fewer,
// an expert seldom has enough.
constexpr int64_t GATHERED_PANELS = 32, MIN_TOKENS = 9;
static_assert(TILE / SIDE * gathered_bytes(MAX_GATHERED_COLUMNS) <= SCRATCH_BYTES);

// Attribute: whether there are such tiles. An expert has at most a pair of each token.
bool by_tiles(const Args& a) { return a.attr[0] != 0 && a.rows(a.v[IDS]) >= MIN_TOKENS; }

int64_t task_panels(const Args& a) { return by_tiles(a) ? GATHERED_PANELS : 1; }

int64_t n_groups(const Args& a) { return (n_panels(a) + task_panels(a) - 1) / task_panels(a); }

// As many experts as there are pairs, at most, have tasks: those of experts without pairs would make
// turns of different length.
int64_t n_tasks(const Args& a) {
    return std::min(n_experts(a), a.rows(a.v[IDS]) * a.v[IDS].shape[1]) * n_groups(a);
}

// Where an expert's pairs that are multiplied here begin; they end where the next expert's begin.
int64_t first_pair(const Args& a, int64_t expert) {
    return a.v[STARTS].as<int32_t>()[2 * expert + (a.v[PACKED_X] ? 1 : 0)];
}

int64_t end_of_pairs(const Args& a, int64_t expert) {
    return a.v[STARTS].as<int32_t>()[2 * expert + 2];
}

// The first expert with pairs from this one on; the number of experts if there is none.
int64_t next_used(const Args& a, int64_t expert) {
    while (expert < n_experts(a) && first_pair(a, expert) == end_of_pairs(a, expert)) expert++;
    return expert;
}

// Row i of [T, in], or of [T, U, in] taken as [T · U, in].
template <typename T>
const T* flat_row(const View& v, int64_t i) {
    if (v.rank == 2) return v.as<T>() + i * v.stride[0];
    return v.as<T>() + i / v.shape[1] * v.stride[0] + i % v.shape[1] * v.stride[1];
}

Row row_of(const Args& a, int64_t pair) {
    const int64_t i = row_index(a, pair);
    if (!a.v[Q]) return {flat_row<float>(a.v[X], i), nullptr, nullptr, nullptr, false};
    return {flat_row<float>(a.v[X], i), flat_row<int8_t>(a.v[Q], i), flat_row<float>(a.v[SCALE], i),
            flat_row<int32_t>(a.v[SUM], i), a.step->is_fine(a.v[X], pair / a.v[IDS].shape[1])};
}

// Panels begin … end - 1 of an expert's matrix times n ≤ TILE of the expert's pairs, of one kind.
void multiply_panels(const Args& a, int64_t expert, int64_t begin, int64_t end,
                     const int32_t* pairs, int64_t n) {
    const View& m = a.v[MATRIX];
    Row rows[TILE];
    float out[TILE][PANEL];
    for (int64_t i = 0; i < n; i++) rows[i] = row_of(a, pairs[i]);
    const PreparedRows prepared(m.layout, m.shape[2], rows, n, by_tiles(a), a.scratch);
    for (int64_t p = begin; p < end; p++) {
        prepared.multiply(m.layout, panel_at(a, expert, p), out);
        for (int64_t i = 0; i < n; i++) put(a, pairs[i], p, out[i]);
    }
}

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t groups = n_groups(a), n = task_panels(a);
    const auto* order = a.v[ORDER].as<int32_t>();
    int64_t expert = next_used(a, 0);
    for (int64_t i = 0; i < begin / groups; i++) expert = next_used(a, expert + 1);
    for (int64_t task = begin; task < end && expert < n_experts(a); task++) {
        const int64_t p = task % groups * n, last = end_of_pairs(a, expert);
        const int64_t others = a.v[STARTS].as<int32_t>()[2 * expert + 1];
        const auto multiply_pairs = [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; i += TILE)
                multiply_panels(a, expert, p, std::min(n_panels(a), p + n), order + i,
                                std::min(TILE, to - i));
        };
        // Pairs of both kinds may share tiles, unless one is fine.
        const int64_t middle = a.step->has_fine ? others : last;
        multiply_pairs(first_pair(a, expert), middle);
        multiply_pairs(middle, last);
        if ((task + 1) % groups == 0) expert = next_used(a, expert + 1);
    }
}

}  // namespace rows

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n = tiles::n_tasks(a);
    for (; begin < std::min(n, end); begin++) tiles::run_task(a, begin);
    if (begin < end) rows::run(a, begin - n, end - n);
}

}  // namespace products

namespace sums {

enum { OUT, PARTIAL, GATES };

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n_used = a.v[PARTIAL].shape[1], n = a.v[PARTIAL].shape[2];
    for (int64_t t = begin; t < end; t++) {
        for_lanes(n, [&](int64_t i, int w) {
            vf total{};
            for (int64_t u = 0; u < n_used; u++) {
                const float gate = a.v[GATES].row(t)[u * a.v[GATES].stride[1]];
                total = fma(splat(gate), load_part(a.v[PARTIAL].row(t, u) + i, w), total);
            }
            store_part(a.v[OUT].row(t) + i, total, w);
        });
    }
}

}  // namespace sums

}  // namespace

const Kernel sort_by_expert = {"SORT_BY_EXPERT", [](const Args&) { return int64_t{1}; },
                               sorting::run};
const Kernel mul_mat_id = {
    "MUL_MAT_ID",
    [](const Args& a) { return products::tiles::n_tasks(a) + products::rows::n_tasks(a); },
    products::run};
const Kernel sum_experts = {"SUM_EXPERTS", [](const Args& a) { return a.rows(a.v[sums::OUT]); },
                            sums::run};

}  // namespace gdn
