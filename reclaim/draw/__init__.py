"""Draw young bitmaps: PNG, SVG, PDF and HTML heatmaps."""
