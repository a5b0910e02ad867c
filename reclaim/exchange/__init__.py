"""Records from and to the formats of other programs: DAMON, KVM dirty logs, plain text."""
