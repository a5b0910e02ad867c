"""The bound on the time that a guest loses because its pages are re-armed."""
