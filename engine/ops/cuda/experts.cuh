// Products of experts with tiles of up to EXPERT_TILE_ROWS of their rows, as SORT_BY_EXPERT lists
// them. A row's products depend neither on the tile's other rows nor on its place among them.
#pragma once

#include "mul_mat.cuh"
#include "staged.cuh"

namespace gdn {

// Attributes: PANELS of a thread block; SLOT_BYTES and SLOTS of a warp's ring; BATCH_BYTES of its rows.
// A kernel's own ones follow.
enum ExpertAttribute { PANELS, SLOT_BYTES, SLOTS, BATCH_BYTES, OWN_ATTRIBUTES };

// Warps of a thread block share the columns. Each has batches of a single row or one of several rows,
// a ring, and sums [panels, 32] of LaneSums (of a single row or plain weights [rows, 16]).
struct ExpertMemory {
    char* batches;
    Ring ring;
    float *sums, *own;
    int warp_floats;

    // panels: of all matrices of a thread block.
    DEVICE ExpertMemory(const Args& a, char* shared, int panels)
        : warp_floats(panels * EXPERT_TILE_ROWS * PANEL) {
        const int warp = warp_index(), n_warps = blockDim.x / 32;
        const auto batch_bytes = static_cast<int>(a.attr[BATCH_BYTES]);
        batches = shared + warp * batch_bytes;
        shared += n_warps * batch_bytes;
        ring = {nullptr, static_cast<int>(a.attr[SLOT_BYTES]), static_cast<int>(a.attr[SLOTS])};
        const int ring_bytes = ring.n_slots * ring.slot_bytes;
        ring.slots = shared + warp * ring_bytes;
        sums = reinterpret_cast<float*>(shared + n_warps * ring_bytes);
        own = sums + warp * warp_floats;
    }

    // Number `at` of the warps' floats, added up.
    DEVICE float total(int at) const {
        float value = 0.0f;
        for (int k = 0; k < static_cast<int>(blockDim.x / 32); k++)
            value += sums[k * warp_floats + at];
        return value;
    }
};

// TILES: their number, then for each (expert, first place in ORDER, rows). ORDER: pairs (token,
// choice).
struct ExpertTile {
    int expert = 0, n;
    const int32_t* pairs = nullptr;

    // Tile i; n is 0 where there are fewer. In rehearsal 1 or 2: as many rows of a made-up tile.
    DEVICE ExpertTile(const View& order, const View& tiles, int i, int rehearsal) : n(rehearsal) {
        if (rehearsal) return;
        const auto* all = tiles.as<int32_t>();
        const int32_t *tile = all + 3 * (i + 1), count = all[0];
        expert = tile[0], n = tile[2], pairs = order.as<int32_t>() + tile[1];
        if (i >= count) n = 0;
    }
    DEVICE int pair(int i) const { return pairs ? pairs[i < n ? i : n - 1] : 0; }
    DEVICE const uint8_t* matrix(const View& w) const {
        return w.as<uint8_t>() + static_cast<int64_t>(expert) * w.stride[0];
    }
};

// A warp's part of the products of a stream's panels with a tile's rows, as multiply_row's.
template <typename F, typename Rows, int RUNS>
DEVICE void multiply_rows(F f, Stream<true, RUNS>& stream, const Rows& rows, int n, int warp,
                          int n_warps, BatchRows<EXPERT_TILE_ROWS>& x,
                          LaneSums<EXPERT_TILE_ROWS>* sums) {
    for (int i = 0; i < stream.n_panels; i++) sums[i * 32 + threadIdx.x % 32] = {};
#pragma unroll 1
    for (int first = warp * BATCH; first < n; first += n_warps * BATCH) {
        sync_warp();  // All lanes have read the batch before.
        float scale[1][EXPERT_TILE_ROWS / 4];
        share_scale<EXPERT_TILE_ROWS>(f, rows.fill(f, x, first, n, 0, 1), scale[0]);
        fence_copies();
        wait_copies<0>();
        sync_warp();
        multiply_panels(f, stream, &x, scale, sums);
    }
}

// The products of a tile's rows with one or two runs of panels in the layout of w, to the warps'
// sums. row_at(i): row i of the tile. `rows`: all of them, as multiply_rows takes them. A single row
// takes fewer instructions by itself.
template <int RUNS, typename Rows, typename RowAt>
DEVICE void multiply_tile(const View& w, PanelRun run, PanelRun more, int n_rows, const Rows& rows,
                          RowAt row_at, bool aligned, const ExpertMemory& memory) {
    const int warp = warp_index(), n_warps = blockDim.x / 32, n = w.shape[2] / K_BLOCK;
    if (n_rows == 1) {
        Stream<false, RUNS> stream(w, run, more, memory.ring, warp, n_warps);
        stream.start();
        auto* batches = reinterpret_cast<RowBatch*>(memory.batches);
        Row row;
        row.x = row_at(0), row.aligned = aligned;
        row.stage_all(batches, n, warp, n_warps);
        with_format(w.layout, [&](auto f) {
            if constexpr (!is_plain(decltype(f){}))
                multiply_row(f, stream, batches, n, warp, n_warps, memory.own);
        });
        return;
    }
    Stream<true, RUNS> stream(w, run, more, memory.ring, warp, n_warps);
    stream.start();
    with_format(w.layout, [&](auto f) {
        if constexpr (!is_plain(decltype(f){}))
            multiply_rows(f, stream, rows, n, warp, n_warps,
                          *reinterpret_cast<BatchRows<EXPERT_TILE_ROWS>*>(memory.batches),
                          reinterpret_cast<LaneSums<EXPERT_TILE_ROWS>*>(memory.own));
    });
    stream.finish();
}

}  // namespace gdn
