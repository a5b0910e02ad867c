"""Guest memory of other processes, seen from outside."""
