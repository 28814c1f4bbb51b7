"""Parity with transformers: tiny random models, written as GGUF files and compared in logits.

One file per architecture (`qwen35.py`, ...) holds its cases: shapes of the transformers state
dict, the conversion to GGUF and the transformers model. To add one, write such a file and append
its cases here; golden files, tests and tools/make_golden.py go by `CASES` alone. Only `live.py`
and the cases' `transformers_model` import torch.
"""

from tests.parity import qwen35
from tests.parity.common import Case

CASES: tuple[Case, ...] = (*qwen35.CASES,)
