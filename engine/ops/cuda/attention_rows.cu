// ATTENTION of any head size and type of cache in float32, a thread block for each row and head.
// Its warps take positions in turn, and their sums are joined at the end.

#include "attention.cuh"

namespace gdn::attention_op {

constexpr int WARPS = THREADS_attention_rows_64 / 32, AT_ONCE = 4;

DEVICE float load(const View& cache, int64_t i) {
    return cache.dtype == F16 ? half_to_float(cache.as<uint16_t>()[i]) : cache.as<float>()[i];
}

// Heads of up to 32 · PER.
template <int PER>
DEVICE void run_row(const Args& a) {
    __shared__ float accs[WARPS][32 * PER], ms[WARPS], ls[WARPS];
    const View &q = a.v[Q], &k = a.v[K_CACHE], &v = a.v[V_CACHE];
    const int h = blockIdx.x, t = blockIdx.y, dk = q.shape[2], dv = v.shape[3];
    if (t >= a.live[N_TOKENS]) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int kv_head = h / (q.shape[1] / k.shape[1]), block_size = k.shape[2];
    const int32_t seq = sequence_of(a.v[SEQ_STARTS].as<int32_t>(), a.live[N_SEQS], t);
    const int32_t* table = block_table(a, seq);
    const int n = a.v[POSITIONS].as<int32_t>()[t] + 1;

    float query[PER], acc[PER], m = -infinity(), l = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int at = i * 32 + lane;
        query[i] = at < dk ? q.row(t, h)[at] * a.attr[0] : 0.0f;
        acc[i] = 0.0f;
    }
    for (int first = warp * AT_ONCE; first < n; first += WARPS * AT_ONCE) {
        float s[AT_ONCE];
        int64_t values[AT_ONCE];
        float most = m;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int position = first + j < n ? first + j : n - 1;
            const int64_t block = table[position / block_size], row = position % block_size;
            const int64_t keys = block * k.stride[0] + kv_head * k.stride[1] + row * k.stride[2];
            values[j] = block * v.stride[0] + kv_head * v.stride[1] + row * v.stride[2];
            s[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < PER; i++) {
                const int at = i * 32 + lane;
                if (at < dk) s[j] = fmaf(query[i], load(k, keys + at), s[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            s[j] = warp_sum(s[j]);
            if (first + j >= n) s[j] = -infinity();
            most = fmaxf(most, s[j]);
        }
        const float factor = exp_fast(m - most);
        m = most, l *= factor;
#pragma unroll
        for (int i = 0; i < PER; i++) acc[i] *= factor;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const float weight = exp_fast(s[j] - m);
            l += weight;
#pragma unroll
            for (int i = 0; i < PER; i++) {
                const int at = i * 32 + lane;
                if (at < dv) acc[i] = fmaf(weight, load(v, values[j] + at), acc[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PER; i++) accs[warp][i * 32 + lane] = acc[i];
    if (lane == 0) ms[warp] = m, ls[warp] = l;
    __syncthreads();
    for (int d = threadIdx.x; d < dv; d += WARPS * 32) {
        // The first warp has position 0: its m is finite.
        float sum_m = ms[0], sum_l = ls[0], sum = accs[0][d];
        for (int w = 1; w < WARPS; w++) {
            const Factors f(sum_m, ms[w]);
            sum = f.join(sum, accs[w][d]), sum_l = f.join(sum_l, ls[w]);
            sum_m = fmaxf(sum_m, ms[w]);
        }
        store_result(a, t, h, d, sum, sum_l);
    }
}

}  // namespace gdn::attention_op

// Grid: (heads, rows).
KERNEL(attention_rows_64) { gdn::attention_op::run_row<2>(a); }
KERNEL(attention_rows_256) { gdn::attention_op::run_row<8>(a); }
KERNEL(attention_rows_576) { gdn::attention_op::run_row<18>(a); }
KERNEL(attention_rows_1024) { gdn::attention_op::run_row<32>(a); }
