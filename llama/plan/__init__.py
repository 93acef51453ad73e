"""Plans: the memory that a run needs beside the memory that is there, and proposals that would fit."""
