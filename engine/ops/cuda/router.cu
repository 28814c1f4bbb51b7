// ROUTER: the experts of a token and their weights, a warp for each row. For few tokens the last
// thread block also sorts their pairs by expert.
//
// Lane l has experts l, l + 32, ... Scores are compared as integers of the same order. 0 marks an
// expert that is absent or already chosen, so every choice is a valid expert even if logits are
// NaN.

#include "sort_by_expert.cuh"

namespace gdn {

// ORDER, TILES and COUNTERS are present where pairs are sorted. Attributes: n_used, gating, scale,
// eps, n_groups, n_groups_used, normalized.
enum { IDS, WEIGHTS, LOGITS, BIAS, ORDER, TILES, COUNTERS };
enum { SOFTMAX, SIGMOID };
enum { N_USED, GATING, SCALE, EPS, N_GROUPS, N_GROUPS_USED, NORMALIZED };

constexpr int ROWS = THREADS_router / 32;
static_assert(ROUTER_MAX_USED <= 32, "a lane has one expert that is used");
constexpr float LOWEST = -3.402823466e38f;
constexpr uint32_t NEVER = 0;

// Integers in the order of floats, above NEVER; NaN is as low as the lowest float.
DEVICE uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(fmaxf(x, LOWEST) + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The index of the highest of a warp's scores, the first of equal ones; marks it as taken.
template <int PER_LANE>
DEVICE int take_best(uint32_t (&scores)[PER_LANE]) {
    uint32_t best = scores[0];
    int where = 0;
#pragma unroll
    for (int i = 1; i < PER_LANE; i++)
        if (scores[i] > best) best = scores[i], where = i;
    const uint32_t lane = threadIdx.x % 32, index = where * 32 + lane;
    const uint32_t highest = warp_highest(best);
    const uint32_t taken = warp_lowest(best == highest ? index : 0xffffffffu);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (taken == i * 32 + lane) scores[i] = NEVER;
    return static_cast<int>(taken);
}

// p of a row of n logits.
template <int PER_LANE>
DEVICE void probabilities(float (&p)[PER_LANE], const float* logits, int n, bool softmax) {
    const int lane = threadIdx.x % 32;
    float highest = LOWEST, total = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int x = i * 32 + lane;
        p[i] = x < n ? load_published(logits + x) : LOWEST;
        highest = fmaxf(highest, p[i]);
    }
    if (softmax) highest = warp_max(highest);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const bool is_expert = i * 32 + lane < n;
        if (softmax)
            p[i] = is_expert ? exp_fast(p[i] - highest) : 0.0f;
        else
            // Not below -80, so that the sum of the smallest ones is not zero.
            p[i] = 1.0f / (1.0f + exp_fast(-(p[i] < -80.0f ? -80.0f : p[i])));
        total += p[i];
    }
    if (!softmax) return;
    const float scale = 1.0f / warp_sum(total);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) p[i] *= scale;
}

// Excludes experts outside of the best groups. A group's score is the sum of its two best.
// `shared` is of ROUTER_MAX_EXPERTS floats.
template <int PER_LANE>
DEVICE void keep_best_groups(uint32_t (&scores)[PER_LANE], const float (&values)[PER_LANE], int n,
                             int n_groups, int n_kept, float* shared) {
    const int lane = threadIdx.x % 32, size = n / n_groups;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) shared[i * 32 + lane] = values[i];
    sync_warp();
    uint32_t goodness[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int g = i * 32 + lane;
        float first = LOWEST, second = LOWEST;
        for (int k = 0; g < n_groups && k < size; k++) {
            const float v = shared[g * size + k];
            second = v > first ? first : v > second ? v : second;
            first = v > first ? v : first;
        }
        goodness[i] = g < n_groups ? ordered(first + second) : NEVER;
    }
    for (int u = 0; u < n_kept; u++) take_best(goodness);
    sync_warp();
    // A group that was not taken still has its score.
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) shared[i * 32 + lane] = goodness[i] == NEVER ? 1.0f : 0.0f;
    sync_warp();
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (i * 32 + lane < n && shared[(i * 32 + lane) / size] == 0.0f) scores[i] = NEVER;
    sync_warp();
}

// A warp's row of up to 32 · PER_LANE logits; its experts go to `ids`, too. `shared` is of as many
// floats.
template <int PER_LANE>
DEVICE void route(const Args& a, int t, float* shared, int32_t* ids, bool real) {
    const int lane = threadIdx.x % 32, n = a.v[LOGITS].shape[1], n_used = a.v[IDS].shape[1];
    const int n_groups = static_cast<int>(a.attr[N_GROUPS]);
    const float* bias = a.v[BIAS].as<float>();
    float p[PER_LANE], values[PER_LANE];
    uint32_t scores[PER_LANE];
    probabilities(p, a.v[LOGITS].row(t), n, a.attr[GATING] == SOFTMAX);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int x = i * 32 + lane;
        values[i] = x < n && bias ? p[i] + bias[x] : p[i];
        scores[i] = x < n ? ordered(values[i]) : NEVER;
    }
    if (n_groups > 1) {
        const int n_kept = static_cast<int>(a.attr[N_GROUPS_USED]);
        keep_best_groups(scores, values, n, n_groups, n_kept, shared);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) shared[i * 32 + lane] = p[i];
    sync_warp();
    // Lane u has the choice of number u.
    int id = 0;
    for (int u = 0; u < n_used; u++) {
        const int taken = take_best(scores);
        if (lane == u) id = taken;
    }
    const float mine = lane < n_used ? shared[id] : 0.0f;
    const float sum = warp_sum(mine), total = a.attr[NORMALIZED] != 0.0f ? sum + a.attr[EPS] : 1.0f;
    if (lane >= n_used) return;
    ids[lane] = id;
    if (!real) return;
    a.v[IDS].as<int32_t>()[static_cast<int64_t>(t) * a.v[IDS].stride[0] + lane] = id;
    a.v[WEIGHTS].row(t)[lane] = mine / total * a.attr[SCALE];
}

}  // namespace gdn

// Grid: rows / 8.
REHEARSED_KERNEL(router, 1, 1) {
    using namespace gdn;
    if (!rehearsal) wait_for_inputs();
    __shared__ float shared[ROWS][ROUTER_MAX_EXPERTS];
    __shared__ int32_t ids[ROWS][ROUTER_MAX_USED], next[ROUTER_MAX_EXPERTS], n_before;
    const int warp = threadIdx.x / 32, t = blockIdx.x * ROWS + warp;
    const int n_rows = a.rows(a.v[LOGITS]), n_experts = a.v[LOGITS].shape[1];
    const bool real = rehearsal == 0;
    if (t < n_rows)
        n_experts <= 256 ? route<8>(a, t, shared[warp], ids[warp], real)
                         : route<ROUTER_MAX_EXPERTS / 32>(a, t, shared[warp], ids[warp], real);
    const View &order = a.v[ORDER], &tiles = a.v[TILES], &all = a.v[IDS];
    if (!tiles || !(real || gridDim.x == 1)) return;
    const auto sort = [&](auto id_of) {
        sort_by_expert(id_of, all.shape[1], n_rows, n_experts, EXPERT_TILE_ROWS, order, tiles, next,
                       real);
    };
    if (gridDim.x == 1) {
        __syncthreads();
        const auto id_of = [&](int row, int i) { return ids[row][i]; };
        n_rows == 1 ? list_experts(id_of, all.shape[1], order, tiles, real) : sort(id_of);
        return;
    }
    publish();
    __syncthreads();
    int32_t* counter = a.v[COUNTERS].as<int32_t>();
    if (threadIdx.x == 0) n_before = add_atomic(counter, 1);
    __syncthreads();
    if (n_before != static_cast<int32_t>(gridDim.x) - 1) return;
    if (threadIdx.x == 0) *counter = 0;
    sort([&](int row, int i) {
        return load_published(all.as<int32_t>() + row * all.stride[0] + i);
    });
}
