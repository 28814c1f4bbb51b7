"""The CPU's kernels and executor under the compiler's sanitizers: `make test-sanitize`."""
