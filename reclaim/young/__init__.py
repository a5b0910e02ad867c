"""Young bitmaps: the type, and pictures of it."""
