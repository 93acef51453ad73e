"""The package `scripts`, as a file in this folder finds it that python runs by its path."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1])]
