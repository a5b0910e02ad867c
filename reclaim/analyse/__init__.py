"""What records say: working sets, ages, patterns, comparisons, predictions."""
