"""Parity with transformers: tiny random models, written as GGUF files and compared in logits.

One file per architecture (`qwen35.py`, ...) holds its cases: shapes of the transformers state
dict, the conversion to GGUF and the transformers model; `qwen.py` and `ffn.py` hold what several
of them share. To add one, write such a file and append its cases here; golden files, tests and
tools/make_golden.py go by `CASES` alone. Only `live.py` and the cases' `transformers_model`
import torch.
"""

from tests.parity import bailingmoe3, kimi_linear, qwen3next, qwen35, qwen35moe
from tests.parity.common import Case

CASES: tuple[Case, ...] = (
    *qwen35.CASES,
    *qwen35moe.CASES,
    *qwen3next.CASES,
    *kimi_linear.CASES,
    *bailingmoe3.CASES,
)
