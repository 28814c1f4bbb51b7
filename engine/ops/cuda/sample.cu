// Samples a token from each row of logits: top-k, top-p, min-p, temperature, by probability.
//
// A logit and its id make one key. No two keys are equal; the highest key is that of the highest
// logit, of equal logits that of the lowest id. A thread block takes the best keys of a segment of
// the vocabulary, then one thread block for each row takes the best of these.

#include "kernel.cuh"

namespace gdn {

constexpr int THREADS = THREADS_sample_segments, PER_SEGMENT = SEGMENT / THREADS;
constexpr int PER_JOIN = MAX_SEGMENTS * MAX_TOP_K / THREADS;
static_assert(THREADS == THREADS_sample_rows && SEGMENT % THREADS == 0, "take_best has both");

// How a row is sampled, as in engine/backends/cuda/sampling.py. With `feed` >= 0 the row's input
// token is the one that row `feed` got in the step before.
struct SampleSpec {
    float temperature, top_p, log_min_p, uniform;
    int32_t top_k, feed, n_banned, is_masked;
    int32_t banned[MAX_BANNED];
};
static_assert(sizeof(SampleSpec) == SAMPLE_SPEC_BYTES, "as in sampling.py");

// The upper half of a key grows with the logit. Its highest value marks a logit that is not finite,
// its lowest the absence of one.
constexpr uint32_t NOT_FINITE = 0xffffffffu, NONE = 0;

DEVICE uint64_t key_of(uint32_t order, int id) {
    return static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(id);
}
DEVICE uint32_t order_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
DEVICE int id_of(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

DEVICE uint64_t key_of_logit(float x, int id) {
    // -0 is 0.
    const uint32_t bits = __float_as_uint(x + 0.0f);
    if ((bits & 0x7f800000u) == 0x7f800000u) return key_of(NOT_FINITE, id);
    return key_of(bits >> 31 ? ~bits : bits | 0x80000000u, id);
}
DEVICE float logit_of(uint64_t key) {
    const uint32_t order = order_of(key);
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

DEVICE uint64_t highest(uint64_t a, uint64_t b) { return a > b ? a : b; }

// The `k` highest of a thread block's keys, descending, in `best`. Each thread has N keys.
template <int N>
DEVICE void take_best(const uint64_t (&keys)[N], int k, uint64_t* best) {
    __shared__ uint64_t maxima[THREADS];
    // All keys of a thread may be among the best, but at most k threads have any of them.
    __shared__ uint64_t kept[N * MAX_TOP_K];
    __shared__ uint64_t floor;
    __shared__ int32_t n_kept;
    const int t = threadIdx.x;
    uint64_t mine = keys[0];
    for (int i = 1; i < N; i++) mine = highest(mine, keys[i]);
    if (k == 1) {
        for (int mask = 16; mask > 0; mask /= 2) mine = highest(mine, shuffle_xor(mine, mask));
        if (t % 32 == 0) maxima[t / 32] = mine;
        __syncthreads();
        for (int i = 0; i < THREADS / 32; i++) mine = highest(mine, maxima[i]);
        if (t == 0) best[0] = mine;
        __syncthreads();
        return;
    }
    maxima[t] = mine;
    if (t == 0) n_kept = 0;
    __syncthreads();
    int rank = 0;
    for (int i = 0; i < THREADS; i++) rank += maxima[i] > mine;
    // The k-th highest maximum: at least k keys are not below it.
    if (rank == k - 1) floor = mine;
    __syncthreads();
    for (int i = 0; i < N; i++) {
        if (keys[i] >= floor) kept[add_atomic(&n_kept, 1)] = keys[i];
    }
    __syncthreads();
    for (int i = t; i < n_kept; i += THREADS) {
        const uint64_t key = kept[i];
        int above = 0;
        for (int j = 0; j < n_kept; j++) above += kept[j] > key;
        if (above < k) best[above] = key;
    }
    __syncthreads();
}

// The index of the sampled key among `n` descending keys; `weights` are proportional to their
// probabilities, `tempered` to those at the temperature.
DEVICE int drawn(const SampleSpec& draw, const uint64_t* keys, int n, const float* weights,
                 const float* tempered) {
    const float top_p = draw.top_p, least = logit_of(keys[0]) + draw.log_min_p;
    if (top_p < 1.0f) {
        float total = 0.0f, sum = 0.0f;
        for (int i = 0; i < n; i++) total += weights[i];
        int i = 0;
        while (i < n - 1 && (sum += weights[i]) < top_p * total) i++;
        n = i + 1;
    }
    float total = 0.0f, sum = 0.0f;
    int n_likely = 0;
    while (n_likely < n && logit_of(keys[n_likely]) >= least) total += tempered[n_likely++];
    const float end = draw.uniform * total;
    int i = 0;
    while (i < n_likely - 1 && (sum += tempered[i]) <= end) i++;
    return i;
}

}  // namespace gdn

// Sets the input tokens of rows that continue a row of the step before. Grid: (rows / threads).
KERNEL(feed_tokens) {
    using namespace gdn;
    enum { TOKENS, DRAWN, DRAWS };
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.live[N_OUTPUTS]) return;
    const int from = a.v[DRAWS].as<SampleSpec>()[row].feed;
    if (from < 0) return;
    const int token = a.v[DRAWN].as<int32_t>()[from];
    a.v[TOKENS].as<int32_t>()[row] = token < 0 ? 0 : token;
}

// The best keys of each segment; of a row that is masked, of the tokens whose bits are set. Grid:
// (segments, rows).
KERNEL(sample_segments) {
    using namespace gdn;
    enum { BEST, LOGITS, DRAWS, MASKS };
    __shared__ uint64_t best[MAX_TOP_K];
    const int row = blockIdx.y, first = blockIdx.x * SEGMENT, n_vocab = a.v[LOGITS].shape[1];
    if (row >= a.live[N_OUTPUTS]) return;
    const SampleSpec& draw = a.v[DRAWS].as<SampleSpec>()[row];
    const float* logits = a.v[LOGITS].row(row);
    uint64_t keys[PER_SEGMENT];
    for (int i = 0; i < PER_SEGMENT; i++) {
        const int id = first + i * THREADS + threadIdx.x;
        keys[i] = id < n_vocab ? key_of_logit(logits[id], id) : key_of(NONE, id);
    }
    if (draw.is_masked) {
        const int32_t* mask = a.v[MASKS].as<int32_t>() + row * a.v[MASKS].shape[1];
        for (int i = 0; i < PER_SEGMENT; i++) {
            const int id = first + i * THREADS + threadIdx.x;
            const bool is_allowed = id < n_vocab && (mask[id / 32] >> id % 32 & 1);
            if (!is_allowed && order_of(keys[i]) != NOT_FINITE) keys[i] = key_of(NONE, id);
        }
    }
    for (int b = 0; b < draw.n_banned; b++) {
        const int id = draw.banned[b];
        for (int i = 0; i < PER_SEGMENT; i++) {
            const bool is_banned = id_of(keys[i]) == id && order_of(keys[i]) != NOT_FINITE;
            if (is_banned) keys[i] = key_of(NONE, id);
        }
    }
    take_best(keys, draw.top_k, best);
    uint64_t* out = a.v[BEST].as<uint64_t>() + (row * MAX_SEGMENTS + blockIdx.x) * MAX_TOP_K;
    if (threadIdx.x < draw.top_k) out[threadIdx.x] = best[threadIdx.x];
}

// A row's token; -1 if a logit is not finite, or none may come. Grid: (rows).
KERNEL(sample_rows) {
    using namespace gdn;
    enum { DRAWN, BEST, DRAWS };
    __shared__ uint64_t best[MAX_TOP_K];
    __shared__ float weights[MAX_TOP_K], tempered[MAX_TOP_K];
    const int row = blockIdx.x, n_segments = static_cast<int>(a.attr[0]);
    if (row >= a.live[N_OUTPUTS]) return;
    const SampleSpec& draw = a.v[DRAWS].as<SampleSpec>()[row];
    const uint64_t* found = a.v[BEST].as<uint64_t>() + row * MAX_SEGMENTS * MAX_TOP_K;
    const int k = draw.top_k, t = threadIdx.x;
    uint64_t keys[PER_JOIN];
    for (int i = 0; i < PER_JOIN; i++) {
        const int at = i * THREADS + t;
        // Absent keys get ids that no logit has.
        keys[i] = at < n_segments * k ? found[at / k * MAX_TOP_K + at % k] : key_of(NONE, -2 - at);
    }
    take_best(keys, k, best);
    if (t < k && order_of(best[t]) != NONE) {
        const float distance = logit_of(best[t]) - logit_of(best[0]);
        weights[t] = expf(distance);
        tempered[t] = expf(distance / draw.temperature);
    }
    __syncthreads();
    if (t > 0) return;
    int n = 0;
    while (n < k && order_of(best[n]) != NONE) n++;
    int32_t& id = a.v[DRAWN].as<int32_t>()[row];
    id = -1;
    if (n > 0 && order_of(best[0]) != NOT_FINITE) {
        id = id_of(best[drawn(draw, best, n, weights, tempered)]);
    }
}
