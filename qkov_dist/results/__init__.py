"""Additive partials, files, and the heatmap in memory."""
