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
# k-blocks at a time. Rows of int8 activations lie in fragments of ROW_GROUP rows.
PANEL, K_BLOCK, BATCH, ROW_GROUP = 16, 32, 8, 8
# Weights of one MUL_MAT, and matrices of one MUL_MAT_ID.
MAX_WEIGHTS, MAX_MATRICES = 6, 4
# What the row of a GEMV is, as row.cuh makes it.
ROW_AS_IT_IS, ROW_SWIGLU, ROW_NORM, ROW_GATED_SILU, ROW_GATED_SIGMOID = range(5)
# Bytes of a batch of the row in shared memory.
ROW_BATCH_BYTES = 672
# Columns of a tile of gemm.cuh; rows of a tile of one expert in mul_mat_id_rows.cu.
GEMM_COLUMNS, EXPERT_TILE_ROWS = 128, 8
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
    """A kernel of `source`.

    threads: of a thread block; at most so many where a launch gives its own number. shared: bytes
    of dynamic shared memory, where they are the same for every launch.
    """

    source: str
    threads: int
    shared: int = 0


# Source -> kernel -> threads, or threads and bytes of shared memory.
_SOURCES: dict[str, dict[str, int | tuple[int, int]]] = {
    "add_rms_norm": {"add_rms_norm": 256},
    "attention": {
        "attention_join": 256,
        "attention_loose_64": (128, 19712),
        "attention_loose_128": (128, 36096),
        "attention_loose_256": (128, 68864),
        "attention_loose_latent": (128, 94720),
        "attention_tiles_64": (128, 36864),
        "attention_tiles_128": (128, 69632),
        "attention_tiles_256": (256, 72704),
        "attention_tiles_latent": (256, 114688),
    },
    "attention_rows": {f"attention_rows_{size}": 256 for size in (64, 256, 576, 1024)},
    "delay": {"delay": 1},
    "expand": {"expand": 256},
    "finish_product": {"finish_product": 256},
    "fused/delta_net_inputs": {"delta_net_inputs": 128},
    "gated_delta_net": {
        **{f"delta_net_{kda}step_{lanes}": 128 for kda in ("", "kda_") for lanes in (4, 8, 16)},
        "delta_net_rows_4": (128, 20480),
        "delta_net_rows_8": (128, 34816),
        "delta_net_rows_16": (128, 66560),
        "delta_net_kda_rows_4": (128, 29696),
        "delta_net_kda_rows_8": (128, 53248),
        "delta_net_kda_rows_16": (128, 103424),
    },
    "gated_delta_net_chunk": {
        f"delta_net_{kda}chunks_{size}": (256, shared)
        for kda in ("", "kda_")
        for size, shared in {
            "64_32": 83456,
            "64_64": 92160,
            "128_32": 136704,
            "128_64": 149504,
            "256_32": 132608,
        }.items()
    },
    "gated_delta_net_prepare": {
        "delta_net_prepare_64": (256, 74180),
        "delta_net_prepare_128": (256, 90564),
        "delta_net_prepare_256": (256, 123332),
        "delta_net_kda_prepare_64": (256, 90560),
        "delta_net_kda_prepare_128": (256, 123328),
        "delta_net_kda_prepare_256": (256, 188864),
    },
    "gdn_gate": {"gdn_gate": 256},
    "gemm": {"gemm_64": (256, 28672), "gemm_128": (256, 40960)},
    "gemm_experts": {"gemm_experts_32": (256, 22528), "gemm_experts_64": (256, 28672)},
    "get_rows": {"get_rows": 256},
    "get_rows_packed": {"get_rows_packed": 128},
    "head_norms": {"l2_norm": 256, "rms_norm_gated": 256},
    "mla_cache": {"mla_cache": 128},
    "mul_mat": {"mul_mat_1": 512, "mul_mat_2": 256},
    "mul_mat_heads": {"mul_mat_heads_rows": 128, "mul_mat_heads_tiles": 256},
    "mul_mat_id": {"mul_mat_id": 512, "mul_mat_id_sum": 512},
    "mul_mat_id_rows": {"mul_mat_id_rows": 256},
    "mul_mat_rows": {"mul_mat_16": 256, "mul_mat_32": 256},
    "mul_mat_some": {"mul_mat_4": 256, "mul_mat_8": 256},
    "qk_norm_rope": {"qk_norm_rope": 256},
    "quantize_rows": {"quantize_rows": 256},
    "repack": {"repack": 128},
    "round_rows": {"round_rows": 128},
    "router": {"router": 32},
    "sample": {"feed_tokens": 64, "sample_segments": 256, "sample_rows": 256},
    "sort_by_expert": {"sort_by_expert": 1024},
    "ssm_conv": {"ssm_conv": 128},
    "sum_experts": {"sum_experts": 256},
    "swiglu": {"swiglu": 256},
}
KERNELS = {
    name: Kernel(source, *(size if isinstance(size, tuple) else (size,)))
    for source, kernels in _SOURCES.items()
    for name, size in kernels.items()
}


def threads(kernel: str) -> int:
    """Threads of a kernel's blocks."""
    return KERNELS[kernel].threads


def header() -> str:
    """The text of `constants.cuh`: every upper-case integer of this module, of a table each entry,
    and THREADS_ and SHARED_ of each kernel."""
    values = {name: n for name, n in globals().items() if name.isupper() and isinstance(n, int)}
    values |= {f"ATTENTION_TILE_ROWS_{name}": n for name, n in ATTENTION_TILE_ROWS.items()}
    values |= {f"DELTA_CHUNK_FLOATS_{width}": n for width, n in DELTA_CHUNK_FLOATS.items()}
    values |= {f"THREADS_{name}": kernel.threads for name, kernel in KERNELS.items()}
    values |= {f"SHARED_{name}": kernel.shared for name, kernel in KERNELS.items()}
    lines = [f"constexpr int {name} = {value};" for name, value in values.items()]
    return "\n".join(("#pragma once", "namespace gdn {", *lines, "}", ""))
