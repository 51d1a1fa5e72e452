"""Linear layers, by the width of their weights."""
