"""One VM under the daemon: its thread, and what one pass over it does, step by step."""
