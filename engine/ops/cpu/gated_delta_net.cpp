// GATED_DELTA_NET: a task is some value columns of one head of one sequence, or a whole head of a
// sequence that has row tiles, which are computed in chunk form.
//
// The scan of columns, row by row:
//
// Per token: S *= e^g; d = beta (v - Sᵀk); S += k dᵀ; o = Sᵀq · scale. Columns of S are independent
// and a task's columns stay in the cache over all tokens. Each token takes one pass over them: it
// updates S with d, and computes from the new S the output and the next token's prediction
// Sᵀ(e^g' k'). Only a sequence's first token needs another pass for its prediction. A column's sums
// always run in the same order, so that cutting a sequence elsewhere changes no bit.

#include "gated_delta_net.h"

#include "kernels.h"

namespace gdn {
namespace {

// Attributes: head_map (0: tiled, 1: grouped), scale, algorithm (1: scan, else by the rows).
enum { OUT, Q, K, V, G, BETA, STATE, SEQ_STARTS, STATE_SRC, STATE_DST, SNAPSHOT_DST };

// Columns that share the loads of k, q and the decay. Their scalars are the lanes of a `v4`.
constexpr int GROUP = 4;

// Floats of state in a task's columns. Larger ones read the tokens' rows less often, which measures
// better than a state that leaves half of a 32 KiB L1 cache free. With a decay for each key row
// (KDA) each task also computes all exponentials anew.
constexpr int64_t STATE_FLOATS = 8192, STATE_FLOATS_KDA = 16384;
// Tokens between the request for a token's rows and their use: long prompts' rows lie in the L3
// cache or beyond, each on a page of its own.
constexpr int64_t AHEAD = 4;

template <int C>
GDN_INLINE v4 load_columns(const float* p) {
    v4 v{};
    std::memcpy(&v, p, 4 * C);
    return v;
}

// A token's operands for a head's columns. With one decay per head, `key` is k and predictions are
// multiplied by the decay afterwards; with KDA `key` is e^g k.
struct Token {
    const float *q, *k, *key, *decays;
    float decay;
};

template <bool KDA>
GDN_INLINE Token token(const Head& h, int64_t t, float* scratch) {
    const float *q = h.q + t * h.q_step, *k = h.k + t * h.k_step, *g = h.g + t * h.g_step;
    if constexpr (!KDA) return {q, k, k, nullptr, exp(splat(*g))[0]};
    // Two tokens are in use at a time.
    float *decays = scratch + (t % 2) * 2 * MAX_HEAD, *key = decays + MAX_HEAD;
    for_lanes(h.dk, [&](int64_t i, int w) {
        const vf e = exp(load_part(g + i, w));
        store_part(decays + i, e, w);
        store_part(key + i, e * load_part(k + i, w), w);
    });
    return {q, k, key, decays, 1.0f};
}

GDN_INLINE void prefetch_token(const Head& h, int64_t t, int64_t first, int64_t last) {
    if (t >= h.n) return;
    for (int64_t i = 0; i < h.dk; i += 16) {
        __builtin_prefetch(h.k + t * h.k_step + i);
        __builtin_prefetch(h.q + t * h.q_step + i);
    }
    for (int64_t i = first; i < last; i += 16) {
        __builtin_prefetch(h.v + t * h.v_step + i);
        __builtin_prefetch(h.out + t * h.out_step + i, 1);
    }
}

// Sᵀ key of C columns.
template <int C>
GDN_INLINE v4 predict(const float* state, const float* key, int64_t dk) {
    vf p[GROUP]{};
    for_lanes(dk, [&](int64_t i, int w) __attribute__((always_inline)) {
        const vf x = load_part(key + i, w);
        for (int c = 0; c < C; c++) p[c] = fma(load_part(state + c * dk + i, w), x, p[c]);
    });
    return sums(p[0], p[1], p[2], p[3]);
}

// Updates C columns by a token's d, and computes their outputs and the next token's predictions.
// The LAST token has no next one. Most often it is the only token of a decode step, which waits for
// memory: it prefetches the next columns while it computes these.
template <int C, bool KDA, bool LAST>
GDN_INLINE void update(const float* from, float* to, const Token& now, const float* next_key, v4 d,
                       int64_t dk, v4* output, v4* prediction) {
    vf o[GROUP]{}, p[GROUP]{}, delta[GROUP];
    for (int c = 0; c < C; c++) delta[c] = splat(d[c]);
    const vf decay = splat(now.decay);
    for_lanes(dk, [&](int64_t i, int w) __attribute__((always_inline)) {
        const vf k = load_part(now.k + i, w), q = load_part(now.q + i, w);
        const vf key = LAST ? vf{} : load_part(next_key + i, w);
        const vf e = KDA ? load_part(now.decays + i, w) : decay;
        for (int c = 0; c < C; c++) {
            const vf s = fma(k, delta[c], e * load_part(from + c * dk + i, w));
            if constexpr (LAST) __builtin_prefetch(from + (c + GROUP) * dk + i);
            store_part(to + c * dk + i, s, w);
            o[c] = fma(s, q, o[c]);
            if constexpr (!LAST) p[c] = fma(s, key, p[c]);
        }
    });
    *output = sums(o[0], o[1], o[2], o[3]);
    if constexpr (!LAST) *prediction = sums(p[0], p[1], p[2], p[3]);
}

// One token of C columns; `p` are their predictions, which the first token computes itself.
template <int C, bool KDA>
GDN_INLINE void step(const Head& h, int64_t t, int64_t column, const Token& now,
                     const float* next_key, const float* from, float* to, float* p) {
    v4 prediction = t ? load_columns<C>(p) : predict<C>(from, now.key, h.dk), output;
    const v4 v = load_columns<C>(h.v + t * h.v_step + column);
    const v4 d = h.beta[t * h.beta_step] * fma(v4{} - now.decay, prediction, v);
    if (t + 1 < h.n) {
        update<C, KDA, false>(from, to, now, next_key, d, h.dk, &output, &prediction);
        std::memcpy(p, &prediction, 4 * C);
    } else {
        update<C, KDA, true>(from, to, now, nullptr, d, h.dk, &output, &prediction);
    }
    output *= h.scale;
    std::memcpy(h.out + t * h.out_step + column, &output, 4 * C);
}

// Where a task's state comes from (null: zeros) and where it stays; `offset`: its place in a slot.
struct Slots {
    const float* src;
    float* dst;
    const View* state;
    const int32_t* snapshots;
    int64_t n_snapshots, offset;
};

// Copies the state if a per-token state is wanted where `left` tokens, with this one, remain.
void snapshot(const Slots& slots, int64_t left, int64_t size) {
    if (left > slots.n_snapshots) return;
    const int32_t slot = slots.snapshots[slots.n_snapshots - left];
    if (slot < 0) return;
    float* to = slots.state->row(slot) + slots.offset;
    if (to != slots.dst) std::memcpy(to, slots.dst, 4 * static_cast<size_t>(size));
}

template <bool KDA>
void scan(const Head& h, const Slots& slots, int64_t first, int64_t last, float* scratch) {
    const int64_t n = last - first, size = n * h.dk;
    float predictions[MAX_HEAD];
    if (!slots.src) std::memset(slots.dst, 0, 4 * static_cast<size_t>(size));
    const float* from = slots.src ? slots.src : slots.dst;
    Token now = token<KDA>(h, 0, scratch);
    for (int64_t t = 0; t < h.n; t++) {
        prefetch_token(h, t + AHEAD, first, last);
        const Token next = t + 1 < h.n ? token<KDA>(h, t + 1, scratch) : now;
        const float* in = from;
        float* out = slots.dst;
        int64_t c = 0;
        for (; c + GROUP <= n; c += GROUP, in += GROUP * h.dk, out += GROUP * h.dk)
            step<GROUP, KDA>(h, t, first + c, now, next.key, in, out, predictions + c);
        for (; c < n; c++, in += h.dk, out += h.dk)
            step<1, KDA>(h, t, first + c, now, next.key, in, out, predictions + c);
        from = slots.dst;
        now = next;
        snapshot(slots, h.n - t, size);
    }
}

int64_t task_columns(const Args& a) {
    return (a.v[G].rank == 3 ? STATE_FLOATS_KDA : STATE_FLOATS) / a.v[STATE].shape[3] / GROUP *
           GROUP;
}

int64_t column_tasks(const Args& a) { return (a.v[STATE].shape[2] - 1) / task_columns(a) + 1; }

int64_t n_tasks(const Args& a) {
    return a.rows(a.v[STATE_SRC]) * a.v[STATE].shape[1] * column_tasks(a);
}

Head head_of(const Args& a, int64_t s, int64_t head) {
    const View* v = a.v;
    const int32_t* starts = v[SEQ_STARTS].as<int32_t>();
    const int64_t row = starts[s], n = starts[s + 1] - row, key_heads = v[Q].shape[1];
    const int64_t key_head = a.attr[0] == 0 ? head % key_heads : head / (v[V].shape[1] / key_heads);
    return {v[Q].row(row, key_head),
            v[K].row(row, key_head),
            v[V].row(row, head),
            v[G].row(row, head),
            v[BETA].row(row, head),
            v[OUT].row(row, head),
            v[Q].stride[0],
            v[K].stride[0],
            v[V].stride[0],
            v[G].stride[0],
            v[BETA].stride[0],
            v[OUT].stride[0],
            n,
            v[STATE].shape[3],
            v[STATE].shape[2],
            v[G].rank == 3 ? v[STATE].shape[3] : 1,
            static_cast<float>(a.attr[1])};
}

// Scratch: two tokens' rows, a state that is not kept, and the scratch of `chunk`.
constexpr int64_t ROW_BYTES = 4 * MAX_HEAD * 4, STATE_BYTES = MAX_HEAD * MAX_HEAD * 4;
static_assert(ROW_BYTES + STATE_BYTES + CHUNK_BYTES <= SCRATCH_BYTES);

// The state of columns from `first` on.
Slots slots_of(const Args& a, int64_t s, int64_t head, int64_t first) {
    const View &state = a.v[STATE], &wanted = a.v[SNAPSHOT_DST];
    const int64_t offset = head * state.stride[1] + first * state.shape[3];
    const int32_t src = a.v[STATE_SRC].as<int32_t>()[s], dst = a.v[STATE_DST].as<int32_t>()[s];
    float* spare = reinterpret_cast<float*>(a.scratch + ROW_BYTES) + first * state.shape[3];
    return {src < 0 ? nullptr : state.row(src) + offset,
            dst < 0 ? spare : state.row(dst) + offset,
            &state,
            wanted.as<int32_t>() + s * wanted.stride[0],
            wanted.shape[1],
            offset};
}

void scan_columns(const Args& a, const Head& h, const Slots& slots, int64_t first) {
    if (h.n <= 0) return;
    const int64_t end = first + task_columns(a), last = end < h.dv ? end : h.dv;
    float* scratch = reinterpret_cast<float*>(a.scratch);
    (a.v[G].rank == 3 ? scan<true> : scan<false>)(h, slots, first, last, scratch);
}

// The row tiles of a sequence: from `begin` to `end` - 1.
struct RowTiles {
    const RowTile *begin, *end;
};

RowTiles tiles_of(const Args& a, int64_t s) {
    const View& state = a.v[STATE];
    if (a.attr[2] == 1 || !has_chunk_form(state.shape[3], state.shape[2]))
        return {nullptr, nullptr};
    const int32_t* starts = a.v[SEQ_STARTS].as<int32_t>();
    const RowTile *begin = a.step->tiles, *last = begin + a.step->n_tiles;
    while (begin < last && begin->row < starts[s]) begin++;
    const RowTile* end = begin;
    while (end < last && end->row < starts[s + 1]) end++;
    return {begin, end};
}

// A head of a sequence with row tiles, run after run of rows.
class HeadRuns {
   public:
    HeadRuns(const Args& a, int64_t s, int64_t head)
        : a_(a), s_(s), head_(head), h_(head_of(a, s, head)) {}

    void run(RowTiles tiles) {
        const int32_t start = a_.v[SEQ_STARTS].as<int32_t>()[s_];
        for (const RowTile* tile = tiles.begin; tile < tiles.end; tile++) {
            if (h_.dg > 1 && tile->n < LEAST_ROWS_KDA) continue;
            // Chunk form makes no state between two rows of a row tile: a scan does.
            if (wants_snapshot_within(tile->row - start, tile->n)) continue;
            scan_rows(tile->row - start);
            chunk_rows(tile->n);
        }
        scan_rows(h_.n);
    }

   private:
    // The state and the snapshots of the rows before `end`, for columns from `first` on.
    Slots slots(int64_t end, int64_t first) const {
        Slots slots = slots_of(a_, s_, head_, first);
        if (row_ > 0) slots.src = slots.dst;
        const int64_t after = h_.n - end;
        slots.n_snapshots = slots.n_snapshots > after ? slots.n_snapshots - after : 0;
        return slots;
    }

    bool wants_snapshot_within(int64_t row, int64_t n) const {
        const Slots of_rows = slots(row + n, 0);
        const int64_t wanted = of_rows.n_snapshots;
        for (int64_t i = wanted > n ? wanted - n : 0; i < wanted - 1; i++)
            if (of_rows.snapshots[i] >= 0) return true;
        return false;
    }

    void scan_rows(int64_t end) {
        if (end == row_) return;
        const Head part = h_.part(row_, end - row_);
        for (int64_t first = 0; first < h_.dv; first += task_columns(a_))
            scan_columns(a_, part, slots(end, first), first);
        row_ = end;
    }

    void chunk_rows(int64_t n) {
        const Slots slots = this->slots(row_ + n, 0);
        const int64_t size = h_.dv * h_.dk, after = h_.n - row_ - n;
        if (!slots.src) std::memset(slots.dst, 0, 4 * static_cast<size_t>(size));
        chunk(h_.part(row_, n), slots.src ? slots.src : slots.dst, slots.dst,
              after < MAX_TILE_ROWS ? after : MAX_TILE_ROWS, a_.scratch + ROW_BYTES + STATE_BYTES);
        snapshot(slots, 1, size);
        row_ += n;
    }

    const Args& a_;
    const int64_t s_, head_;
    const Head h_;
    int64_t row_ = 0;
};

void run_task(const Args& a, int64_t s, int64_t head, int64_t first) {
    const RowTiles tiles = tiles_of(a, s);
    if (tiles.begin == tiles.end)
        scan_columns(a, head_of(a, s, head), slots_of(a, s, head, first), first);
    else if (first == 0)  // The task of a head's first columns is the whole head's.
        HeadRuns(a, s, head).run(tiles);
}

void run(const Args& a, int64_t begin, int64_t end) {
    const int64_t heads = a.v[STATE].shape[1];
    const int64_t n_parts = column_tasks(a), columns = task_columns(a);
    for (int64_t task = begin; task < end; task++)
        run_task(a, task / (heads * n_parts), task / n_parts % heads, task % n_parts * columns);
}

}  // namespace

const Kernel gated_delta_net = {"GATED_DELTA_NET", n_tasks, run};

}  // namespace gdn
