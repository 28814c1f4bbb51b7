// Remainder rows of ATTENTION.
//
// A row's own position decides how its positions are cut into chunks; a chunk's result is joined to
// that of the chunks before. With few rows each chunk is a task, and ATTENTION_JOIN joins their
// results, so that all threads read a long context. With many rows a task takes all chunks of one
// or a few rows, which then share loads of keys and values. The arithmetic is the same both ways,
// and a row's result has the same bits whatever rows and heads share its task: tiles of positions
// begin at multiples of TILE, and a row reads only the positions that it may see.

#include "attention.h"
#include "kernels.h"
#include "row_products.h"

namespace gdn::attention_op {
namespace {

constexpr int64_t TILE = 64;         // Positions.
constexpr int64_t MIN_CHUNK = 256;   // Positions.
constexpr int64_t MAX_HEADS = 8;     // Query heads of a task: MLA has many for its one key head.
constexpr int64_t MAX_QUERIES = 16;  // Rows times heads of a task: they fit the nearest cache.
constexpr int64_t MANY_ROWS = 32;    // From here on there are tasks enough for every thread.
constexpr int64_t STRIP = 4;         // Keys that are converted at once.
constexpr int64_t CACHE_LINE = 64;   // Bytes.

// The most chunks of a row's positions, and the length of a chunk: MIN_CHUNK times a power of two,
// so that nearly all rows of a sequence are cut alike.
int64_t max_chunks(const Args& a) { return a.v[PARTIALS].shape[2]; }

int64_t chunk_length(int64_t position, int64_t max_chunks) {
    int64_t length = MIN_CHUNK;
    while (length * max_chunks <= position) length *= 2;
    return length;
}

int64_t n_chunks(const Args& a, int64_t row) {
    const int64_t position = a.v[POSITIONS].as<int32_t>()[row];
    return position / chunk_length(position, max_chunks(a)) + 1;
}

// Whether each chunk is a task: if PARTIALS holds the results of all rows.
bool has_partials(const Args& a) { return a.step->n_remainder <= a.v[PARTIALS].shape[0]; }

// How the remainder rows of an instruction are cut into tasks.
struct Split {
    HeadParts parts;
    int64_t n_rows, rows, chunks;

    explicit Split(const Args& a)
        : parts(a, MAX_HEADS),
          n_rows(a.step->n_remainder),
          rows(has_partials(a) || n_rows < MANY_ROWS ? 1 : MAX_QUERIES / parts.n_heads),
          chunks(1) {
        if (!has_partials(a)) return;
        for (int64_t i = 0; i < n_rows; i++) {
            const int64_t n = n_chunks(a, a.step->remainder[i]);
            if (chunks < n) chunks = n;
        }
        // Heads that share loads of keys are faster, unless threads have no task.
        while (n_tasks() < a.n_threads && parts.n_heads > 1) parts.cut(2 * parts.n_parts);
    }

    int64_t n_groups() const { return (n_rows + rows - 1) / rows; }
    int64_t n_tasks() const { return chunks * n_groups() * parts.n_kv * parts.n_parts; }
};

// Each query's maximum of scores over some positions, its sum of exponentials of scores less the
// maximum, and its sum of values with those weights.
struct Sums {
    float *top, *total, *acc;
    int64_t width;

    Sums of(int64_t i) const { return {top + i, total + i, acc + i * width, width}; }
    void clear() const {
        *top = -__builtin_inff(), *total = 0;
        std::memset(acc, 0, 4 * static_cast<size_t>(width));
    }
};

// Adds a query's sums over some positions to those over earlier ones. Not inlined, so that the
// arithmetic is the same everywhere.
__attribute__((noinline)) void join(const Sums& sums, const Sums& more) {
    const float top = *sums.top > *more.top ? *sums.top : *more.top;
    const float keep = exp(splat(*sums.top - top))[0], take = exp(splat(*more.top - top))[0];
    *sums.top = top;
    *sums.total = fma(*sums.total, keep, *more.total * take);
    for (int64_t d = 0; d < sums.width; d += W)
        store(sums.acc + d, fma(load(sums.acc + d), splat(keep), load(more.acc + d) * take));
}

// Where the sums of a chunk are kept, for head h of the i-th remainder row.
Sums partial(const Args& a, int64_t i, int64_t h, int64_t chunk, int64_t width) {
    const View& v = a.v[PARTIALS];
    float* p = v.row(i, h) + chunk * v.stride[2];
    return {p, p + 1, p + PARTIAL_HEAD, width};
}

// Consecutive rows of one sequence, some query heads of one key head; all of it in the scratch.
// Query r · heads + h is head h of row r.
struct Work {
    const int32_t *table, *positions;
    int64_t first_row, n_rows, kv_head, first_head, heads, size, v_size, width;
    float* q;         // [MAX_QUERIES, width]
    float* scores;    // [MAX_QUERIES, TILE]
    float* pack;      // Converted keys or values.
    Sums chunk, row;  // Over the chunk that is being worked on, and over those before.
    void *k, *v;      // [TILE] pointers to a tile's rows of the caches.
    void* next_k;     // The same of the next tile of the chunk, which has n_next.
    int64_t n_next;

    int64_t n_queries() const { return n_rows * heads; }
    int64_t last_position() const { return positions[n_rows - 1]; }
};

int64_t padded(int64_t size) { return (size + W - 1) / W * W; }

void place(const Args& a, Work& w) {
    w.size = a.v[Q].shape[2], w.v_size = a.v[OUT].shape[2];
    w.width = padded(w.size);
    void** pointers = reinterpret_cast<void**>(a.scratch);
    w.k = pointers, w.next_k = pointers + TILE, w.v = pointers + 2 * TILE;
    float* p = reinterpret_cast<float*>(pointers + 3 * TILE);
    const auto take = [&](int64_t n) { return (p += n) - n; };
    const int64_t v_width = padded(w.v_size);
    const auto sums = [&]() -> Sums {
        float *top = take(MAX_QUERIES), *total = take(MAX_QUERIES);
        return {top, total, take(MAX_QUERIES * v_width), v_width};
    };
    w.chunk = sums(), w.row = sums();
    w.scores = take(MAX_QUERIES * TILE);
    w.q = take(MAX_QUERIES * w.width);
    w.pack = p;
}

void load_queries(const Args& a, const Work& w) {
    const View& q = a.v[Q];
    const float scale = static_cast<float>(a.attr[0]);
    for (int64_t i = 0; i < w.n_queries(); i++) {
        const float* x = q.row(w.first_row + i / w.heads, w.first_head + i % w.heads);
        float* y = w.q + i * w.width;
        for_lanes(w.size, [&](int64_t d, int n) { store(y + d, load_part(x + d, n) * scale); });
    }
}

// Turns n scores into exponentials, and scales the sums so far to the new maximum. Not inlined, so
// that no multiplication here is fused with the additions that follow.
__attribute__((noinline)) void soften(const Work& w, int64_t query, int64_t n) {
    const Sums sums = w.chunk.of(query);
    float* scores = w.scores + query * TILE;
    for (int64_t i = n; i < TILE; i++) scores[i] = -__builtin_inff();
    vf tops = load(scores);
    for (int64_t i = W; i < TILE; i += W) tops = max(tops, load(scores + i));
    const float before = *sums.top, tile_top = max_lane(tops);
    const float top = before > tile_top ? before : tile_top;
    vf totals{};
    for (int64_t i = 0; i < TILE; i += W) {
        const vf e = exp(load(scores + i) - top);
        store(scores + i, e);
        totals += e;
    }
    if (top != before) {
        const float shrink = exp(splat(before - top))[0];
        for (int64_t d = 0; d < sums.width; d += W)
            store(sums.acc + d, load(sums.acc + d) * shrink);
        *sums.total *= shrink;
        *sums.top = top;
    }
    *sums.total += sum(totals);
}

template <typename T>
void convert(const T* const* rows, int64_t n_rows, int64_t column, int64_t size, float* y,
             int64_t y_stride) {
    for (int64_t j = 0; j < n_rows; j++)
        for_lanes(size, [&](int64_t d, int n) {
            store(y + j * y_stride + d, load_part(rows[j] + column + d, n));
        });
}

// Into L2: L1 has room for few lines that are under way.
template <typename T>
void prefetch(const T* row, int64_t size) {
    for (int64_t d = 0; d < size; d += CACHE_LINE / sizeof(T)) __builtin_prefetch(row + d, 0, 2);
}

// Scores of n_x queries with a tile's first n keys. The values are prefetched meanwhile, as they
// will be read column by column.
template <typename K, typename V>
void score(const Work& w, int64_t query, int64_t n_x, int64_t n) {
    const K* const* keys = static_cast<const K**>(w.k);
    const V* const* values = static_cast<const V**>(w.v);
    const float* q = w.q + query * w.width;
    const float* packed[STRIP];
    for (int64_t j = 0; j < STRIP; j++) packed[j] = w.pack + j * w.width;
    for (int64_t p = 0; p < n; p += STRIP) {
        const int64_t m = n - p < STRIP ? n - p : STRIP;
        float* y = w.scores + query * TILE + p;
        for (int64_t j = 0; j < m; j++) prefetch(values[p + j], w.v_size);
        if (n_x > 4 && sizeof(K) == 2) {
            convert(keys + p, m, 0, w.size, w.pack, w.width);
            dots(q, w.width, n_x, packed, m, w.size, y, TILE);
        } else {
            dots(q, w.width, n_x, keys + p, m, w.size, y, TILE);
        }
    }
}

// Adds a tile's first n values, weighted, to the results of n_x queries. The next tile's keys are
// prefetched meanwhile, evenly with each strip of columns.
template <typename K, typename V>
void add_values(const Work& w, int64_t query, int64_t n_x, int64_t n) {
    const V* const* values = static_cast<const V**>(w.v);
    const K* const* next_keys = static_cast<const K**>(w.next_k);
    const float* weights = w.scores + query * TILE;
    const float* packed[TILE];
    for (int64_t j = 0; j < TILE; j++) packed[j] = w.pack + j * COLUMNS;
    int64_t n_prefetched = 0;
    for (int64_t d = 0; d < w.v_size; d += COLUMNS) {
        const int c = static_cast<int>(w.v_size - d < COLUMNS ? w.v_size - d : COLUMNS);
        float* y = w.chunk.acc + query * w.chunk.width + d;
        while (n_prefetched * w.v_size < w.n_next * (d + c))
            prefetch(next_keys[n_prefetched++], w.size);
        if (n_x > 4) {
            convert(values, n, d, c, w.pack, COLUMNS);
            add_columns(weights, TILE, n_x, packed, n, 0, c, y, w.chunk.width);
        } else {
            add_columns(weights, TILE, n_x, values, n, d, c, y, w.chunk.width);
        }
    }
}

int64_t visible(const Work& w, int64_t row, int64_t begin) {
    const int64_t n = w.positions[row] + 1 - begin;
    return n < 0 ? 0 : n < TILE ? n : TILE;
}

// The tile that begins at a position: rows that see all of it together, others one by one.
template <typename K, typename V>
void attend_tile(const Work& w, int64_t begin) {
    for (int64_t r = 0, end; r < w.n_rows; r = end) {
        const int64_t n = visible(w, r, begin);
        for (end = r + 1; n == TILE && end < w.n_rows && visible(w, end, begin) == n;) end++;
        if (n == 0) continue;
        const int64_t query = r * w.heads, n_x = (end - r) * w.heads;
        score<K, V>(w, query, n_x, n);
        for (int64_t i = query; i < query + n_x; i++) soften(w, i, n);
        add_values<K, V>(w, query, n_x, n);
    }
}

// Sums over the positions of a chunk.
template <typename K, typename V>
void attend(const Args& a, Work& w, int64_t begin, int64_t end) {
    const auto find_keys = [&](int64_t from) {
        const int64_t n = end - from < TILE ? end - from : TILE;
        const K** rows = static_cast<const K**>(w.next_k);
        find_rows(a.v[K_CACHE], w.table, w.kv_head, from, from + n, rows);
        w.n_next = n;
    };
    for (int64_t i = 0; i < w.n_queries(); i++) w.chunk.of(i).clear();
    find_keys(begin);
    for (; begin < end; begin += TILE) {
        const int64_t stop = begin + w.n_next;
        find_rows(a.v[V_CACHE], w.table, w.kv_head, begin, stop, static_cast<const V**>(w.v));
        void* k = w.k;
        w.k = w.next_k, w.next_k = k;
        find_keys(stop);
        attend_tile<K, V>(w, begin);
    }
}

void attend(const Args& a, Work& w, int64_t begin, int64_t end) {
    for_types(a, [&](auto k, auto v) { attend<decltype(k), decltype(v)>(a, w, begin, end); });
}

// The remainder rows from the i-th on, all before `end`, that are consecutive ones of a sequence
// and whose positions are cut into chunks of the same length.
Work work_of(const Args& a, const Split& s, int64_t i, int64_t end, int64_t head_part) {
    const int32_t *rows = a.step->remainder, *seq_starts = a.v[SEQ_STARTS].as<int32_t>();
    const int64_t part = head_part % s.parts.n_parts, chunks = max_chunks(a);
    const int64_t seq = sequence_of(seq_starts, a.rows(a.v[BLOCK_TABLES]), rows[i]);
    Work w{};
    w.table = block_table(a, seq);
    w.first_row = rows[i];
    w.positions = a.v[POSITIONS].as<int32_t>() + w.first_row;
    const int64_t length = chunk_length(w.positions[0], chunks);
    for (w.n_rows = 1; i + w.n_rows < end; w.n_rows++) {
        const int64_t row = rows[i + w.n_rows];
        if (row != w.first_row + w.n_rows || row >= seq_starts[seq + 1]) break;
        if (chunk_length(w.positions[w.n_rows], chunks) != length) break;
    }
    w.kv_head = head_part / s.parts.n_parts;
    w.first_head = s.parts.first(w.kv_head, part), w.heads = s.parts.size(part);
    place(a, w);
    load_queries(a, w);
    return w;
}

// One chunk of a row, if it has so many.
void run_chunk(const Args& a, const Split& s, int64_t i, int64_t chunk, int64_t head_part) {
    if (chunk >= n_chunks(a, a.step->remainder[i])) return;
    Work w = work_of(a, s, i, i + 1, head_part);
    const int64_t length = chunk_length(w.last_position(), max_chunks(a));
    const int64_t begin = chunk * length, stop = w.last_position() + 1;
    attend(a, w, begin, stop - begin < length ? stop : begin + length);
    for (int64_t h = 0; h < w.heads; h++) {
        const Sums from = w.chunk.of(h), to = partial(a, i, w.first_head + h, chunk, from.width);
        *to.top = *from.top, *to.total = *from.total;
        std::memcpy(to.acc, from.acc, 4 * static_cast<size_t>(from.width));
    }
}

// All chunks of rows that are cut alike.
void attend_all(const Args& a, Work& w) {
    const int64_t length = chunk_length(w.last_position(), max_chunks(a));
    const int64_t stop = w.last_position() + 1;
    for (int64_t i = 0; i < w.n_queries(); i++) w.row.of(i).clear();
    for (int64_t begin = 0; begin < stop; begin += length) {
        attend(a, w, begin, stop - begin < length ? stop : begin + length);
        for (int64_t i = 0; i < w.n_queries(); i++)
            if (begin <= w.positions[i / w.heads]) join(w.row.of(i), w.chunk.of(i));
    }
    for (int64_t i = 0; i < w.n_queries(); i++)
        store_result(a, w.first_row + i / w.heads, w.first_head + i % w.heads, w.row.of(i).acc,
                     w.row.total[i]);
}

void run_rows(const Args& a, const Split& s, int64_t group, int64_t head_part) {
    const int64_t begin = group * s.rows;
    const int64_t end = s.n_rows - begin < s.rows ? s.n_rows : begin + s.rows;
    for (int64_t i = begin, n; i < end; i += n) {
        Work w = work_of(a, s, i, end, head_part);
        n = w.n_rows;
        attend_all(a, w);
    }
}

// ATTENTION_JOIN: a task is a head of a row whose chunks were tasks of their own.
namespace joining {
int64_t n_tasks(const Args& a) {
    return has_partials(a) ? a.step->n_remainder * a.v[OUT].shape[1] : 0;
}

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t n_heads = a.v[OUT].shape[1], width = padded(a.v[OUT].shape[2]);
    float* acc = reinterpret_cast<float*>(a.scratch);
    for (int64_t task = begin; task < end; task++) {
        const int64_t i = task / n_heads, h = task % n_heads, row = a.step->remainder[i];
        float top, total;
        const Sums sums{&top, &total, acc, width};
        sums.clear();
        for (int64_t c = 0; c < n_chunks(a, row); c++) join(sums, partial(a, i, h, c, width));
        store_result(a, row, h, acc, total);
    }
}

}  // namespace joining

}  // namespace

int64_t n_row_tasks(const Args& a) { return Split(a).n_tasks(); }

void run_row_tasks(const Args& a, int64_t begin, int64_t end) {
    const Split s(a);
    const int64_t head_parts = s.parts.n_kv * s.parts.n_parts, groups = s.n_groups();
    for (int64_t task = begin; task < end; task++) {
        const int64_t head_part = task % head_parts, group = task / head_parts % groups;
        if (has_partials(a))
            run_chunk(a, s, group, task / head_parts / groups, head_part);
        else
            run_rows(a, s, group, head_part);
    }
}

}  // namespace gdn::attention_op

const gdn::Kernel gdn::attention_join = {"ATTENTION_JOIN", attention_op::joining::n_tasks,
                                         attention_op::joining::run};
