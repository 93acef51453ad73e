"""What a command says besides its result: notices on stderr, from rank 0 alone."""

import sys

from llama import env


def is_speaker() -> bool:
    """Whether this process is the one that talks to the person: rank 0, or the only process."""
    return env.rank() == 0


def notice(text: str) -> None:
    """Print one line to stderr on rank 0; every other rank stays silent."""
    if is_speaker():
        print(text, file=sys.stderr, flush=True)
