"""The command line: complete a prompt, look at a model, or measure it.

    python cli.py -m model.gguf -p "Once upon a time"
    python cli.py graph -m model.gguf
    python cli.py sweep-bench -m model.gguf -c 4096 -ub 512

Options are named as llama.cpp's. Text goes to standard output, everything else to standard error.
"""

import sys

# Nothing above is newer than what an old Python reads.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: expected Python 3.11 or later, got {sys.version.split()[0]}")
try:
    from engine.commands.main import main

    sys.exit(main())
except KeyboardInterrupt:  # While it was still importing.
    sys.exit(130)
