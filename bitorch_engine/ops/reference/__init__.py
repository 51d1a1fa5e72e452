"""The definition of every op in plain PyTorch: readable, exact, on any device."""
