"""Convolutions, by the width of their weights."""
