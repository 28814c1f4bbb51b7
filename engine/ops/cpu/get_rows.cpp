// GET_ROWS: rows of a table by index, a task for each; the table is float32 or packed.

#include <cstring>

#include "kernels.h"
#include "pack.h"

namespace gdn {
namespace {

enum { OUT, TABLE, IDS };

void run(const Args& a, int64_t begin, int64_t end) {
    const View& table = a.v[TABLE];
    const int64_t n = a.v[OUT].shape[1];
    for (int64_t i = begin; i < end; i++) {
        const int64_t id = a.v[IDS].as<int32_t>()[i];
        float* out = a.v[OUT].row(i);
        if (table.dtype == PACKED) {
            const auto* panel = table.as<uint8_t>() + id / PANEL * table.stride[0];
            decode_row(table.layout, panel, static_cast<int>(id % PANEL), n, out);
        } else {
            std::memcpy(out, table.row(id), 4 * static_cast<size_t>(n));
        }
    }
}

}  // namespace

const Kernel get_rows = {"GET_ROWS", [](const Args& a) { return a.rows(a.v[OUT]); }, run};

}  // namespace gdn
