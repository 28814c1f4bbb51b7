// Row tiles of ATTENTION, as products of bfloat16 tiles.
//
// A task is a row tile, a key head and some of its query heads, which share keys and values that
// are rounded and rearranged once. Positions are taken in spans, up to the row tile's last row.
// Rows of a row tile lie within 64 aligned positions, so only its last span has scores to mask.
//
// Queries and keys are split into two bfloat16 parts each: rounded once, scores of a deviation of 4
// would change weights by more than all other rounding does. Values and weights are rounded.
//
// Scores are exponents of two. A row's exponentials refer not to its exact maximum but to an
// integer above it, raised only when scores outgrow it by far: sums are seldom scaled, and by exact
// powers of two.

#include "attention.h"
#include "row_products.h"
#include "tiles.h"

namespace gdn::attention_op {
namespace {

constexpr int64_t SPAN = 128;           // Positions.
constexpr int64_t DEEP = SPAN / DEPTH;  // Tiles that a span's positions are deep.
constexpr int64_t MIN_HEADS = 4;        // With fewer, rearranging keys and values takes too long.
constexpr int64_t MANY_TASKS = 64;      // From here on every thread has enough of them.
constexpr float LOG2_E = 1.44269504f;
constexpr float MAGIC = 0x1.8p23f;  // Sums with it are rounded to integers, in their low bits.
constexpr float LOWEST = -125;      // Lower exponents count as zero.
constexpr float MAX_EXCESS = 8;     // By which scores may exceed their reference.

// Sizes of a task's operands, with those of keys and values filled up to whole tiles.
struct Sizes {
    int64_t size, v_size, depth, columns;

    explicit Sizes(const Args& a)
        : size(a.v[Q].shape[2]),
          v_size(a.v[OUT].shape[2]),
          depth((size + DEPTH - 1) / DEPTH),
          columns((v_size + SIDE - 1) / SIDE) {}

    int64_t v_width() const { return columns * SIDE; }
    int64_t head_bytes() const {
        const int64_t q = 2 * MAX_TILE_ROWS * depth * DEPTH * 2,
                      acc = MAX_TILE_ROWS * v_width() * 4;
        return q + acc + MAX_TILE_ROWS * 4 * (W + 1);
    }
    int64_t shared_bytes() const {
        const int64_t k = 2 * SPAN * depth * DEPTH * 2, v = SPAN * v_width() * 2;
        const int64_t scores = MAX_TILE_ROWS * SPAN * (4 + 2), pointers = 2 * SPAN * sizeof(void*);
        return k + v + scores + pointers + 4 * size + 4 * v_size;
    }
    int64_t max_heads() const { return (SCRATCH_BYTES - 1024 - shared_bytes()) / head_bytes(); }
};

// How the row tiles of an instruction are cut into tasks; results don't depend on it.
struct Split {
    HeadParts parts;
    int64_t n_row_tiles;

    explicit Split(const Args& a) : parts(a, Sizes(a).max_heads()), n_row_tiles(a.step->n_tiles) {
        while (n_tasks() < MANY_TASKS && parts.n_heads / 2 >= MIN_HEADS)
            parts.cut((parts.group + parts.n_heads / 2 - 1) / (parts.n_heads / 2));
    }
    int64_t n_tasks() const { return n_row_tiles * parts.n_kv * parts.n_parts; }
};

// A row tile and some query heads of one key head; all of it in the scratch. Query 64 · h + r
// is head h of row r.
struct Work {
    const Sizes sizes;
    const int32_t *table, *positions;
    int64_t first_row, n_rows, row_tiles, kv_head, first_head, n_heads;
    bf16* q;                // [n_heads, row tile, part, depth tile] A tiles: queries, scaled.
    bf16* k;                // [16 positions, part, depth tile] B tiles: keys of a span.
    bf16* v;                // [16 columns, 32 positions] B tiles: values of a span.
    float* scores;          // [64, SPAN] of one head.
    bf16* weights;          // [row tile, 32 positions] A tiles: their exponentials.
    float* acc;             // [query, v_width]: weighted sums of values.
    float* total;           // [query, W]: sums of weights, lane by lane.
    float* reference;       // [query]: the integer that scores refer to, in powers of two.
    const char* zeros;      // A row of a cache.
    void *k_rows, *v_rows;  // [SPAN] pointers to a span's rows of the caches.

    explicit Work(const Args& a) : sizes(a) {}
};

// Hands out a task's scratch.
struct Room {
    char* next;

    template <typename T>
    T* take(int64_t n) {
        char* p = next;
        next += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T*>(p);
    }
};

// Rows that don't exist are read as zeros: those behind the last position, and those that fill up
// the last 16 rows, whose weights stay zero.
void place(Work& w, char* scratch) {
    Room room{scratch};
    const int64_t n = w.n_heads * MAX_TILE_ROWS, row_bytes = 4 * (w.sizes.size + w.sizes.v_size);
    w.q = room.take<bf16>(2 * n * w.sizes.depth * DEPTH);
    w.k = room.take<bf16>(2 * SPAN * w.sizes.depth * DEPTH);
    w.v = room.take<bf16>(SPAN * w.sizes.v_width());
    w.scores = room.take<float>(MAX_TILE_ROWS * SPAN);
    w.k_rows = room.take<void*>(SPAN), w.v_rows = room.take<void*>(SPAN);
    w.reference = room.take<float>(n);
    char* cleared = room.next;
    w.weights = room.take<bf16>(MAX_TILE_ROWS * SPAN);
    w.acc = room.take<float>(n * w.sizes.v_width());
    w.total = room.take<float>(n * W);
    w.zeros = room.take<char>(row_bytes);
    std::memset(cleared, 0, static_cast<size_t>(room.next - cleared));
    for (int64_t i = 0; i < n; i++) w.reference[i] = -__builtin_inff();
}

// The first W of n values of a row, and zeros for those it hasn't.
template <typename T>
GDN_INLINE vf load_some(const T* p, int64_t n) {
    return n >= W ? load(p) : n > 0 ? load_part(p, static_cast<int>(n)) : vf{};
}

// 2 W of n elements of a row as columns of an A tile, with zeros for those it hasn't.
template <typename T>
GDN_INLINE Pairs split_some(const T* p, int64_t n, float scale) {
    return split(load_some(p, n) * scale, load_some(p + W, n - W) * scale);
}

void load_queries(const Args& a, const Work& w) {
    const float scale = static_cast<float>(a.attr[0]) * LOG2_E;
    const int64_t part = w.sizes.depth * TILE_SIZE;
    for (int64_t h = 0; h < w.n_heads; h++)
        for (int64_t r = 0; r < w.row_tiles * SIDE; r++) {
            const bool exists = r < w.n_rows;  // Of another row, no value is read.
            const float* x = a.v[Q].row(w.first_row + (exists ? r : 0), w.first_head + h);
            bf16* y = w.q + (h * MAX_TILE_ROWS + r) / SIDE * 2 * part + r % SIDE * DEPTH;
            for (int64_t d = 0; d < w.sizes.depth * DEPTH; d += 2 * W) {
                const Pairs q = split_some(x + d, exists ? w.sizes.size - d : 0, scale);
                bf16* to = y + d / DEPTH * TILE_SIZE + d % DEPTH;
                put(to, q.high), put(to + part, q.low);
            }
        }
}

// Keys of a span as B tiles: pairs along a key's elements, positions side by side.
template <typename T>
void pack_keys(const Work& w, int64_t n_positions) {
    const T* const* rows = static_cast<const T**>(w.k_rows);
    const int64_t depth = w.sizes.depth, part = depth * TILE_SIZE;
    for (int64_t i = 0; i < 2 * n_positions / SIDE * depth; i++) {
        const int64_t p = i / depth / 2 * SIDE, d = i % depth * DEPTH;
        const bool low = i / depth % 2;
        bf16* y = w.k + p / SIDE * 2 * part + low * part + d * SIDE;
        transpose_tile(
            [&](int r, int c) {
                const Pairs k = split_some(rows[p + r] + d + 2 * c, w.sizes.size - d - 2 * c, 1);
                return low ? k.low : k.high;
            },
            [&](int at, vi pairs) { put(y + at, pairs); });
    }
}

// Values of a span as B tiles: pairs of positions, columns side by side.
template <typename T>
void pack_values(const Work& w, int64_t n_positions) {
    const T* const* rows = static_cast<const T**>(w.v_rows);
    for (int64_t c = 0; c < w.sizes.columns; c++)
        for (int64_t p = 0; p < n_positions; p += 2) {
            bf16* y = w.v + (c * DEEP * DEPTH + p) * SIDE;
            for (int i = 0; i < SIDE; i += W) {
                const int64_t d = c * SIDE + i, n = w.sizes.v_size - d;
                put(y + 2 * i,
                    bf16_pairs(load_some(rows[p] + d, n), load_some(rows[p + 1] + d, n)));
            }
        }
}

// Finds and packs the keys and values of a span; zeros fill it up to whole tiles.
template <typename K, typename V>
void load_span(const Args& a, const Work& w, int64_t begin, int64_t end, int64_t n_positions) {
    const K** keys = static_cast<const K**>(w.k_rows);
    const V** values = static_cast<const V**>(w.v_rows);
    find_rows(a.v[K_CACHE], w.table, w.kv_head, begin, end, keys);
    find_rows(a.v[V_CACHE], w.table, w.kv_head, begin, end, values);
    for (int64_t i = end - begin; i < n_positions; i++) {
        keys[i] = reinterpret_cast<const K*>(w.zeros);
        values[i] = reinterpret_cast<const V*>(w.zeros);
    }
    pack_keys<K>(w, n_positions);
    pack_values<V>(w, n_positions);
}

// 2^(s - reference) to within 1e-4 of it, of which rounding to bfloat16 leaves little; 0 far below.
// `shift` is MAGIC - reference, so that t's low bits are the rounded exponent. NaN stays NaN.
GDN_INLINE vf power(vf s, float shift, float lowest) {
    const vf t = s + shift;
    const vf r = s - (t - shift);
    vf p = fma(splat(5.517166954e-02f), r, splat(2.426111254e-01f));
    p = fma(p, r, splat(6.932609857e-01f));
    p = fma(p, r, splat(9.999280733e-01f));
    const vi y = bits(p) + (bits(t) << 23);
    return from_bits(s < lowest ? vi{} : y);
}

// Lets a query's scores refer to an integer above `top`.
void raise(const Work& w, int64_t query, float top) {
    const float before = w.reference[query], after = __builtin_ceilf(top);
    w.reference[query] = after;
    const float shrink = power(splat(before), MAGIC - after, after + LOWEST)[0];
    float* acc = w.acc + query * w.sizes.v_width();
    for (int64_t d = 0; d < w.sizes.v_width(); d += W) store(acc + d, load(acc + d) * shrink);
    store(w.total + query * W, load(w.total + query * W) * shrink);
}

// 2 W weights in a row of an A tile, in order; adds the rounded ones to `total`, so that rounding a
// large weight doesn't change the size of the result.
GDN_INLINE vf store_weights(bf16* p, vf x, vf y, vf total) {
#if defined(__AVX512BF16__)
    const vi both = bf16_row(x, y), ones = splat(int32_t{0x3f803f80});
    put(p, both);
    return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)both, (__m512bh)ones);
#else
    store_bf16(p, x, W);
    store_bf16(p + W, y, W);
    const auto rounded = [](vf v) { return from_bits(round_to_bf16(v) & ~0xffff); };
    return total + (rounded(x) + rounded(y));
#endif
}

// A query's scores of a span become weights, a row of A tiles.
void soften(const Work& w, int64_t query, const float* scores, int64_t n_positions, bf16* weights) {
    vf tops = load(scores);
    for (int64_t i = W; i < n_positions; i += W) tops = max(tops, load(scores + i));
    const float top = max_lane(tops);
    if (top > w.reference[query] + MAX_EXCESS) raise(w, query, top);
    const float shift = MAGIC - w.reference[query], lowest = w.reference[query] + LOWEST;
    vf total = load(w.total + query * W);
    for (int64_t i = 0; i < n_positions; i += DEPTH, weights += TILE_SIZE)
        for (int j = 0; j < DEPTH; j += 2 * W)
            total = store_weights(weights + j, power(load(scores + i + j), shift, lowest),
                                  power(load(scores + i + j + W), shift, lowest), total);
    store(w.total + query * W, total);
}

// One head's scores of the span that begins at a position, weights, and weighted sums of values.
void attend_head(const Work& w, int64_t h, int64_t begin, int64_t n_positions) {
    const int64_t depth = w.sizes.depth, part = depth * TILE_SIZE, v_width = w.sizes.v_width();
    const Tiles q = tiles(w.q + h * MAX_TILE_ROWS / SIDE * 2 * part, 2 * depth);
    const Tiles k = tiles(w.k, 2 * depth);
    const Tiles q_low{q.at + part, q.side, q.depth}, k_low{k.at + part, k.side, k.depth};
    const int64_t n = n_positions / SIDE;
    multiply_matrices(q, w.row_tiles, k, n, depth, w.scores, SPAN, false);
    multiply_matrices(q_low, w.row_tiles, k, n, depth, w.scores, SPAN, true);
    multiply_matrices(q, w.row_tiles, k_low, n, depth, w.scores, SPAN, true);
    for (int64_t r = 0; r < w.n_rows; r++) {
        float* scores = w.scores + r * SPAN;
        for (int64_t i = w.positions[r] + 1 - begin; i < n_positions; i++)
            scores[i] = -__builtin_inff();
        bf16* weights = w.weights + r / SIDE * DEEP * TILE_SIZE + r % SIDE * DEPTH;
        soften(w, h * MAX_TILE_ROWS + r, scores, n_positions, weights);
    }
    multiply_matrices(tiles(w.weights, DEEP), w.row_tiles, tiles(w.v, DEEP), w.sizes.columns,
                      n_positions / DEPTH, w.acc + h * MAX_TILE_ROWS * v_width, v_width, true);
}

template <typename K, typename V>
void attend(const Args& a, const Work& w) {
    const int64_t stop = w.positions[w.n_rows - 1] + 1;
    for (int64_t begin = 0; begin < stop; begin += SPAN) {
        const int64_t end = stop - begin < SPAN ? stop : begin + SPAN;
        const int64_t n_positions = (end - begin + DEPTH - 1) / DEPTH * DEPTH;
        load_span<K, V>(a, w, begin, end, n_positions);
        for (int64_t h = 0; h < w.n_heads; h++) attend_head(w, h, begin, n_positions);
    }
}

void run_task(const Args& a, const Split& s, int64_t task) {
    const int64_t part = task % s.parts.n_parts, kv_head = task / s.parts.n_parts % s.parts.n_kv;
    // A prompt's last row tiles see most positions: they come first, so that no thread ends with
    // one.
    const RowTile& tile = a.step->tiles[s.n_row_tiles - 1 - task / s.parts.n_parts / s.parts.n_kv];
    const int32_t* seq_starts = a.v[SEQ_STARTS].as<int32_t>();
    Work w(a);
    w.table = block_table(a, sequence_of(seq_starts, a.rows(a.v[BLOCK_TABLES]), tile.row));
    w.positions = a.v[POSITIONS].as<int32_t>() + tile.row;
    w.first_row = tile.row, w.n_rows = tile.n, w.row_tiles = (tile.n + SIDE - 1) / SIDE;
    w.kv_head = kv_head;
    w.first_head = s.parts.first(kv_head, part), w.n_heads = s.parts.size(part);
    place(w, a.scratch);
    load_queries(a, w);
    for_types(a, [&](auto k, auto v) { attend<decltype(k), decltype(v)>(a, w); });
    for (int64_t h = 0; h < w.n_heads; h++)
        for (int64_t r = 0; r < w.n_rows; r++) {
            const int64_t i = h * MAX_TILE_ROWS + r;
            store_result(a, w.first_row + r, w.first_head + h, w.acc + i * w.sizes.v_width(),
                         sum(load(w.total + i * W)));
        }
}

}  // namespace

int64_t n_tile_tasks(const Args& a) { return Split(a).n_tasks(); }

void run_tile_tasks(const Args& a, int64_t begin, int64_t end) {
    const Split s(a);
    for (int64_t task = begin; task < end; task++) run_task(a, s, task);
}

}  // namespace gdn::attention_op
