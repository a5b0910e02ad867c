"""Guest images and their sources."""
