"""What a command says besides its result: notices on stderr, from rank 0 alone."""

import os
import sys


def is_speaker() -> bool:
    """Whether this process is the one that talks to the person: rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def notice(text: str) -> None:
    """Print one line to stderr on rank 0; every other rank stays silent."""
    if is_speaker():
        print(text, file=sys.stderr, flush=True)
