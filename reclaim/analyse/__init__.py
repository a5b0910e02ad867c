"""Analysis of records: working sets, ages, patterns, comparisons, predictions."""
