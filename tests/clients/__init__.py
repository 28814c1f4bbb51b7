"""Clients that people use, against the server; `make test-clients` installs them."""
