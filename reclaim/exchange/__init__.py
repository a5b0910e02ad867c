"""Import and export of records: DAMON, KVM dirty logs, plain text."""
