"""What the library reaches, measured: ``python -m benchmarks`` runs everything and rewrites ``results/``."""
