"""The compiled part of calls, csrc/python; None where it was compiled without Python's headers, or not at all. Then its
functions run as they are written in Python."""

from typing import Any

CALLS: Any
try:
    from bitorch_engine.ops import _calls as CALLS  # type: ignore[attr-defined,no-redef]
except ImportError:
    CALLS = None
