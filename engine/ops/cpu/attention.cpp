// ATTENTION: softmax over a sequence's cached positions, taken tile after tile (online softmax).
//
// A task is a key head, up to MAX_HEADS of its query heads, and one row or, of long prompts, a few
// rows, so that each key and value is loaded once for up to MAX_QUERIES queries. Tiles of positions
// begin at multiples of TILE, and a row sees in a tile only what is visible to it. Its result has
// therefore the same bits whatever rows and heads it shares a task with.

#include "kernels.h"
#include "paged.h"
#include "row_products.h"

namespace gdn {

namespace {

// Attribute: scale.
enum { OUT, Q, K_CACHE, V_CACHE, GATE, POSITIONS, SEQ_STARTS, BLOCK_TABLES };

constexpr int64_t TILE = 64;          // Positions.
constexpr int64_t MAX_HEADS = 8;      // Query heads of a task: MLA has many for its one key head.
constexpr int64_t MAX_QUERIES = 16;   // Rows times heads of a task: they fit the nearest cache.
constexpr int64_t MANY_ROWS = 32;     // From here on there are tasks enough for every thread.
constexpr int64_t STRIP = 4;          // Keys that are converted at once.
constexpr int64_t CACHE_LINE = 64;    // Bytes.

// How an instruction is cut into tasks.
struct Split {
    int64_t n_rows, n_kv, group, parts, heads, rows;

    explicit Split(const Args& a)
        : n_rows(a.rows(a.v[Q])),
          n_kv(a.v[K_CACHE].shape[1]),
          group(a.v[Q].shape[1] / n_kv),
          parts((group + MAX_HEADS - 1) / MAX_HEADS),
          heads((group + parts - 1) / parts),
          rows(n_rows < MANY_ROWS ? 1 : MAX_QUERIES / heads) {}

    int64_t n_tasks() const { return (n_rows + rows - 1) / rows * n_kv * parts; }
};

// Consecutive rows of one sequence, some query heads of one key head; all of it in the scratch.
// Query r · heads + h is head h of row r.
struct Work {
    const int32_t *table, *positions;
    int64_t first_row, n_rows, kv_head, first_head, heads, size, v_size, width, v_width;
    float *q, *acc;      // [MAX_QUERIES, width], [MAX_QUERIES, v_width]
    float *scores;       // [MAX_QUERIES, TILE]
    float *top, *total;  // [MAX_QUERIES]: the running maximum, and the sum of exponentials.
    float *pack;         // Converted keys or values.
    void *k, *v;         // [TILE] pointers to a tile's rows of the caches.
};

int64_t padded(int64_t size) { return (size + W - 1) / W * W; }

void place(Work& w, char* scratch) {
    w.width = padded(w.size), w.v_width = padded(w.v_size);
    constexpr int64_t pointers = TILE * sizeof(void*);
    w.k = scratch, w.v = scratch + pointers;
    w.top = reinterpret_cast<float*>(scratch + 2 * pointers);
    w.total = w.top + MAX_QUERIES, w.scores = w.total + MAX_QUERIES;
    w.q = w.scores + MAX_QUERIES * TILE;
    w.acc = w.q + MAX_QUERIES * w.width, w.pack = w.acc + MAX_QUERIES * w.v_width;
}

void load_queries(const Args& a, Work& w) {
    const View& q = a.v[Q];
    const float scale = static_cast<float>(a.attr[0]);
    for (int64_t i = 0; i < w.n_rows * w.heads; i++) {
        const float* x = q.row(w.first_row + i / w.heads, w.first_head + i % w.heads);
        float* y = w.q + i * w.width;
        for_lanes(w.size, [&](int64_t d, int n) { store(y + d, load_part(x + d, n) * scale); });
        std::memset(w.acc + i * w.v_width, 0, 4 * static_cast<size_t>(w.v_width));
        w.top[i] = -__builtin_inff(), w.total[i] = 0;
    }
}

// Pointers to the rows of some positions.
template <typename T>
void find_rows(const View& cache, const Work& w, int64_t begin, int64_t end, void* pointers) {
    const T** rows = static_cast<const T**>(pointers);
    const int64_t block_size = cache.shape[2];
    while (begin < end) {
        const int64_t block = begin / block_size, row = begin % block_size;
        const int64_t stop = end - begin < block_size - row ? end - begin : block_size - row;
        const char* p = cache_row(cache, w.table[block], w.kv_head, row);
        for (int64_t i = 0; i < stop; i++)
            *rows++ = reinterpret_cast<const T*>(p) + i * cache.stride[2];
        begin += stop;
    }
}

// Turns n scores into exponentials, and scales what was summed up to now to the new maximum. Not
// inlined, so that no multiplication here is fused with the additions that follow.
__attribute__((noinline)) void soften(const Work& w, int64_t query, int64_t n) {
    float* scores = w.scores + query * TILE;
    for (int64_t i = n; i < TILE; i++) scores[i] = -__builtin_inff();
    vf tops = load(scores);
    for (int64_t i = W; i < TILE; i += W) tops = max(tops, load(scores + i));
    const float before = w.top[query], tile_top = max_lane(tops);
    const float top = before > tile_top ? before : tile_top;
    vf totals{};
    for (int64_t i = 0; i < TILE; i += W) {
        const vf e = exp(load(scores + i) - top);
        store(scores + i, e);
        totals += e;
    }
    if (top != before) {
        const float shrink = exp(splat(before - top))[0];
        float* acc = w.acc + query * w.v_width;
        for (int64_t d = 0; d < w.v_width; d += W) store(acc + d, load(acc + d) * shrink);
        w.total[query] *= shrink;
        w.top[query] = top;
    }
    w.total[query] += sum(totals);
}

template <typename T>
void convert(const T* const* rows, int64_t n_rows, int64_t column, int64_t size, float* y,
             int64_t y_stride) {
    for (int64_t j = 0; j < n_rows; j++)
        for_lanes(size, [&](int64_t d, int n) {
            store(y + j * y_stride + d, load_part(rows[j] + column + d, n));
        });
}

// Scores of n_x queries with a tile's first n keys. The values are prefetched meanwhile, as they
// will be read column by column; the keys, read row by row, need no help.
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
        for (int64_t j = 0; j < m; j++)
            for (int64_t d = 0; d < w.v_size; d += CACHE_LINE / sizeof(V))
                __builtin_prefetch(values[p + j] + d);
        if (n_x > 4 && sizeof(K) == 2) {
            convert(keys + p, m, 0, w.size, w.pack, w.width);
            dots(q, w.width, n_x, packed, m, w.size, y, TILE);
        } else {
            dots(q, w.width, n_x, keys + p, m, w.size, y, TILE);
        }
    }
}

// Adds a tile's first n values, weighted, to the results of n_x queries.
template <typename T>
void add_values(const Work& w, int64_t query, int64_t n_x, int64_t n) {
    const T* const* values = static_cast<const T**>(w.v);
    const float* weights = w.scores + query * TILE;
    const float* packed[TILE];
    for (int64_t j = 0; j < TILE; j++) packed[j] = w.pack + j * COLUMNS;
    for (int64_t d = 0; d < w.v_size; d += COLUMNS) {
        const int c = static_cast<int>(w.v_size - d < COLUMNS ? w.v_size - d : COLUMNS);
        float* y = w.acc + query * w.v_width + d;
        if (n_x > 4) {
            convert(values, n, d, c, w.pack, COLUMNS);
            add_columns(weights, TILE, n_x, packed, n, 0, c, y, w.v_width);
        } else {
            add_columns(weights, TILE, n_x, values, n, d, c, y, w.v_width);
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
        add_values<V>(w, query, n_x, n);
    }
}

template <typename K, typename V>
void attend(const Args& a, Work& w) {
    int64_t stop = 0;
    for (int64_t r = 0; r < w.n_rows; r++)
        if (stop <= w.positions[r]) stop = w.positions[r] + 1;
    for (int64_t begin = 0; begin < stop; begin += TILE) {
        const int64_t end = stop - begin < TILE ? stop : begin + TILE;
        find_rows<K>(a.v[K_CACHE], w, begin, end, w.k);
        find_rows<V>(a.v[V_CACHE], w, begin, end, w.v);
        attend_tile<K, V>(w, begin);
    }
}

template <typename K>
void attend_keys(const Args& a, Work& w) {
    a.v[V_CACHE].dtype == F16 ? attend<K, uint16_t>(a, w) : attend<K, float>(a, w);
}

void store_result(const Args& a, const Work& w) {
    const View &out = a.v[OUT], &gate = a.v[GATE];
    for (int64_t i = 0; i < w.n_rows * w.heads; i++) {
        const int64_t t = w.first_row + i / w.heads, h = w.first_head + i % w.heads;
        const float scale = 1.0f / w.total[i];
        const float* acc = w.acc + i * w.v_width;
        float* y = out.row(t, h);
        for_lanes(w.v_size, [&](int64_t d, int n) {
            vf v = load(acc + d) * scale;
            if (gate) v *= sigmoid(load_part(gate.row(t, h) + d, n));
            store_part(y + d, v, n);
        });
    }
}

// A task's rows, sequence by sequence.
void run_task(const Args& a, const Split& s, int64_t task) {
    const int64_t part = task % s.parts, kv_head = task / s.parts % s.n_kv;
    const int64_t begin = task / s.parts / s.n_kv * s.rows;
    const int64_t end = s.n_rows - begin < s.rows ? s.n_rows : begin + s.rows;
    const int32_t* seq_starts = a.v[SEQ_STARTS].as<int32_t>();
    const View& tables = a.v[BLOCK_TABLES];
    Work w{};
    w.kv_head = kv_head;
    w.first_head = kv_head * s.group + part * s.heads;
    w.heads = s.group - part * s.heads < s.heads ? s.group - part * s.heads : s.heads;
    w.size = a.v[Q].shape[2], w.v_size = a.v[OUT].shape[2];
    place(w, a.scratch);
    for (int64_t t = begin; t < end; t += w.n_rows) {
        const int64_t seq = sequence_of(seq_starts, a.rows(tables), t);
        w.table = tables.as<int32_t>() + seq * tables.stride[0];
        w.positions = a.v[POSITIONS].as<int32_t>() + t;
        w.first_row = t;
        w.n_rows = (seq_starts[seq + 1] < end ? seq_starts[seq + 1] : end) - t;
        load_queries(a, w);
        a.v[K_CACHE].dtype == F16 ? attend_keys<uint16_t>(a, w) : attend_keys<float>(a, w);
        store_result(a, w);
    }
}

void run(const Args& a, int64_t begin, int64_t end) {
    const Split split(a);
    for (int64_t task = begin; task < end; task++) run_task(a, split, task);
}

}  // namespace

const Kernel attention = {"ATTENTION", [](const Args& a) { return Split(a).n_tasks(); }, run};

}  // namespace gdn
