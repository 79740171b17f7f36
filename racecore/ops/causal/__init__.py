"""Every query sees the keys up to and including its own token: a causal scan, and its gradient."""
