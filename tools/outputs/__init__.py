"""What commands print with ``--json``: one structure per command, one function that prints it."""
