"""What a launch counts on the CPU: Triton's own functions for it take 7 us a call, and a step makes a thousand."""


def blocks_of(count: int, size: int) -> int:
    """How many blocks of ``size`` hold so many."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The least power of two that is not below a number of at least 1."""
    return 1 << (count - 1).bit_length()
