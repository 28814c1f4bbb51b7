// Runs kernels of a library for a process of another architecture: tests/backends/cpu/test_aarch64.py asks over
// standard input and reads the answers from standard output, as 64-bit words and bytes.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../../../engine/ops/cpu/kernel.h"

namespace {

void* library;

template <typename F>
F* function(const char* name) {
    return reinterpret_cast<F*>(dlsym(library, name));
}

void get(void* data, size_t size) {
    if (std::fread(data, 1, size, stdin) != size) std::exit(0);
}

int64_t word() {
    int64_t n;
    get(&n, 8);
    return n;
}

void answer(const void* data, size_t size) { std::fwrite(data, 1, size, stdout); }
void answer(int64_t n) { answer(&n, 8); }

// Bytes that lie at another address over there; here they have the same one modulo 64.
struct Region {
    uint64_t there;
    size_t size;
    char* here;
};

// What lies behind every region, and must be left alone.
constexpr char GUARD = 0x5a;
constexpr size_t GUARD_BYTES = 64;

void check_guard(const void* end, const char* what) {
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if (static_cast<const char*>(end)[i] != GUARD) {
            std::fprintf(stderr, "driver: a write %zu bytes behind %s\n", i, what);
            std::exit(1);
        }
}

struct Instruction {
    const void* kernel;
    uint64_t views, attrs;
    int64_t barrier;
};

void pack() {
    int64_t id = word(), n_rows = word(), n_in = word(), n_panels = word(), size = word();
    std::vector<uint8_t> rows(size), panels(word() + GUARD_BYTES, GUARD);
    get(rows.data(), rows.size());
    function<void(int, const uint8_t*, int64_t, int64_t, float, uint8_t*, int64_t, int64_t)>(
        "gdn_pack")(static_cast<int>(id), rows.data(), n_rows, n_in, 1.0f, panels.data(), 0,
                    n_panels);
    check_guard(panels.data() + panels.size() - GUARD_BYTES, "the panels");
    answer(panels.data(), panels.size() - GUARD_BYTES);
}

// Instructions refer to views and attributes by their place in the lists.
void run(void* team) {
    std::vector<Region> regions(word());
    std::vector<Instruction> program(word());
    std::vector<gdn::View> views(word());
    std::vector<double> attrs(word());
    int64_t live[gdn::N_DIMS + 1] = {};  // The last says that no blocks follow.
    get(live, gdn::N_DIMS * sizeof(int64_t));
    for (Region& r : regions) {
        r.there = word(), r.size = word();
        const size_t room = (r.size + 191) / 64 * 64;
        r.here = static_cast<char*>(std::aligned_alloc(64, room)) + r.there % 64;
        get(r.here, r.size);
        std::memset(r.here + r.size, GUARD, GUARD_BYTES);
    }
    get(program.data(), program.size() * sizeof(Instruction));
    get(views.data(), views.size() * sizeof(gdn::View));
    get(attrs.data(), attrs.size() * sizeof(double));
    for (gdn::View& v : views)
        for (const Region& r : regions) {
            const uint64_t offset = reinterpret_cast<uint64_t>(v.data) - r.there;
            if (v.data && offset < r.size) {
                v.data = r.here + offset;
                break;
            }
        }
    for (Instruction& i : program) {
        i.views = reinterpret_cast<uint64_t>(views.data() + i.views);
        i.attrs = reinterpret_cast<uint64_t>(attrs.data() + i.attrs);
    }
    using Run = int64_t(void*, const void*, int64_t, const int64_t*, double*, int64_t, double);
    const int64_t n = program.size();
    if (function<Run>("gdn_run")(team, program.data(), n, live, nullptr, -1, 1e9) != n)
        std::abort();
    for (const Region& r : regions) {
        check_guard(r.here + r.size, "a region");
        answer(r.here, r.size);
        std::free(r.here - r.there % 64);
    }
}

}  // namespace

int main(int argc, char** argv) {
    library = argc == 3 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (!library) return std::fprintf(stderr, "expected a library and a number of threads\n"), 1;
    void* team = function<void*(int)>("gdn_team_create")(std::atoi(argv[2]));
    for (;;) {
        switch (word()) {
            case 0:
                answer(function<int32_t(int)>("gdn_layout_of")(static_cast<int>(word())));
                break;
            case 1: {
                const int64_t layout = word(), n_in = word();
                answer(function<int64_t(int32_t, int64_t)>("gdn_panel_bytes")(
                    static_cast<int32_t>(layout), n_in));
                break;
            }
            case 2: {
                std::string name(word(), ' ');
                get(name.data(), name.size());
                answer(reinterpret_cast<int64_t>(
                    function<const void*(const char*)>("gdn_kernel")(name.c_str())));
                break;
            }
            case 3: pack(); break;
            default: run(team);
        }
        std::fflush(stdout);
    }
}
