"""What was decided and why, page by page, and what it cost: decisions, history, metrics."""
