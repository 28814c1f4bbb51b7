// Rows of floats, one or four at a time: four where addresses are multiples of 16 bytes.
#pragma once

#include "kernel.cuh"

namespace gdn {

template <int V>
struct alignas(4 * V) Floats {
    float v[V];
};

template <int V>
DEVICE Floats<V> load(const float* p) {
    return *reinterpret_cast<const Floats<V>*>(p);
}
template <int V>
DEVICE void store(float* p, Floats<V> x) {
    *reinterpret_cast<Floats<V>*>(p) = x;
}

// Whether all rows of a view can be taken four floats at a time; an absent one doesn't matter.
DEVICE bool in_fours(const View& view) {
    if (!view) return true;
    int32_t bits = view.shape[view.rank - 1];
    for (int axis = 0; axis < view.rank - 1; axis++) bits |= view.stride[axis];
    return bits % 4 == 0 && reinterpret_cast<uint64_t>(view.data) % 16 == 0;
}

template <int V>
DEVICE float squares(Floats<V> x) {
    float total = 0.0f;
    for (int i = 0; i < V; i++) total = fmaf(x.v[i], x.v[i], total);
    return total;
}

}  // namespace gdn
