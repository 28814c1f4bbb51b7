// SORT_BY_EXPERT: the pairs (token, choice) by expert, and tiles of them.

#include "sort_by_expert.cuh"

// One block. Attributes: experts (as many as threads at most), rows of a tile.
KERNEL(sort_by_expert) {
    using namespace gdn;
    enum { ORDER, TILES, IDS };
    __shared__ int32_t next[THREADS_sort_by_expert];
    const View& ids = a.v[IDS];
    const auto id_of = [&](int64_t t, int u) {
        return ids.as<int32_t>()[t * ids.stride[0] + u * ids.stride[1]];
    };
    sort_by_expert(id_of, ids.shape[1], a.rows(ids), static_cast<int>(a.attr[0]),
                   static_cast<int>(a.attr[1]), a.v[ORDER], a.v[TILES], next, true);
}
