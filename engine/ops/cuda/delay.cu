// Keeps the stream busy for some nanoseconds, so that later launches queue up and run without gaps.

#include "kernel.cuh"

KERNEL(delay) {
    using namespace gdn;
    const uint64_t end = nanoseconds() + static_cast<uint64_t>(a.attr[0]);
    while (nanoseconds() < end) {}
}
