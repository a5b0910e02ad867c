"""reclaim/pressure."""
