// The chunk form of GATED_DELTA_NET, second kernel: from chunk to chunk (see
// gated_delta_net_chunk.cuh). A thread block has COLUMNS value columns of one head of one sequence.
// Their state is in registers, transposed as it is stored, and as float16 in shared memory.

#include "gated_delta_net_chunk.cuh"

namespace gdn::delta {

// Shared memory: STAGES chunks' W, q, k and B, the state and D as float16.
template <int WIDTH_, int COLUMNS_, int STAGES_>
struct Chunks {
    static constexpr int WIDTH = WIDTH_, COLUMNS = COLUMNS_, STAGES = STAGES_;
    static constexpr int STEP = WIDTH + 8, B_STEP = CHUNK + 8, D_STEP = COLUMNS + 8;
    static constexpr int MATRIX = CHUNK * STEP, STAGE = 3 * MATRIX + CHUNK * B_STEP;
    // 8 warps: 16 rows of tokens and half of the columns each; or 16 columns and some key rows.
    static constexpr int N_D = COLUMNS / 16, M_STATE = COLUMNS / 16;
    static constexpr int KEYS = WIDTH * M_STATE / 8, N_STATE = KEYS / 8;
    static constexpr int SHARED = 2 * (STAGES * STAGE + COLUMNS * STEP + CHUNK * D_STEP);
    static_assert(STAGES * STAGE * 2 >= COLUMNS * WIDTH * 4, "the last state as float32 fits");

    half* memory;
    int stage;

    DEVICE half* w() const { return memory + stage * STAGE; }
    DEVICE half* q() const { return w() + MATRIX; }
    DEVICE half* k() const { return w() + 2 * MATRIX; }
    DEVICE half* b() const { return w() + 3 * MATRIX; }
    DEVICE half* state() const { return memory + STAGES * STAGE; }  // [COLUMNS, STEP]
    DEVICE half* d() const { return state() + COLUMNS * STEP; }     // [CHUNK, D_STEP]

    DEVICE void load(const Prepared<WIDTH>& from) const {
        for (int i = threadIdx.x; i < 3 * MATRIX_PARTS; i += CHUNK_THREADS) {
            const int row = i / (WIDTH / 8), part = i % (WIDTH / 8) * 8;
            copy_async(w() + row * STEP + part, from.w() + i * 8);
        }
        for (int i = threadIdx.x; i < CHUNK * CHUNK / 8; i += CHUNK_THREADS) {
            const int row = i / (CHUNK / 8), part = i % (CHUNK / 8) * 8;
            copy_async(b() + row * B_STEP + part, from.b() + i * 8);
        }
        fence_copies();
    }
    static constexpr int MATRIX_PARTS = CHUNK * WIDTH / 8;
};

template <int N>
DEVICE void multiply_two(float (&x)[N][4], int j, const uint32_t (&left)[4],
                         const uint32_t (&right)[4]) {
    multiply_half(x[j], left, right[0], right[1]);
    multiply_half(x[j + 1], left, right[2], right[3]);
}

// D and the part of the outputs that reads the state before the chunk.
template <typename C>
DEVICE void read_state(const C& chunk, float (&d)[C::N_D][4], float (&o)[C::N_D][4], int row,
                       int column) {
#pragma unroll
    for (int j = 0; j < C::N_D; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) d[j][i] = o[j][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < C::WIDTH; i += 16) {
        uint32_t w[4], q[4], right[4];
        load_left<C::STEP>(w, chunk.w(), row, i);
        load_left<C::STEP>(q, chunk.q(), row, i);
#pragma unroll
        for (int j = 0; j < C::N_D; j += 2) {
            load_right<C::STEP, true>(right, chunk.state(), i, column + 8 * j);
            multiply_two(d, j, w, right);
            multiply_two(o, j, q, right);
        }
    }
}

// S <- decayed S + Dᵀ k, by columns.
template <typename C>
DEVICE void update_state(const C& chunk, float (&s)[C::N_STATE][4],
                         const float2 (&decay)[C::N_STATE], int column, int key) {
#pragma unroll
    for (int j = 0; j < C::N_STATE; j++) {
        s[j][0] *= decay[j].x, s[j][1] *= decay[j].y;
        s[j][2] *= decay[j].x, s[j][3] *= decay[j].y;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i += 16) {
        uint32_t left[4], right[4];
        load_left<C::D_STEP, true>(left, chunk.d(), column, i);
#pragma unroll
        for (int j = 0; j < C::N_STATE; j += 2) {
            load_right<C::STEP>(right, chunk.k(), i, key + 8 * j);
            multiply_two(s, j, left, right);
        }
    }
}

template <typename C, bool KDA>
DEVICE void run_chunks(const Args& a, char* memory) {
    constexpr int WIDTH = C::WIDTH, LANES = WIDTH / PER;
    const Place place(a, blockIdx.z, blockIdx.y);
    if (place.n == 0) return;
    const int n = place.n_grouped(a), dk = a.v[Q].shape[2], dv = a.v[V].shape[2];
    const int first = blockIdx.x * C::COLUMNS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Of the warp: tokens and columns of D and outputs; columns and key rows of the state.
    const int row = warp % 4 * 16, column = warp / 4 * (C::COLUMNS / 2);
    const int state_column = warp % C::M_STATE * 16, key = warp / C::M_STATE * C::KEYS;
    C chunk{reinterpret_cast<half*>(memory), 0};
    const int slot = first_slot(place.begin, place.seq), n_chunks = (n + CHUNK - 1) / CHUNK;

    if (n_chunks) chunk.load(Prepared<WIDTH>(a, slot, place.head));
    float s[C::N_STATE][4]{};
    if (place.src >= 0) {
#pragma unroll
        for (int j = 0; j < C::N_STATE; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int c = first + state_column + lane / 4 + i / 2 * 8;
                const int at = key + 8 * j + lane % 4 * 2 + i % 2;
                if (c < dv && at < dk) s[j][i] = place.column(a, place.src, c)[at];
            }
        }
    }
    auto keep_state = [&] {
        for_pairs(s, state_column, key, [&](int c, int at, float x, float y) {
            *reinterpret_cast<uint32_t*>(chunk.state() + c * C::STEP + at) = pack_half(x, y);
        });
    };
    keep_state();
    for (int i = 0; i < n_chunks; i++) {
        const Prepared<WIDTH> prepared(a, slot + i, place.head), next(a, slot + i + 1, place.head);
        // Loads that are needed later start before the wait.
        float2 u[C::N_D][2], decay[C::N_STATE];
#pragma unroll
        for (int j = 0; j < C::N_D; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++)
                u[j][h] = *reinterpret_cast<const float2*>(
                    prepared.u() + (row + lane / 4 + 8 * h) * prepared.n_columns + first + column +
                    8 * j + lane % 4 * 2);
        }
#pragma unroll
        for (int j = 0; j < C::N_STATE; j++)
            decay[j] =
                *reinterpret_cast<const float2*>(prepared.decay() + key + 8 * j + lane % 4 * 2);
        wait_copies<0>();
        __syncthreads();
        if (C::STAGES == 2 && i + 1 < n_chunks) C{chunk.memory, 1 - chunk.stage}.load(next);
        float d[C::N_D][4], o[C::N_D][4];
        read_state(chunk, d, o, row, column);
#pragma unroll
        for (int j = 0; j < C::N_D; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                half* to = chunk.d() + (row + lane / 4 + 8 * h) * C::D_STEP + column + 8 * j +
                           lane % 4 * 2;
                *reinterpret_cast<uint32_t*>(to) =
                    pack_half(u[j][h].x - d[j][2 * h], u[j][h].y - d[j][2 * h + 1]);
            }
        }
        __syncthreads();
        update_state(chunk, s, decay, state_column, key);
        keep_state();
        for (int k = 0; k <= row; k += 16) {
            uint32_t left[4], right[4];
            load_left<C::B_STEP>(left, chunk.b(), row, k);
#pragma unroll
            for (int j = 0; j < C::N_D; j += 2) {
                load_right<C::D_STEP>(right, chunk.d(), k, column + 8 * j);
                multiply_two(o, j, left, right);
            }
        }
        for_pairs(o, row, first + column, [&](int t, int c, float x, float y) {
            if (i * CHUNK + t >= n) return;
            float* to = a.v[OUT].row(place.begin + i * CHUNK + t, place.head);
            if (c < dv) to[c] = x;
            if (c + 1 < dv) to[c + 1] = y;
        });
        if (C::STAGES == 1 && i + 1 < n_chunks) {
            __syncthreads();
            chunk.load(next);
        } else if (C::STAGES == 2) {
            chunk.stage = 1 - chunk.stage;
        }
    }

    // The state goes to the layout of the scan, which computes the remaining tokens.
    __syncthreads();
    float* states = reinterpret_cast<float*>(memory);
    for_pairs(s, state_column, key, [&](int c, int at, float x, float y) {
        states[c * WIDTH + at] = x, states[c * WIDTH + at + 1] = y;
    });
    __syncthreads();
    for (int i = threadIdx.x / LANES; i < C::COLUMNS; i += CHUNK_THREADS / LANES) {
        const bool live = first + i < dv;
        float x[PER];
        load_part<LANES>(x, states + i * WIDTH, WIDTH, threadIdx.x % LANES, true);
        scan<LANES, KDA>(x, a, place, n, live ? first + i : dv - 1, threadIdx.x % LANES, live);
    }
}

}  // namespace gdn::delta

// Grid: (columns / COLUMNS, value heads, sequences).
#define CHUNKS_OF(NAME, WIDTH, COLUMNS, STAGES, KDA)                              \
    KERNEL(NAME##_chunks_##WIDTH##_##COLUMNS) {                                   \
        using Memory = gdn::delta::Chunks<WIDTH, COLUMNS, STAGES>;                \
        KERNEL_SHARED(NAME##_chunks_##WIDTH##_##COLUMNS, memory, Memory::SHARED); \
        gdn::delta::run_chunks<Memory, KDA>(a, memory);                           \
    }

CHUNKS_OF(delta_net, 64, 32, 2, false)
CHUNKS_OF(delta_net, 64, 64, 2, false)
CHUNKS_OF(delta_net, 128, 32, 2, false)
CHUNKS_OF(delta_net, 128, 64, 2, false)
CHUNKS_OF(delta_net, 256, 32, 1, false)
CHUNKS_OF(delta_net_kda, 64, 32, 2, true)
CHUNKS_OF(delta_net_kda, 64, 64, 2, true)
CHUNKS_OF(delta_net_kda, 128, 32, 2, true)
CHUNKS_OF(delta_net_kda, 128, 64, 2, true)
CHUNKS_OF(delta_net_kda, 256, 32, 1, true)
