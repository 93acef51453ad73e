"""Memory that a run needs, memory that is there, and what would fit."""
