"""`python -m engine`: the same as `gdn` and `python cli.py`."""

from engine.commands.main import main

raise SystemExit(main())
