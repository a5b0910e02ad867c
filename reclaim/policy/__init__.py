"""reclaim/policy."""
