"""``python -m bitorch_engine.cli``, the same as ``bitorch-engine``; torchrun takes it after ``-m``."""

from bitorch_engine.cli import main

main()
