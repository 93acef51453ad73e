"""Charts as PNG files; where matplotlib is missing, a line says that there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from llama.env import notice

# Apart for every kind of eye (Okabe and Ito).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#BBBBBB")


@contextlib.contextmanager
def panels(path: str, n_rows: int, n_columns: int) -> Iterator[Sequence[Sequence[Any]]]:
    """The axes of a picture, row by row, which is written to `path` in the end; no row at all without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        notice(f"no chart in {path}: it needs matplotlib, pip install -e '.[plots]'")
        yield []
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(n_rows, n_columns, figsize=(5 * n_columns, 3.2 * n_rows), squeeze=False)
    yield list(rows)
    for axes in rows.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
