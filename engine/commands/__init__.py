"""The commands of the command line: each has ABOUT, `add_options` and `run`."""
