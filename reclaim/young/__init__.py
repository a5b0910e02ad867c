"""reclaim/young."""
