#include "byte_tiles.h"

#include <algorithm>

#include "k_block.h"

// Without int8 tiles this serves tests only: not inlined, it compiles in seconds.
#if defined(__AMX_INT8__)
#define TILE_INLINE GDN_INLINE
#else
#define TILE_INLINE inline __attribute__((noinline))
#endif

namespace gdn {
namespace {

// Tiles of dot products of a batch.
constexpr int BATCH = 4;

// The fewest rows for which tiles are faster than rows one by one (Xeon, measured).
template <typename F>
int64_t min_rows(F) {
    return F::GROUPS == 2 ? 7 : 5;
}
template <Layout L>
int64_t min_rows(Plain<L>) {
    return TILE + 1;
}

// n ≤ 16 rows; a tile has n_tile rows, of which those behind the n-th repeat it.
template <typename F>
TileRows gather_rows(F, const Row* rows, int64_t n, int64_t n_tile, int64_t n_in, char* room) {
    const int64_t n_k_blocks = n_in / K_BLOCK;
    auto* q = reinterpret_cast<int8_t*>(room);
    auto* scale = reinterpret_cast<float*>(room + n_in * SIDE);
    float* sum = scale + n_k_blocks * SIDE;
    // Rows at equal distances are tiles where they lie.
    const int64_t distance = n > 1 ? rows[1].q - rows[0].q : 0;
    bool is_even = n == n_tile;
    for (int64_t t = 1; t < n; t++) is_even &= rows[t].q - rows[t - 1].q == distance;
    for (int64_t t = 0; t < n_tile; t++) {
        const Row& row = rows[std::min(t, n - 1)];
        for (int64_t i = 0; i < n_k_blocks; i++) {
            const int64_t at = i * SIDE + t;
            if (!is_even) std::memcpy(q + at * K_BLOCK, row.q + i * K_BLOCK, K_BLOCK);
            scale[at] = row.scale[i];
            if constexpr (F::HAS_MIN)
                for_constants<0, F::GROUPS>([&](auto g) {
                    sum[(i * F::GROUPS + g) * SIDE + t] = scaled_sum<F, g>(row, i);
                });
        }
    }
    if (is_even) return {rows[0].q, distance, K_BLOCK, n, scale, sum};
    return {q, K_BLOCK, SIDE * K_BLOCK, n, scale, sum};
}
template <Layout L>
TileRows gather_rows(Plain<L>, const Row*, int64_t, int64_t, int64_t, char*) {
    return {};
}

// Values of a k-block as int8, words one after another, which are the rows of B tiles.
template <typename F>
TILE_INLINE void expand_bytes(const uint8_t* k_block, int8_t* to) {
    typedef int8_t bytes __attribute__((vector_size(4 * W)));
    prefetch_ahead<F::K_BLOCK_BYTES>(k_block);
    for_constants<0, WORDS>([&](auto i) __attribute__((always_inline)) {
        for (int p = 0; p < PARTS; p++) {
            const auto v = reinterpret_cast<bytes>(word<F, i>(k_block + F::HEAD_BYTES, p));
            const bytes signed_v = v - static_cast<int8_t>(F::ZERO);
            std::memcpy(to + i * WORD_BYTES + p * 4 * W, &signed_v, sizeof(bytes));
        }
    });
}

#if defined(__AMX_INT8__)

// Sums of 16 rows stay in registers.
constexpr int UNROLL = 16;

// Sums are in tile T, which is one of BATCH, from `dot_tile` to `store_dots`.
struct DotTiles {};

// Columns [n, GROUP] of x, which lie `at` bytes behind its first one, times w [GROUP, 16].
template <int GROUP, int T>
TILE_INLINE void dot_tile(const TileRows& x, int64_t at, const int8_t* w, DotTiles&) {
    constexpr int A = BATCH + T % 2, B = BATCH + 2 + T % 2;
    clear_tile<T>();
    load_tile<A>(x.q + at, x.row_bytes);
    load_tile<B>(w, WORD_BYTES);
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(T), "i"(A), "i"(B));
}
template <int T>
TILE_INLINE void store_dots(int32_t* to, const DotTiles&) {
    store_tile<T>(to, WORD_BYTES);
}

template <typename F>
void begin_tiles(F, int64_t n) {
    TileConfig config;
    for (int i = 0; i < BATCH + 2; i++) config.rows[i] = static_cast<uint8_t>(n);
    for (int i = 0; i < 2; i++) {
        config.row_bytes[BATCH + i] = F::GROUP;
        config.rows[BATCH + 2 + i] = F::GROUP / 4;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
}
template <Layout L>
void begin_tiles(Plain<L>, int64_t) {}

#else

constexpr int UNROLL = 1;

struct DotTiles {
    int32_t sums[BATCH][SIDE * PANEL] = {};
};

template <int GROUP, int T>
TILE_INLINE void dot_tile(const TileRows& x, int64_t at, const int8_t* w, DotTiles& tiles) {
    for (int t = 0; t < x.n; t++)
        for (int r = 0; r < PANEL; r++) {
            int32_t sum = 0;
            for (int c = 0; c < GROUP; c++)
                sum += x.q[at + t * x.row_bytes + c] * w[c / 4 * WORD_BYTES + 4 * r + c % 4];
            tiles.sums[T][t * PANEL + r] = sum;
        }
}
template <int T>
TILE_INLINE void store_dots(int32_t* to, const DotTiles& tiles) {
    std::memcpy(to, tiles.sums[T], sizeof(tiles.sums[T]));
}

template <typename F>
void begin_tiles(F, int64_t) {}

#endif

// A panel's products with up to N rows; of further rows it computes arbitrary numbers. A tile's load
// waits until earlier stores are in the cache, so tiles go in batches: all are multiplied; meanwhile
// the next batch's values are made and the last one's sums scaled; then all are stored.
template <typename F, int N>
class PanelProduct {
   public:
    PanelProduct(const uint8_t* panel, int64_t n_in, const TileRows& x)
        : panel_(panel), x_(x), n_k_blocks_(n_in / K_BLOCK) {}

    void run() {
        std::memset(total_, 0, sizeof(total_));
        expand_batch(0);
        dot_batch(0);
        expand_batch(PER_BATCH);
        store_batch();
        for (int64_t i = 0; i < n_k_blocks_; i += SUPER_K_BLOCKS) add_block(i);
    }

    const float* total(int64_t t) const { return total_[t]; }

   private:
    static constexpr int PER_BATCH = BATCH / F::GROUPS;

    int8_t* words_of(int64_t i) { return words_[i % (2 * PER_BATCH)]; }

    TILE_INLINE void expand_batch(int64_t first) {
        const int64_t end = std::min(n_k_blocks_, first + PER_BATCH);
        for (int64_t i = first; i < end; i++) expand_bytes<F>(F::k_block(panel_, i), words_of(i));
    }

    // Past the last k-block, tiles hold arbitrary values, and their sums are not read.
    TILE_INLINE void dot_batch(int64_t first) {
        if (first >= n_k_blocks_) return;
        for_constants<0, BATCH>([&](auto t) __attribute__((always_inline)) {
            constexpr int R = t / F::GROUPS, G = t % F::GROUPS;
            if (first + R >= n_k_blocks_) return;
            dot_tile<F::GROUP, t>(x_, (first + R) * x_.k_block_bytes + G * F::GROUP,
                                  words_of(first + R) + G * F::GROUP * PANEL, tiles_);
        });
    }

    TILE_INLINE void store_batch() {
        for_constants<0, BATCH>(
            [&](auto t) __attribute__((always_inline)) { store_dots<t>(dots_[t], tiles_); });
    }

    // Adds the sums of 8 k-blocks, whose first batch's dot products are done.
    TILE_INLINE void add_block(int64_t first) {
        vf acc[N][PARTS];
#pragma GCC unroll UNROLL
        for (int t = 0; t < N; t++)
            for (int p = 0; p < PARTS; p++)
                acc[t][p] = F::IS_SUPER ? vf{} : load(total_[t] + p * W);
        for_constants<0, SUPER_K_BLOCKS / PER_BATCH>([&](auto b) __attribute__((always_inline)) {
            const int64_t i = first + b * PER_BATCH;
            if (i >= n_k_blocks_) return;
            dot_batch(i + PER_BATCH);
            expand_batch(i + 2 * PER_BATCH);
            for_constants<0, PER_BATCH>([&](auto r) __attribute__((always_inline)) {
                if (i + r >= n_k_blocks_) return;
                for_constants<0, F::GROUPS>([&](auto g) __attribute__((always_inline)) {
                    add_dots<r * F::GROUPS + g, g>(i + r, acc);
                });
                if constexpr (!F::IS_SUPER && F::HAS_MIN) subtract_mins(i + r, acc);
            });
            store_batch();
        });
        for (int p = 0; p < PARTS; p++) end_block(first, p, acc);
    }

    TILE_INLINE void end_block(int64_t first, int p, const vf (*acc)[PARTS]) {
        const uint8_t* block = F::super_block(panel_, first);
        const vf scale = super_of<F>(block, p);
#pragma GCC unroll UNROLL
        for (int t = 0; t < N; t++) {
            vf total = acc[t][p];
            if constexpr (F::IS_SUPER) total = fma(total, scale, load(total_[t] + p * W));
            store(total_[t] + p * W, total);
        }
        if constexpr (F::IS_SUPER && F::HAS_MIN) add_mins(first, p, super_of<F>(block, PARTS + p));
    }

    // acc [16] += a tile of dot products, scaled.
    template <int T, int G>
    TILE_INLINE void add_dots(int64_t i, vf (*acc)[PARTS]) {
#pragma GCC unroll UNROLL
        for (int p = 0; p < PARTS; p++) {
            const vf scale = scale_of<F, G>(F::k_block(panel_, i), p);
#pragma GCC unroll UNROLL
            for (int t = 0; t < N; t++)
                add_scaled(acc[t][p], load_as<vi>(dots_[T] + t * PANEL + p * W), scale,
                           x_.scale[i * SIDE + t]);
        }
    }

    // acc [16] -= a k-block's mins.
    TILE_INLINE void subtract_mins(int64_t i, vf (*acc)[PARTS]) {
        for_constants<0, F::GROUPS>([&](auto g) __attribute__((always_inline)) {
#pragma GCC unroll UNROLL
            for (int p = 0; p < PARTS; p++) {
                const vf min = min_of<F, g>(F::k_block(panel_, i), p);
#pragma GCC unroll UNROLL
                for (int t = 0; t < N; t++)
                    subtract_min(acc[t][p], min, x_.sum[(i * F::GROUPS + g) * SIDE + t]);
            }
        });
    }

    // The mins of a super-block.
    TILE_INLINE void add_mins(int64_t first, int p, vf scale) {
        vf mins[SUPER_K_BLOCKS * F::GROUPS];
#pragma GCC unroll UNROLL
        for (int r = 0; r < SUPER_K_BLOCKS; r++)
            for_constants<0, F::GROUPS>([&](auto g) __attribute__((always_inline)) {
                mins[r * F::GROUPS + g] = min_of<F, g>(F::k_block(panel_, first + r), p);
            });
        const float* sums = x_.sum + first * F::GROUPS * SIDE;
        for (int t = 0; t < N; t++) {
            vf acc{};
#pragma GCC unroll UNROLL
            for (int i = 0; i < SUPER_K_BLOCKS * F::GROUPS; i++)
                subtract_min(acc, mins[i], sums[i * SIDE + t]);
            store(total_[t] + p * W, fma(acc, scale, load(total_[t] + p * W)));
        }
    }

    const uint8_t* panel_;
    const TileRows x_;
    const int64_t n_k_blocks_;
    DotTiles tiles_{};
    alignas(64) int32_t dots_[BATCH][SIDE * PANEL];
    alignas(64) int8_t words_[2 * PER_BATCH][WORDS * WORD_BYTES];
    alignas(64) float total_[N][PANEL];
};

template <int N, typename F>
void panel_product(F, const uint8_t* panel, int64_t n_in, const TileRows& x, float (*out)[PANEL]) {
    PanelProduct<F, N> product(panel, n_in, x);
    product.run();
    for (int64_t t = 0; t < x.n; t++) std::memcpy(out[t], product.total(t), sizeof(*out));
}
template <int, Layout L>
void panel_product(Plain<L>, const uint8_t*, int64_t, const TileRows&, float (*)[PANEL]) {}

}  // namespace

PreparedRows::PreparedRows(int32_t layout, int64_t n_in, const Row* rows, int64_t n, bool by_tiles,
                           char* room)
    : n_in_(n_in), n_(n), rows_(rows) {
    by_tiles &= std::none_of(rows, rows + n, [](const Row& row) { return row.is_fine; });
    if (!by_tiles) return;
    const int64_t rest = n % SIDE, n_tile = std::min<int64_t>(n, SIDE);
    with_format(layout, [&](auto f) {
        n_tiled_ = rest < min_rows(f) ? n - rest : n;
        if (!n_tiled_) return;
        for (int64_t i = 0; i < n_tiled_; i += SIDE)
            tiles_[i / SIDE] = gather_rows(f, rows + i, std::min<int64_t>(SIDE, n_tiled_ - i),
                                           n_tile, n_in, room + i / SIDE * gathered_bytes(n_in));
        begin_tiles(f, n_tile);
    });
}

PreparedRows::~PreparedRows() {
    if (n_tiled_) begin_matrix_products();
}

void PreparedRows::multiply(int32_t layout, const uint8_t* panel, float (*out)[PANEL]) const {
    for (int64_t i = 0; i < n_tiled_; i += SIDE)
        with_format(layout, [&](auto f) {
            const TileRows& x = tiles_[i / SIDE];
            n_tiled_ <= SIDE / 2 ? panel_product<SIDE / 2>(f, panel, n_in_, x, out + i)
                                 : panel_product<SIDE>(f, panel, n_in_, x, out + i);
        });
    if (n_tiled_ < n_)
        gdn::multiply(layout, panel, n_in_, rows_ + n_tiled_, n_ - n_tiled_, out + n_tiled_);
}

}  // namespace gdn
