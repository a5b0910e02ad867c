"""Which pages go: policies behind one protocol."""
