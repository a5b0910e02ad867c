"""Records: young bitmaps over time, in files."""
