"""Convolutions with weights of 1 to 8 bits."""
