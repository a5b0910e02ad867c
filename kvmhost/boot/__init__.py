"""Loading guest images, and the state in which a tiny guest starts."""
