// A CPU kernel is a count of independent tasks and a function that runs some of them.
//
// An instruction has operands (`View`s: the outputs, then the inputs in the order of the op's
// `operands`, which the kernel's enum repeats; an absent one has data == nullptr) and attributes
// as doubles. Tasks of one instruction run in any order and on any thread, and their results do not
// depend on either.
#pragma once

#include <cstdint>

#include "../view.h"

namespace gdn {

constexpr int MAX_RANK = 4;

// A row-major array or a strided part of one; strides count elements. A weight in a packed layout
// has dtype PACKED, its layout's number, and the layout's strides in bytes (see ../layout.h).
struct View {
    char* data;
    int64_t shape[MAX_RANK];
    int64_t stride[MAX_RANK];
    int32_t rank, dtype, dim, layout;

    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data);
    }
    // Row i of the first axis, and with more indices entries of the following ones.
    float* row(int64_t i) const { return as<float>() + i * stride[0]; }
    float* row(int64_t i, int64_t j) const { return row(i) + j * stride[1]; }
    explicit operator bool() const { return data != nullptr; }
};

// A row tile: consecutive rows of one sequence within 64 aligned positions. Kernels may compute
// them together, and sum in another order than for single rows.
struct RowTile {
    int64_t row, n;
};

constexpr int64_t MAX_TILE_ROWS = 64;

// A step's row tiles, its rows in tiles and its remainder rows, each in order; without matrix units
// there are no tiles, and all rows are remainder rows. Products round rows by their place: `by_kind`
// lists those in row tiles, then the others, with matrix units or without.
struct Rows {
    const RowTile* tiles;
    const int32_t *tiled, *remainder, *by_kind;
    const uint8_t* fine;  // Of each row: whether it becomes 15-bit integers, or else int8.
    int64_t n_tiles, n_tiled, n_remainder, n_coarse;
    bool has_fine;  // Whether rows outside row tiles are fine.

    // Whether row t of an activation is fine; rows of another axis than the step's are in no tile.
    bool is_fine(const View& x, int64_t t) const {
        return x.dim == N_TOKENS ? fine[t] != 0 : has_fine;
    }
};

struct Args {
    const View* v;
    const double* attr;
    const int64_t* live;  // [N_DIMS]
    const Rows* step;
    char* scratch;          // SCRATCH_BYTES of the running thread's own, aligned to 64
    int64_t n_threads = 1;  // Of the team, of which a step may take fewer; no result depends on it.

    // The live size of a view's first axis.
    int64_t rows(const View& view) const { return view.dim ? live[view.dim] : view.shape[0]; }
};

constexpr int64_t SCRATCH_BYTES = 3 << 19;

struct Kernel {
    const char* name;
    int64_t (*n_tasks)(const Args&);
    void (*run)(const Args&, int64_t begin, int64_t end);
};

struct Instruction {
    const Kernel* kernel;
    const View* views;
    const double* attrs;
    int64_t barrier;  // Whether all earlier instructions must be finished first.
};

// The sequence that row t belongs to.
inline int64_t sequence_of(const int32_t* seq_starts, int64_t n_seqs, int64_t t) {
    int64_t low = 0, high = n_seqs;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (seq_starts[middle] <= t ? low : high) = middle;
    }
    return low;
}

}  // namespace gdn
