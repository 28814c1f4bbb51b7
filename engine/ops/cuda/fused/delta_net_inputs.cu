// SSM_CONV, L2_NORM and (where it comes with them) GDN_GATE of steps that have one row of each
// sequence: a thread block convolves CHANNELS channels of a row, then its warps scale the heads
// among them; the last thread blocks compute the gates. Results are those of the ops' own kernels.

#include "gdn_gate.cuh"
#include "head_norms.cuh"
#include "ssm_conv.cuh"

namespace gdn {

// After SSM_CONV's views. QK: the heads of OUT that are scaled. Attributes: eps, and lower_bound
// of GDN_GATE.
enum { NORMED = X + 2 * N_PARTS, QK, G, STEP, ALPHA, BETA, A, DT };
constexpr int CHANNELS = THREADS_delta_net_inputs;

template <int N_TAPS>
DEVICE void convolve_row(const Args& a, const Channel& channel, int t) {
    const int n_taps = N_TAPS ? N_TAPS : a.v[WEIGHT].shape[1];
    float taps[N_TAPS ? N_TAPS : CONV_MAX_TAPS];
    for (int j = 0; j < n_taps; j++) taps[j] = channel.weight[j];
    const int32_t from_slot = a.v[STATE_SRC].as<int32_t>()[t];
    const int32_t to_slot = a.v[STATE_DST].as<int32_t>()[t];
    const Window<N_TAPS> window{a, channel, taps, n_taps, t, 1, from_slot, to_slot};
    window.convolve(0, 1);
    window.save_all(t);
}

template <int V>
DEVICE void normalize(const Args& a, int t, int h) {
    l2_norm_head<V>(a.v[QK].row(t, h), a.v[NORMED].row(t, h), a.v[QK].shape[2], a.attr[0]);
}

}  // namespace gdn

// Grid: (channels / 128 + gates' entries / 128, rows).
KERNEL(delta_net_inputs) {
    using namespace gdn;
    const int t = blockIdx.y, n_blocks = (a.v[OUT].shape[1] + CHANNELS - 1) / CHANNELS;
    if (t >= a.rows(a.v[OUT])) return;
    const int block = blockIdx.x;
    if (block >= n_blocks) {
        const int c = (block - n_blocks) * CHANNELS + threadIdx.x;
        const GateViews gates{a.v[G], a.v[STEP], a.v[ALPHA], a.v[BETA], a.v[A], a.v[DT]};
        if (c < gate_entries(gates.alpha)) gate_entry(gates, a.attr[1], t, c);
        return;
    }
    Channel channel;
    if (find_channel(a, block * CHANNELS + threadIdx.x, channel))
        a.v[WEIGHT].shape[1] == 4 ? convolve_row<4>(a, channel, t) : convolve_row<0>(a, channel, t);
    __syncthreads();
    const View& qk = a.v[QK];
    const int heads = CHANNELS / qk.shape[2];
    const bool fours = in_fours(qk) && in_fours(a.v[NORMED]);
    for (int i = threadIdx.x / 32; i < heads; i += CHANNELS / 32) {
        const int h = block * heads + i;
        if (h < qk.shape[1]) fours ? normalize<4>(a, t, h) : normalize<1>(a, t, h);
    }
}
