"""Pictures of young bitmaps: PNG, SVG and HTML heatmaps."""
