"""Draw how one model is cut across ranks: a layer's matrices and the vocabulary tables, coloured by rank.

    python scripts/draw_partition.py --geometry llama-2-7b --nproc 3 --output docs/partition.png
    python scripts/draw_partition.py --geometry llama-3-8b --nproc 2 --tensor_split 3,1 --print_only

Without --output, or with --print_only, the command only prints what each rank holds, with the numbers of `Partition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama.checkpoint.table import rank_params
from llama.cli import run
from llama.config import geometry as published_geometry
from llama.errors import LlamaError
from llama.generation.tasks import check_writable
from llama.parallel.partition import Partition

# Okabe and Ito's palette, which colour-blind readers tell apart; further ranks repeat the colours with hatching.
DARKEST = "#0072B2"
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", DARKEST, "#BBBBBB")
HATCHES = ("", "///", "...", "xxx")
INK, SOFT, LINE = "#222222", "#666666", "#8A8A8A"

# Inches. The layer is drawn to scale; the vocabulary tables, far taller, are not.
WIDTH, MARGIN = 17.0, 0.45
TABLE_WIDTH, STEP, STACK_GAP = 1.35, 0.60, 0.62
ROW_HEIGHT = 0.30
SMALLEST_LABEL, SMALLEST_BOX = 0.16, 0.24


# -- numbers ---------------------------------------------------------------------------------------


def summary(partition: Partition) -> list[list[str]]:
    """Return a row of text for each rank, under `HEADER`: the parts that the rank holds."""
    total = sum(rank_params(partition, rank) for rank in range(partition.world_size))
    return [
        [
            f"rank {rank}",
            _run(partition.heads[rank]),
            _run(partition.kv_heads[rank]),
            _run(partition.ffn[rank]),
            _run(partition.vocab[rank]),
            f"{rank_params(partition, rank) / 1e9:.3f} B",
            f"{rank_params(partition, rank) / total:.1%}",
        ]
        for rank in range(partition.world_size)
    ]


HEADER = ["", "query heads", "KV heads", "FFN columns", "vocabulary rows", "parameters", "share"]


def _run(part: range) -> str:
    return f"{_ends(part)}  ({len(part):,})"


def _ends(part: range) -> str:
    return f"{part.start:,}" if len(part) == 1 else f"{part.start:,}–{part.stop - 1:,}"


def _details(cuts: Sequence[range], what: str = "") -> tuple[str, ...]:
    """Return the label of each rank's part of a matrix, such as "heads 0–10"."""
    return tuple(f"{what[:-1] if what and len(cut) == 1 else what} {_ends(cut)}".strip() for cut in cuts)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return the summary as aligned columns."""
    lines = [HEADER, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    padded = ((cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


# -- drawing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A matrix with its place (left, bottom) and size in inches, its cuts and the labels of its parts."""

    x: float
    y: float
    width: float
    height: float
    cuts: tuple[range, ...]
    by_rows: bool
    details: tuple[str, ...]  # of each rank's part


class Picture:
    """A canvas in inches, with methods for the few shapes of the drawing."""

    def __init__(self, width: float, height: float) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        plt.rcParams |= {"font.family": "DejaVu Sans", "hatch.linewidth": 0.6}
        self.figure, self.ax = plt.subplots(figsize=(width, height))
        self.figure.subplots_adjust(0, 0, 1, 1)
        self.ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.ax.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 9, **options: Any) -> None:
        """Draw text, centred unless `options` say otherwise."""
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "zorder": 6} | options
        self.ax.text(x, y, text, fontsize=size, **style)

    def matrix(self, box: Box, name: str, *notes: str) -> None:
        """Draw a matrix with its name and notes above, each part in its rank's colour."""
        total = sum(map(len, box.cuts))
        at = 0.0
        for rank, cut in enumerate(box.cuts):
            part = len(cut) / total
            self._part(box, rank, at, part)
            at += part
        self._frame(box.x, box.y, box.width, box.height)
        top, middle = box.y + box.height, box.x + box.width / 2
        for line, note in enumerate(reversed(notes)):
            self.text(middle, top + 0.10 + 0.15 * line, note, 7.5, color=SOFT)
        self.text(middle, top + 0.14 + 0.15 * len(notes), name, 10.5, weight="bold")

    def _part(self, box: Box, rank: int, at: float, part: float) -> None:
        if box.by_rows:  # rank 0 on top
            x, width, height = box.x, box.width, part * box.height
            y = box.y + box.height * (1 - at) - height
        else:
            x, y, width, height = box.x + at * box.width, box.y, part * box.width, box.height
        self.patch(x, y, width, height, rank)
        across, along = (height, width) if width >= 0.5 else (width, height)
        if across < SMALLEST_LABEL or along < 0.5:
            return
        middle, style = (x + width / 2, y + height / 2), self._label_style(rank)
        style["rotation"] = 0 if width >= 0.5 else 90
        if across >= 0.30 and along >= 0.075 * len(box.details[rank]):
            text = f"rank {rank}\n{box.details[rank]}"
            self.text(*middle, text, 7.5, linespacing=1.3, multialignment="center", **style)
        else:
            self.text(*middle, f"rank {rank}", 7.5, **style)

    def _label_style(self, rank: int) -> dict[str, Any]:
        """Return a style that is light on the darkest colour and readable on a hatched one."""
        colour = COLOURS[rank % len(COLOURS)]
        style: dict[str, Any] = {"color": "white" if colour == DARKEST else INK}
        if rank >= len(COLOURS):
            style["bbox"] = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        return style

    def patch(self, x: float, y: float, width: float, height: float, rank: int) -> None:
        """Draw a rectangle in the colour of a rank."""
        from matplotlib.patches import Rectangle

        colour, hatch = COLOURS[rank % len(COLOURS)], HATCHES[rank // len(COLOURS) % len(HATCHES)]
        style: dict[str, Any] = {
            "facecolor": colour,
            "edgecolor": "white",
            "linewidth": min(1.0, 8 * min(width, height)),
            "hatch": hatch,
            "zorder": 3,
        }
        self.ax.add_patch(Rectangle((x, y), width, height, **style))

    def _frame(self, x: float, y: float, width: float, height: float) -> None:
        from matplotlib.patches import Rectangle

        style: dict[str, Any] = {"fill": False, "edgecolor": INK, "linewidth": 1.1, "zorder": 4}
        self.ax.add_patch(Rectangle((x, y), width, height, **style))

    def panel(self, x: float, y: float, width: float, height: float, title: str) -> None:
        """Draw a pale background with a title at its lower left."""
        from matplotlib.patches import FancyBboxPatch

        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="#F5F6F8", edgecolor="#D8DCE2", linewidth=1.0, zorder=0,
        )  # fmt: skip
        self.ax.add_patch(shape)
        self.text(x + 0.14, y + 0.19, title, 10, ha="left", weight="bold", color=SOFT)

    def pill(self, x: float, y: float, width: float, height: float, text: str, rotation: float = 0) -> None:
        """Draw the label of a collective, dark and rounded."""
        from matplotlib.patches import FancyBboxPatch

        radius = min(width, height) / 2.01
        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle=f"round,pad=0,rounding_size={radius}",
            facecolor=INK, edgecolor=INK, zorder=5,
        )  # fmt: skip
        self.ax.add_patch(shape)
        self.text(x + width / 2, y + height / 2, text, 9, color="white", weight="bold", rotation=rotation)

    def line(self, *points: tuple[float, float]) -> None:
        """Draw a line through `points`."""
        xs, ys = zip(*points, strict=True)
        self.ax.plot(xs, ys, color=LINE, linewidth=1.6, solid_capstyle="butt", solid_joinstyle="round", zorder=1)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through `points`, with a head at the last."""
        self.line(*points)
        style: dict[str, Any] = {
            "arrowstyle": "-|>",
            "color": LINE,
            "linewidth": 1.6,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 12,
        }
        self.ax.annotate("", points[-1], points[-2], arrowprops=style, zorder=1)

    def plus(self, x: float, y: float) -> None:
        """Draw the sign for a sum with the residual stream."""
        from matplotlib.patches import Circle

        self.ax.add_patch(Circle((x, y), 0.14, facecolor="white", edgecolor=INK, linewidth=1.3, zorder=5))
        self.text(x, y - 0.005, "+", 12)

    def save(self, path: str) -> None:
        """Write a PNG, compressed as far as its few colours allow."""
        import matplotlib.pyplot as plt

        self.figure.savefig(path, dpi=120, facecolor="white", pil_kwargs={"optimize": True})
        plt.close(self.figure)


@dataclass(frozen=True)
class Layout:
    """Positions in inches that follow from the geometry."""

    scale: float  # inches of `dim` features
    body: float  # height of the tallest column of matrices
    floor: float  # y of the lowest matrix
    stream: float  # y of the residual stream
    height: float

    @classmethod
    def of(cls, partition: Partition) -> Layout:
        """Return a layout that fills the width; the height follows."""
        args = partition.args
        ffn, q = args.ffn_dim / args.dim, args.n_heads * args.head_dim / args.dim
        fixed = 2 * MARGIN + 2 * TABLE_WIDTH + 7.0 * STEP + 1.96
        scale = min(1.55, (WIDTH - fixed) / (3 + q + ffn))
        kv = _kv_height(partition, scale)
        body = max(scale * q + 2 * kv + 2 * STACK_GAP, scale * ffn, 3.0)
        floor = 1.12 + ROW_HEIGHT * (partition.world_size + 1)
        stream = floor + body + 1.25
        return cls(scale, body, floor, stream, stream + 1.25)


def _kv_height(partition: Partition, scale: float) -> float:
    """Return the height of wk and wv in inches, copies included; to scale where that can be seen."""
    return max(SMALLEST_BOX, scale * sum(map(len, partition.kv_rows)) / partition.args.dim)


def draw(partition: Partition, name: str, path: str) -> None:
    """Write the picture of a partition.

    Args:
        partition: the cut to draw.
        name: of the model, for the title.
        path: of the PNG.
    """
    layout = Layout.of(partition)
    picture = Picture(WIDTH, layout.height)
    _title(picture, layout, partition, name)
    x = _embedding(picture, layout, partition)
    x = _attention(picture, layout, partition, x)
    x = _feed_forward(picture, layout, partition, x)
    _output(picture, layout, partition, x)
    _legend(picture, layout, partition)
    picture.save(path)


def _title(picture: Picture, layout: Layout, partition: Partition, name: str) -> None:
    args, size = partition.args, partition.world_size
    shares = " : ".join(f"{weight * 100:.0f}" for weight in partition.weights)
    how = "equal shares" if len(set(partition.weights)) == 1 else f"shares {shares}"
    top = layout.height - 0.38
    picture.text(MARGIN, top, f"{name} on {size} ranks, {how}", 17, ha="left", weight="bold")
    note = (
        f"one of {args.n_layers} layers, drawn to scale: dim {args.dim:,}, {args.n_heads} query heads and "
        f"{args.n_kv_heads} KV heads of {args.head_dim}, FFN {args.ffn_dim:,}; "
        f"vocabulary {args.vocab_size:,} (the two tables and the smallest boxes not to scale)"
    )
    picture.text(MARGIN, top - 0.34, note, 10, ha="left", color=SOFT)


def _embedding(picture: Picture, layout: Layout, partition: Partition) -> float:
    """Draw the embedding and the start of the residual stream; return the x behind them."""
    args = partition.args
    box = Box(
        MARGIN, layout.floor + 0.35, TABLE_WIDTH, layout.body - 0.35, partition.vocab, True, _details(partition.vocab)
    )
    picture.matrix(box, "tok_embeddings", f"{args.vocab_size:,} × {args.dim:,}", "cut in rows")
    pill_x = MARGIN + TABLE_WIDTH + 0.28
    middle = box.y + box.height / 2
    picture.pill(pill_x, middle - 0.95, 0.30, 1.9, "all-reduce, once", rotation=90)
    picture.arrow((MARGIN + TABLE_WIDTH, middle), (pill_x, middle))
    picture.text(MARGIN + TABLE_WIDTH / 2, layout.floor + 0.1, "token ids ↑", 9, color=SOFT)
    start = pill_x + 0.15
    right = WIDTH - MARGIN - TABLE_WIDTH / 2
    picture.ax.plot((start, start), (middle + 0.95, layout.stream), color=LINE, linewidth=1.6, zorder=1)
    picture.ax.plot((start - 0.014, right), (layout.stream, layout.stream), color=INK, linewidth=3.2, zorder=2)
    words = f"residual stream [tokens, {args.dim:,}]: the same on every rank"
    picture.text(start + 0.12, layout.stream + 0.17, words, 10, ha="left")
    return pill_x + 0.30


def _attention(picture: Picture, layout: Layout, partition: Partition, x: float) -> float:
    """Draw wq, wk, wv, wo and their all-reduce; return the x behind them."""
    args, scale, fits = partition.args, layout.scale, partition.world_size <= partition.args.n_kv_heads
    q, kv = scale * args.n_heads * args.head_dim / args.dim, _kv_height(partition, scale)
    left = x + 0.75 * STEP
    first, second = left + 0.8 * STEP, left + 0.8 * STEP + scale + STEP
    pill = second + q + 0.8 * STEP
    right = pill + 0.30 + 0.35 * STEP
    _layer_panel(picture, layout, left, right, "attention: " + ("whole KV groups" if fits else "parts of KV groups"))
    top = layout.floor + layout.body
    y_q, y_k = top - q, top - q - STACK_GAP - kv
    y_v = y_k - STACK_GAP - kv
    heads, kv_heads = _details(partition.heads, "heads"), _details(partition.kv_heads, "heads")
    copies = sum(map(len, partition.kv_heads))
    kv_note = (
        f"{args.n_kv_heads} KV heads, {copies} copies"
        if copies > args.n_kv_heads
        else f"rows: {args.n_kv_heads} KV heads"
    )
    wide = f"{args.n_heads * args.head_dim:,} × {args.dim:,}"
    narrow = f"{args.n_kv_heads * args.head_dim:,} × {args.dim:,}"
    picture.matrix(Box(first, y_q, scale, q, partition.q_rows, True, heads), "wq", wide, f"rows: {args.n_heads} heads")
    picture.matrix(Box(first, y_k, scale, kv, partition.kv_rows, True, kv_heads), "wk", narrow, kv_note)
    picture.matrix(Box(first, y_v, scale, kv, partition.kv_rows, True, kv_heads), "wv", narrow, kv_note)
    middle = y_q + q / 2
    out = Box(second, middle - scale / 2, q, scale, partition.q_rows, False, heads)
    picture.matrix(out, "wo", f"{args.dim:,} × {args.n_heads * args.head_dim:,}", f"columns: {args.n_heads} heads")
    picture.arrow((first + scale, middle), (second, middle))
    join = first + scale + 0.45 * STEP
    for below in (y_k + kv / 2, y_v + kv / 2):
        picture.line((first + scale, below), (join, below), (join, middle))
    _note(picture, second, out.y, "each rank attends with\nits own heads and its\nown part of the cache")
    _in(picture, layout, left + 0.38 * STEP, [(first, middle), (first, y_k + kv / 2), (first, y_v + kv / 2)])
    _out(picture, layout, (second + q, middle), pill, "all-reduce 1")
    return right


def _feed_forward(picture: Picture, layout: Layout, partition: Partition, x: float) -> float:
    """Draw w1, w3, w2 and their all-reduce; return the x behind them."""
    args, scale = partition.args, layout.scale
    ffn = scale * args.ffn_dim / args.dim
    left = x + 0.35 * STEP
    first = left + 0.8 * STEP
    second = first + scale + 0.28
    third = second + scale + STEP
    pill = third + ffn + 0.8 * STEP
    right = pill + 0.30 + 0.35 * STEP
    _layer_panel(picture, layout, left, right, "feed-forward: blocks of columns, making up for uneven heads")
    top = layout.floor + layout.body
    y = top - ffn
    columns = _details(partition.ffn)
    tall, flat = f"{args.ffn_dim:,} × {args.dim:,}", f"{args.dim:,} × {args.ffn_dim:,}"
    picture.matrix(Box(first, y, scale, ffn, partition.ffn, True, columns), "w1", tall, "cut in rows")
    picture.matrix(Box(second, y, scale, ffn, partition.ffn, True, columns), "w3", tall, "cut in rows")
    middle = y + ffn / 2
    out = Box(third, middle - scale / 2, ffn, scale, partition.ffn, False, columns)
    picture.matrix(out, "w2", flat, "cut in columns")
    picture.arrow((second + scale, middle), (third, middle))
    _note(picture, third, out.y, "silu(w1 x) · (w3 x) on each rank's own columns")
    _in(picture, layout, left + 0.38 * STEP, [(first, middle)])
    _out(picture, layout, (third + ffn, middle), pill, "all-reduce 2")
    return right


def _layer_panel(picture: Picture, layout: Layout, left: float, right: float, title: str) -> None:
    picture.panel(left, layout.floor - 0.42, right - left, layout.stream - layout.floor + 0.10, title)


def _note(picture: Picture, x: float, top: float, text: str) -> None:
    picture.text(x, top - 0.12, text, 8, ha="left", va="top", color=SOFT, linespacing=1.35)


def _in(picture: Picture, layout: Layout, x: float, targets: Sequence[tuple[float, float]]) -> None:
    """Draw arrows from the residual stream through the norm to `targets`."""
    for target in targets:
        picture.arrow((x, layout.stream), (x, target[1]), target)
    picture.text(x + 0.07, layout.stream - 0.20, "norm", 8, ha="left", color=SOFT)


def _out(picture: Picture, layout: Layout, start: tuple[float, float], x: float, text: str) -> None:
    """Draw arrows from a row-parallel matrix through an all-reduce back to the residual stream."""
    half = 0.72
    picture.arrow(start, (x, start[1]))
    picture.pill(x, start[1] - half, 0.30, 2 * half, text, rotation=90)
    picture.arrow((x + 0.15, start[1] + half), (x + 0.15, layout.stream - 0.14))
    picture.plus(x + 0.15, layout.stream)


def _output(picture: Picture, layout: Layout, partition: Partition, x: float) -> None:
    """Draw the output layer at the end of the residual stream."""
    args = partition.args
    left = WIDTH - MARGIN - TABLE_WIDTH
    box = Box(
        left, layout.floor + 0.35, TABLE_WIDTH, layout.body - 0.35, partition.vocab, True, _details(partition.vocab)
    )
    tie = "the embedding itself" if args.tied else "cut in rows"
    picture.matrix(box, "output", f"{args.vocab_size:,} × {args.dim:,}", tie)
    middle = left + TABLE_WIDTH / 2
    picture.arrow((middle, layout.stream), (middle, box.y + box.height + 0.60))
    picture.text(middle - 0.07, layout.stream - 0.20, "norm", 8, ha="right", color=SOFT)
    picture.text(middle, layout.floor + 0.1, "logits, each rank's rows;", 8, color=SOFT)
    picture.text(middle, layout.floor - 0.06, "the best are gathered", 8, color=SOFT)


def _legend(picture: Picture, layout: Layout, partition: Partition) -> None:
    """Draw the table of what each rank holds, with its colours."""
    columns = (MARGIN + 0.55, 2.7, 5.0, 7.0, 9.6, 12.6, 14.8)
    top = layout.floor - 0.85
    for x, title in zip(columns, HEADER, strict=True):
        picture.text(x, top, title, 9.5, ha="left", weight="bold", color=SOFT)
    picture.ax.plot((MARGIN, WIDTH - MARGIN), (top - 0.16, top - 0.16), color="#D8DCE2", linewidth=1)
    for rank, row in enumerate(summary(partition)):
        y = top - ROW_HEIGHT * (rank + 1) - 0.03
        picture.patch(MARGIN, y - 0.10, 0.40, 0.20, rank)
        for x, cell in zip(columns, row, strict=True):
            picture.text(x, y, cell, 10, ha="left")


def _title_of(geometry: str) -> str:
    """Return a geometry's name as people write it: "Llama 2 7B" for "llama-2-7b"."""
    family, *words, size = geometry.split("-")
    return " ".join((family.capitalize(), *words, size.upper()))


def main(
    geometry: str = "llama-2-7b",
    nproc: int = 3,
    tensor_split: str | None = None,
    output: str | None = None,
    print_only: bool = False,
) -> None:
    """Print or draw how a published geometry is cut across ranks.

    Args:
        geometry: such as llama-2-7b or llama-3-8b; see llama/config.py.
        nproc: ranks.
        tensor_split: the ranks' weights, such as 3,1.
        output: PNG to write.
        print_only: only print, even with an output.
    """
    check_writable(output)
    if nproc < 1:
        raise LlamaError(f"nproc must be at least 1, is {nproc}")
    partition = Partition.create(published_geometry(geometry), nproc, tensor_split)
    print(as_text(summary(partition)))
    if output is not None and not print_only:
        draw(partition, _title_of(geometry), output)


if __name__ == "__main__":
    run(main)
