// SORT_BY_EXPERT: the pairs (token, choice) by expert, and tiles of them.

#include "sort_by_expert.cuh"

// One block. Attributes: experts (as many as threads at most), rows of a tile.
KERNEL(sort_by_expert) {
    using namespace gdn;
    enum { ORDER, TILES, IDS };
    __shared__ int32_t next[THREADS_sort_by_expert];
    sort_by_expert(a.v[IDS], a.rows(a.v[IDS]), static_cast<int>(a.attr[0]),
                   static_cast<int>(a.attr[1]), a.v[ORDER], a.v[TILES], next);
}
