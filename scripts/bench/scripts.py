"""Stand-in for the package `scripts` where python runs a file of this folder by its path.

Python then searches this folder, not the repository's root, and `import scripts` finds this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1])]
