"""Data about what the daemon did and why: decisions, events, page histories."""
