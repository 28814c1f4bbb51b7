"""Memory of sequences: paged KV blocks for attention layers, state slots for linear layers."""
