"""Write tests/golden/*.npz: what transformers answers for the parity cases.

    python tools/make_golden.py [CASE ...]

Needs the parity extra. A case is named like its file (qwen35-ratio2); without names, all files are
written. Seeds are tried in order until the greedy run is a fair test (tests/parity/live.py), so the
same versions of torch and transformers write the same files. Each file is checked before it is
written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.parity import CASES
from tests.parity.common import (
    GOLDEN_DIR,
    LENGTHS,
    MAX_ERROR,
    N_GREEDY,
    N_IDS,
    Case,
    Golden,
    case_id,
    golden_path,
    relative_error,
)

try:
    from tests.parity.live import Live, first_fair, is_fair, logits
except ModuleNotFoundError as error:
    sys.exit(f"make_golden.py: expected {error.name} (pip install 'gdn-engine[parity]')")

SEEDS = range(1000)


def main() -> int:
    """Write the files and print a line about each."""
    known = {case_id(case): case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="CASE", help=", ".join(known))
    names = parser.parse_args().names
    if unknown := sorted(set(names) - known.keys()):
        parser.error(f"no such case: {', '.join(unknown)}; known are {', '.join(known)}")
    GOLDEN_DIR.mkdir(exist_ok=True)
    print(f"{'case':30} seed   margin  experts distinct    rms    noise   bytes")
    for case in [known[name] for name in names] or CASES:
        live = first_fair(case, SEEDS)
        noise = _checked_noise(case, live)
        golden, path = live.golden, golden_path(case)
        golden.save(path)
        rms = float(np.sqrt(np.mean(golden.logits**2)))
        print(
            f"{case_id(case):30} {golden.seed:4} {golden.margin:8.1e} {golden.choice_margin:8.1e}"
            f" {len(set(golden.greedy)):8} {rms:6.3f} {noise:8.1e} {path.stat().st_size:7}"
        )
    return 0


def _checked_noise(case: Case, live: Live) -> float:
    """The largest relative difference between a prefix run alone and within the whole sequence."""
    golden: Golden = live.golden
    assert golden.logits.shape == (N_IDS, case.n_vocab)
    assert golden.logits.dtype == np.float32
    assert np.isfinite(golden.logits).all()
    assert len(golden.greedy) == N_GREEDY
    assert is_fair(case, golden)
    noise = max(
        relative_error(logits(live.model, golden.ids[:n]), golden.logits[:n]) for n in LENGTHS
    )
    assert noise <= MAX_ERROR / 3, f"{case_id(case)}: transformers' own noise is {noise:.1e}"
    return noise


if __name__ == "__main__":
    sys.exit(main())
