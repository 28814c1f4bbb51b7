"""Write tests/golden/demo-mtp.npz: drafts of the demo model, in float64, from its GGUF file.

    python tools/train_demo/golden.py [-m engine/data/demo.gguf] [-o tests/golden/demo-mtp.npz]

Needs PyTorch. For each prompt i: ids_i; h_i, the trunk's state at the last two positions; next_i,
the trunk's greedy token; drafts_i, three greedy drafts after it; states_i, h' of each; best_i and
logits_i, tokens and values of the 32 largest logits of the trunk and of each draft. all_h_i has
the states of all positions of a few prompts. The same file gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.formats.gguf import GGUFFile
from engine.formats.quants import dequantize
from engine.text.tokenizer import Tokenizer
from tools.train_demo.convert import LAYER_NAMES, MTP_NAMES
from tools.train_demo.heldout import held_out, prompt

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ModuleNotFoundError as error:
    sys.exit(f"golden.py: expected {error.name} (pip install 'gdn-engine[parity]')")

from tools.train_demo.delta import CHUNK
from tools.train_demo.model import DemoModel, Sizes
from tools.train_demo.mtp import DEPTH, Mtp

ROOT = Path(__file__).resolve().parents[2]
MODEL, GOLDEN = ROOT / "engine/data/demo.gguf", ROOT / "tests/golden/demo-mtp.npz"
N_BEST = 32
TASKS = ("add", "subtract", "multiply", "compare", "copy", "sort", "count", "colors", "story")
_MAX_TOKENS, _N_WHOLE = 110, 3
_MAX_BYTES = 200_000


def sizes_of(file: GGUFFile) -> Sizes:
    """The sizes of a file that convert.py wrote."""

    def number(key: str) -> int:
        return int(file.metadata[f"qwen35.{key}"])

    return Sizes(
        n_vocab=file.tensors["token_embd.weight"].shape[0],
        n_embd=number("embedding_length"),
        n_layers=number("block_count") - number("nextn_predict_layers"),
        interval=number("full_attention_interval"),
        n_ff=number("feed_forward_length"),
        n_heads=number("attention.head_count"),
        n_kv_heads=number("attention.head_count_kv"),
        n_linear_heads=number("ssm.time_step_rank"),
        head_dim=number("attention.key_length"),
        n_rot=number("rope.dimension_count"),
        rope_base=float(file.metadata["qwen35.rope.freq_base"]),
        conv_kernel=number("ssm.conv_kernel"),
        eps=float(file.metadata["qwen35.attention.layer_norm_rms_epsilon"]),
    )


def load(file: GGUFFile) -> tuple[DemoModel, Mtp]:
    """The trunk and the layer for drafts in float64, of the file's own weights."""
    sizes = sizes_of(file)
    names = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
    mtp_names = {theirs: ours for ours, theirs in MTP_NAMES.items()}
    trunk: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, info in file.tensors.items():
        values = dequantize(info.dtype, file.raw(name), info.shape).astype(np.float64)
        if name.endswith("norm.weight") and not name.endswith("ssm_norm.weight"):
            values = values - 1.0
        elif name.endswith("ssm_a"):
            values = np.log(-values)
        elif name.endswith("ssm_conv1d.weight"):
            values = values[:, None]
        tensor = torch.from_numpy(values)
        if not name.startswith("blk."):
            inner = {
                "token_embd.weight": "embed_tokens.weight",
                "output_norm.weight": "norm.weight",
            }
            trunk[f"model.{inner[name]}"] = tensor
            continue
        _, layer, target = name.split(".", 2)
        if int(layer) < sizes.n_layers:
            trunk[f"model.layers.{layer}.{names[target]}"] = tensor
        elif target in mtp_names:
            own[mtp_names[target]] = tensor
        else:
            own[f"layers.0.{names[target]}"] = tensor
    model, mtp = DemoModel(sizes, torch.float64).double(), Mtp(sizes, torch.float64).double()
    model.load_state_dict(trunk)
    mtp.load_state_dict(own)
    return model, mtp


@torch.no_grad()
def drafted(models: tuple[DemoModel, Mtp], ids: list[int]) -> dict[str, NDArray[Any]]:
    """What the golden file has of a prompt, and `all_h`."""
    trunk, mtp = models
    embedding = trunk.model.embed_tokens.weight
    padded = torch.tensor([ids + [0] * (-len(ids) % CHUNK)])
    h = trunk.model(padded)[:, : len(ids)]
    logits = [F.linear(h[0, -1], embedding)]
    tokens, states = [*ids, int(logits[0].argmax())], []
    for k in range(DEPTH):
        # Rows after the prompt have no state of the trunk, and need none: drafts lead to them.
        known = F.pad(h, (0, 0, 0, k + 1))
        states.append(mtp(trunk.model.embed_tokens(torch.tensor([tokens])), known)[k, 0, -1])
        logits.append(F.linear(states[-1], embedding))
        tokens.append(int(logits[-1].argmax()))
    best = torch.stack(logits).topk(N_BEST, -1)
    return {
        "ids": np.array(ids, np.int32),
        "h": h[0, -2:].float().numpy(),
        "next": np.array(tokens[len(ids)], np.int32),
        "drafts": np.array(tokens[len(ids) + 1 :], np.int32),
        "states": torch.stack(states).float().numpy(),
        "best": best.indices.int().numpy(),
        "logits": best.values.float().numpy(),
        "all_h": h[0].float().numpy(),
    }


def prompts(file: GGUFFile, text: str) -> list[list[int]]:
    """Twenty prompts: questions as chats and plain, and text, from ten to a hundred tokens."""
    tokenizer = Tokenizer.from_gguf(file)
    asked = [prompt(held_out(task, 1)[0], "chat") for task in TASKS]
    asked += [prompt(held_out(task, 2)[1], "plain") for task in TASKS[:5]]
    found = [tokenizer.encode(one, parse_special=True) for one in asked]
    ids = tokenizer.encode(text[:20_000])
    places = ((0, 12), (300, 16), (600, 24), (1000, 100), (2000, 100), (3000, 64))
    return [one[:_MAX_TOKENS] for one in found] + [ids[i : i + n] for i, n in places]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, default=MODEL)
    parser.add_argument("-o", "--out", type=Path, default=GOLDEN)
    args = parser.parse_args()
    torch.set_num_threads(1)  # whose sums have one order
    file = GGUFFile(args.model)
    if not file.integer("qwen35.nextn_predict_layers", 0):
        sys.exit(f"golden.py: expected a model with a layer for drafts, got {args.model}")
    models = load(file)
    arrays: dict[str, Any] = {}
    asked = prompts(file, MODEL.with_name("heldout.txt").read_text())
    shortest = sorted(range(len(asked)), key=lambda i: len(asked[i]))[:_N_WHOLE]
    for i, ids in enumerate(asked):
        found = drafted(models, ids)
        if i not in shortest:
            del found["all_h"]
        arrays |= {f"{key}_{i}": value for key, value in found.items()}
    np.savez_compressed(args.out, **arrays)
    n_bytes = args.out.stat().st_size
    print(f"{args.out}: {len(asked)} prompts, {n_bytes} bytes")
    assert n_bytes < _MAX_BYTES


if __name__ == "__main__":
    main()
