// SSM_CONV: causal depthwise convolution and SiLU, a thread for each channel of a run of rows.
//
// Runs are equal parts of the batch's rows, regardless of sequences. A sequence may write the slot
// that it reads, so one thread owns its state: the thread with the sequence's first row computes
// all rows that read the history, even past the end of its run, then writes per-token states and
// the last state. Other threads skip those rows.

#include "ssm_conv.cuh"

namespace gdn {

// Rows [begin, end) of the batch.
template <int N_TAPS>
DEVICE void run(const Args& a, const Channel& channel, int begin, int end) {
    const int32_t* starts = a.v[SEQ_STARTS].as<int32_t>();
    const int n_taps = N_TAPS ? N_TAPS : a.v[WEIGHT].shape[1];
    const int n_seqs = a.rows(a.v[STATE_SRC]);
    float taps[N_TAPS ? N_TAPS : CONV_MAX_TAPS];
    for (int j = 0; j < n_taps; j++) taps[j] = channel.weight[j];
    // In a decode step row t belongs to sequence t: no search.
    const bool alone = begin < n_seqs && starts[begin] == begin && starts[begin + 1] > begin;
    for (int s = alone ? begin : sequence_of(starts, n_seqs, begin); s < n_seqs; s++) {
        const int first = starts[s], n = starts[s + 1] - first;
        if (first >= end) break;
        if (n <= 0) continue;
        const int32_t from_slot = a.v[STATE_SRC].as<int32_t>()[s];
        const int32_t to_slot = a.v[STATE_DST].as<int32_t>()[s];
        const Window<N_TAPS> window{a, channel, taps, n_taps, first, n, from_slot, to_slot};
        const int history = n_taps - 1 < n ? n_taps - 1 : n;  // Rows that read it.
        const bool mine = first >= begin;
        int from = begin - first, to = end - first < n ? end - first : n;
        if (mine) {
            from = 0;
            if (to < history) to = history;
        } else if (from < history) {
            from = history;
        }
        if (from < to) window.convolve(from, to);
        if (mine) window.save_all(s);
    }
}

}  // namespace gdn

// Grid: (channels / threads, runs).
KERNEL(ssm_conv) {
    using namespace gdn;
    const int n_rows = a.live[N_TOKENS], n_runs = gridDim.y;
    const int per_run = (n_rows + n_runs - 1) / n_runs;
    const int begin = blockIdx.y * per_run;
    const int end = begin + per_run < n_rows ? begin + per_run : n_rows;
    Channel channel;
    if (begin >= end || !find_channel(a, blockIdx.x * blockDim.x + threadIdx.x, channel)) return;
    a.v[WEIGHT].shape[1] == 4 ? run<4>(a, channel, begin, end) : run<0>(a, channel, begin, end);
}
