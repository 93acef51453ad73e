"""Lengths that come again, so that what a length costs when it is first met is paid seldom."""

# Steps between a power of two and the next: a library of matrix products writes code for each length that it meets,
# and keeps only so much of it.
LENGTH_STEPS = 24


def round_up(length: int) -> int:
    """The next length that is used: at most 1 / LENGTH_STEPS more."""
    step = max(1, 2 ** (length.bit_length() - 1) // LENGTH_STEPS)
    return step * -(-length // step)
