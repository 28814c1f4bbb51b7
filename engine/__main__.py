"""`python -m engine`: the same as `python cli.py`."""

from engine.commands.main import main

raise SystemExit(main())
