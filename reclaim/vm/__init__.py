"""One VM under the daemon: its thread, its session, and the steps of one pass."""
