"""The command line: complete a prompt, look at a model, or measure it.

    python cli.py -m model.gguf -p "Once upon a time"
    python cli.py graph -m model.gguf
    python cli.py sweep-bench -m model.gguf -c 4096 -ub 512

Options are named as llama.cpp's. Text goes to standard output, everything else to standard error.
"""

import sys

try:
    from engine.commands.main import main

    sys.exit(main())
except KeyboardInterrupt:  # While it was still importing.
    sys.exit(130)
