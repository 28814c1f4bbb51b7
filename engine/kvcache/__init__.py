"""Memory of sequences: KV blocks for attention layers, state slots for linear layers."""
