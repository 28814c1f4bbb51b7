"""Every CUDA kernel as the host sees it, and the constants that hosts and kernels share.

Python is the one source: `header` writes all of this as `constants.cuh`, which every kernel source
includes. Launch bounds come from it, and static_asserts compare the sizes of structs in shared
memory with it: a number that has drifted does not compile.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.backends.cuda.args import ARGS, MAX_ATTRS, MAX_VIEWS, VIEW  # noqa: F401
from engine.backends.native.views import MAX_RANK  # noqa: F401
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K  # noqa: F401

HEADER = "constants.cuh"

# A panel is PANEL rows of a packed weight, a k-block K_BLOCK of its columns. A warp takes BATCH
# k-blocks at a time.
PANEL, K_BLOCK, BATCH = 16, 32, 8
# Columns of a plain weight that a warp takes at a time; rows that a thread block multiplies by one,
# where other weights of the launch are quantized.
PLAIN_COLUMNS, PLAIN_ROWS = 128, 4
# Weights of one MUL_MAT, and matrices of one MUL_MAT_ID.
MAX_WEIGHTS, MAX_MATRICES = 6, 4
# What a product's row is, as row.cuh makes it; stage_rows.cu alone makes the last.
ROW_AS_IT_IS, ROW_SWIGLU, ROW_NORM, ROW_GATED_SILU, ROW_GATED_SIGMOID, ROW_NORMED = range(6)
# Bytes of a batch of the row in shared memory, and of its scale and sums alone.
ROW_BATCH_BYTES, BATCH_HEAD_BYTES = 624, 80
# Several rows: bytes of a batch of a staged row, and of a row's batch in shared memory.
STAGED_BYTES, BATCH_ROW_BYTES = 512, 576
# Slots of a warp's ring at most: batches of weights that are on their way. Bytes at a slot's end,
# which count what has arrived there.
MAX_SLOTS, ARRIVALS_BYTES = 4, 16
# Columns of a tile of gemm.cuh; rows of a tile of one expert in mul_mat_id_rows.cu.
GEMM_COLUMNS, EXPERT_TILE_ROWS = 128, 4
ROUTER_MAX_EXPERTS, ROUTER_MAX_USED = 512, 32
CONV_MAX_TAPS, ROPE_MAX_ROT = 16, 512
# MUL_MAT_HEADS: inputs that are summed together; rows of a block of the kernel for few rows; rows
# and outputs of a tile of the other one.
HEADS_INPUTS, HEADS_FEW_ROWS, HEADS_TILE_ROWS, HEADS_TILE_OUTPUTS = 32, 8, 128, 64
# The delta rule: tokens of a chunk, value columns that are prepared together, floats of a column of
# the state that a lane holds; floats of a prepared chunk, but for its values, by the keys' size.
DELTA_CHUNK, DELTA_VALUE_TILE, DELTA_LANE_FLOATS = 64, 64, 16
DELTA_CHUNK_FLOATS = {"64": 8256, "128": 14464, "256": 26880}
# Attention: chunks of a row's positions at most, and floats of a partial result beside its values;
# rows of a tile of remainder rows, and of a tile of a prompt's rows, by the head's size.
MAX_POSITION_CHUNKS, PARTIAL_EXTRA, ATTENTION_LOOSE_ROWS = 64, 4, 16
ATTENTION_TILE_ROWS = {"64": 64, "128": 64, "256": 64, "latent": 32}
# Sampling: tokens of a segment of the vocabulary, and segments at most.
SEGMENT, MAX_SEGMENTS = 4096, 64
SAMPLE_SPEC_BYTES = 4 * (8 + MAX_BANNED)
VIEW_BYTES, ARGS_BYTES = VIEW.itemsize, ARGS.itemsize


@dataclass(frozen=True)
class Kernel:
    """A kernel of `source`. threads: of a thread block; at most so many where a launch gives its
    own number. shared: bytes of dynamic shared memory, where they are the same for every launch."""

    source: str
    threads: int
    shared: int = 0


# Threads -> kernels whose source has their name.
_SINGLE = {
    1: "delay",
    128: "get_rows_packed mla_cache repack round_rows ssm_conv",
    256: "add_rms_norm copy_pieces expand finish_product gdn_gate get_rows qk_norm_rope router "
    "sum_experts swiglu",
    512: "stage_rows",
    640: "mul_mat_id_rows",
    1024: "sort_by_expert",
}
# Source, threads, beginning and ends of the names of its kernels: `delta_net_` with `rows_8` is the
# kernel delta_net_rows_8 of gated_delta_net.cu.
_FAMILIES = (
    ("attention", 128, "attention_loose_", "64 128 256 latent"),
    ("attention", 128, "attention_tiles_", "64 128"),
    ("attention", 256, "attention_", "tiles_256 tiles_latent join"),
    ("attention_rows", 256, "attention_rows_", "64 256 576 1024"),
    ("fused/delta_net_inputs", 128, "delta_net_inputs", ""),
    ("fused/experts_hidden", 768, "experts_hidden", ""),
    ("gated_delta_net", 128, "delta_net_", "step_4 step_8 step_16 rows_4 rows_8 rows_16"),
    ("gated_delta_net", 128, "delta_net_kda_", "step_4 step_8 step_16 rows_4 rows_8 rows_16"),
    ("gated_delta_net_chunk", 256, "delta_net_chunks_", "64_32 64_64 128_32 128_64 256_32"),
    ("gated_delta_net_chunk", 256, "delta_net_kda_chunks_", "64_32 64_64 128_32 128_64 256_32"),
    ("gated_delta_net_prepare", 256, "delta_net_", "prepare_64 prepare_128 prepare_256"),
    ("gated_delta_net_prepare", 256, "delta_net_kda_", "prepare_64 prepare_128 prepare_256"),
    ("gemm", 256, "gemm_", "64 128"),
    ("gemm_experts", 256, "gemm_experts_", "32 64"),
    ("head_norms", 256, "", "l2_norm rms_norm_gated"),
    ("mul_mat", 512, "mul_mat_", "1"),
    ("mul_mat_floats", 256, "mul_mat_floats_", "2 4 8"),
    ("mul_mat_rows_4", 768, "mul_mat_rows_", "4"),
    ("mul_mat_rows_8", 768, "mul_mat_rows_", "8"),
    ("mul_mat_rows_16", 640, "mul_mat_rows_", "16"),
    ("mul_mat_heads", 128, "mul_mat_heads_", "rows"),
    ("mul_mat_heads", 256, "mul_mat_heads_", "tiles"),
    ("sample", 64, "", "feed_tokens"),
    ("sample", 256, "sample_", "segments rows"),
)
_SHARED = {
    "attention_loose_64": 19712, "attention_loose_128": 36096, "attention_loose_256": 68864,
    "attention_loose_latent": 94720, "attention_tiles_64": 36864, "attention_tiles_128": 69632,
    "attention_tiles_256": 72704, "attention_tiles_latent": 114688,
    "delta_net_rows_4": 20480, "delta_net_rows_8": 34816, "delta_net_rows_16": 66560,
    "delta_net_kda_rows_4": 29696, "delta_net_kda_rows_8": 53248, "delta_net_kda_rows_16": 103424,
    "delta_net_prepare_64": 74180, "delta_net_prepare_128": 90564, "delta_net_prepare_256": 123332,
    "delta_net_kda_prepare_64": 90560, "delta_net_kda_prepare_128": 123328,
    "delta_net_kda_prepare_256": 188864,
    "gemm_64": 28672, "gemm_128": 40960, "gemm_experts_32": 22528, "gemm_experts_64": 28672,
}  # fmt: skip
for _size, _bytes in (
    ("64_32", 83456), ("64_64", 92160), ("128_32", 136704), ("128_64", 149504), ("256_32", 132608)
):  # fmt: skip
    _SHARED |= {f"delta_net_{kda}chunks_{_size}": _bytes for kda in ("", "kda_")}
KERNELS = {
    **{name: Kernel(name, n) for n, names in _SINGLE.items() for name in names.split()},
    **{
        begin + end: Kernel(source, n, _SHARED.get(begin + end, 0))
        for source, n, begin, ends in _FAMILIES
        for end in ends.split(" ")
    },
}


def threads(kernel: str) -> int:
    return KERNELS[kernel].threads


def header() -> str:
    """The text of `constants.cuh`: every upper-case integer of this module, of a table each entry,
    and THREADS_ and SHARED_ of each kernel."""
    values = {name: n for name, n in globals().items() if name.isupper() and isinstance(n, int)}
    # engine/ops/layout.h has these; CudaWeights compares them with the library's.
    del values["PANEL"], values["K_BLOCK"]
    values |= {f"ATTENTION_TILE_ROWS_{name}": n for name, n in ATTENTION_TILE_ROWS.items()}
    values |= {f"DELTA_CHUNK_FLOATS_{width}": n for width, n in DELTA_CHUNK_FLOATS.items()}
    values |= {f"THREADS_{name}": kernel.threads for name, kernel in KERNELS.items()}
    values |= {f"SHARED_{name}": kernel.shared for name, kernel in KERNELS.items()}
    lines = [f"constexpr int {name} = {value};" for name, value in values.items()]
    return "\n".join(("#pragma once", "namespace gdn {", *lines, "}", ""))
