"""Memory of a training step beyond the frozen weights: the tensors that autograd keeps, added up.

The weights are frozen, so a linear keeps nothing of its input for its backward, unless LoRA trains the linear; only
products of two activations, norms and attention keep tensors. This file follows `llama.model`, `llama.ops`,
`llama.finetuning.packing` and `llama.finetuning.loss` line by line, and a test counts what a step allocates.

Shape legend: N computed tokens of a batch, T tokens of an example, P virtual tokens, M supervised places, S entries
that one example sees, E dim, Q and K the widths of this rank's queries and keys, F its FFN columns, H its heads, D
head_dim, V' its part of the vocabulary, r the rank of a LoRA. All results are bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from llama.kernels.formats import Form
from llama.kernels.products import round_up
from llama.offload import spread
from llama.parallel.partition import Partition
from llama.parallel.vocab import loss_rows
from llama.plan.inference import FLOAT, INDEX, Kernels, Product, Workload
from llama.quantization.scheme import OUTPUT, Scheme

# A trained number, its gradient and Adam's two moments.
TRAINED_FLOATS = 4
# Generator state of a CPU that torch's checkpointing sets aside for each block.
RNG_STATE = 5056
# Bytes of a 16-bit matrix that oneDNN reorders at a time in each thread, and of its tiles; as measured.
LAID_OUT, TILES = 4 << 20, 8 << 10
# Sums over the ranks, [N, E], that the reducing thread or stream may still hold.
REDUCING = 4


@dataclass(frozen=True)
class Training(Workload):
    """A training run; `n_prompts` are the examples that one copy of the model takes at a time.

    Args:
        method: "prompt" or "lora".
        n_virtual: virtual tokens of a soft prompt; 0 with LoRA.
        lora_r: rank of the updates.
        lora_targets: kinds of linears that LoRA updates, by Meta's names.
        lora_dropout: true where LoRA leaves features out.
        checkpointing: true where only the blocks' inputs are kept, and the rest is computed again.
        copies: of the model, among which a batch is shared out.
        lengths: tokens of the `n_prompts` longest examples, longest first; empty where the data is not known, so
            that every example counts as `length` tokens.
    """

    method: str = "prompt"
    n_virtual: int = 0
    lora_r: int = 8
    lora_targets: tuple[str, ...] = ("wq", "wv")
    lora_dropout: bool = False
    checkpointing: bool = False
    copies: int = 1
    lengths: tuple[int, ...] = ()

    program: ClassVar[str] = "ft_main.py"

    @property
    def texts(self) -> tuple[int, ...]:
        """Computed tokens of each example of the largest batch: an example's last token is only ever a target."""
        lengths = self.lengths[: self.n_prompts] or (self.length,) * self.n_prompts
        return tuple(min(length, self.length) - 1 for length in lengths)

    def words(self) -> str:
        """Return such as "8 examples of 512 tokens"; with `lengths`, the tokens of the longest examples together."""
        examples = "1 example" if self.n_prompts == 1 else f"{self.n_prompts} examples"
        if not self.lengths:
            return f"{examples} of {self.length} tokens"
        return f"{examples} of {sum(self.texts) + len(self.texts)} tokens together"

    def flags(self) -> dict[str, object]:
        """Return the flags of `ft_main.py` by name."""
        flags: dict[str, object] = {"method": self.method}
        if self.method == "prompt":
            flags["num_virtual_tokens"] = self.n_virtual
        else:
            flags |= {"lora_r": self.lora_r, "lora_targets": ",".join(self.lora_targets)}
            flags["lora_dropout"] = None if self.lora_dropout else 0
        flags |= {"max_seq_len": self.length, "batch_size": self.n_prompts * self.copies}
        return flags | {"activation_checkpointing": self.checkpointing or None}


@dataclass(frozen=True)
class TrainingBytes:
    """The memory of one rank's training step beside the frozen weights, in bytes.

    Args:
        trained: the trained numbers in float32, their gradients and Adam's moments.
        kept: for the backward, at the moment of the peak.
        temporaries: at the same moment.
    """

    trained: int
    kept: int
    temporaries: int


def training_bytes(
    partition: Partition,
    rank: int,
    work: Training,
    kernels: Kernels,
    scheme: Scheme | None = None,
    offload_layers: int = 0,
) -> TrainingBytes:
    """Return the needs of `rank` for a step on full examples that share nothing but the soft prompt.

    Args:
        partition, rank, work, kernels: of the run.
        scheme: the matrices that are held as integers.
        offload_layers: layers that are computed again in the backward, with checkpointing or without.
    """
    return _Step(partition, rank, work, kernels, scheme, offload_layers).total()


def _stretches(work: Training) -> list[tuple[int, int]]:
    """Return T and S of the soft prompt and of each example, the largest first.

    A single example and the soft prompt are one stretch.
    """
    if len(work.texts) == 1:
        whole = work.n_virtual + work.texts[0]
        return [(whole, whole), (0, 0)]
    own = [(length, work.n_virtual + length) for length in work.texts]
    return sorted([(work.n_virtual, work.n_virtual), *own], key=math.prod, reverse=True)


class _Step:
    """The forward, loss and backward of a batch on one rank."""

    def __init__(
        self,
        partition: Partition,
        rank: int,
        work: Training,
        kernels: Kernels,
        scheme: Scheme | None,
        offload_layers: int,
    ) -> None:
        args = partition.args
        self.kernels = kernels
        self.form = None if scheme is None else scheme.linears
        self.output_form = None if scheme is None else scheme.form(OUTPUT, args)
        again = range(args.n_layers) if work.checkpointing else spread(offload_layers, args.n_layers)
        self.again = frozenset(again)  # layers that are computed twice
        self.work, self.itemsize, self.threads = work, kernels.itemsize, kernels.threads
        self.narrow = self.itemsize < FLOAT
        self.n_layers, self.dim, self.head_dim = args.n_layers, args.dim, args.head_dim
        self.n_tokens, self.n_places = round_up(work.n_virtual + sum(work.texts)), round_up(sum(work.texts))
        self.stretches = _stretches(work)
        self.n_heads = len(partition.heads[rank])
        self.q, self.kv = len(partition.q_rows[rank]), len(partition.kv_rows[rank])
        self.ffn, self.vocab = len(partition.ffn[rank]), len(partition.vocab[rank])
        self.loss_rows = loss_rows(partition.vocab)
        self.reduces = partition.world_size > 1
        self.stream, self.width = self._row(args.dim), self._row(self.ffn)  # [N, E] and [N, F]
        self.queries, self.keys = self._row(self.q), self._row(self.kv)  # [N, Q] and [N, K]
        self.sizes = {
            "wq": (args.dim, self.q), "wk": (args.dim, self.kv), "wv": (args.dim, self.kv), "wo": (self.q, args.dim),
            "w1": (args.dim, self.ffn), "w3": (args.dim, self.ffn), "w2": (self.ffn, args.dim),
        }  # fmt: skip

    def _row(self, width: int) -> int:
        """Return the bytes of [N, width] in the model's dtype."""
        return self.n_tokens * width * self.itemsize

    def _wide(self, nbytes: int) -> int:
        """Return a tensor's bytes in float32, or in a wider dtype of the model."""
        return nbytes * max(FLOAT, self.itemsize) // self.itemsize

    def total(self) -> TrainingBytes:
        """Return the needs at the end of the forward or within the last block's backward, whichever holds more."""
        block, last = self._block(), self._norm()
        throughout = self._throughout()
        blocks = len(self.again) * (self.stream + RNG_STATE) + (self.n_layers - len(self.again)) * block
        if 0 not in self.again:
            blocks -= self._not_in_the_first_block()
        # Where the last block is computed again, its first norm keeps the block's input itself.
        anew = block - self.stream if self.n_layers - 1 in self.again else 0
        moments = ((blocks + last, self._at_the_end()), (blocks + anew, self._within_a_block()))
        kept, temporaries = max(moments, key=sum)
        return TrainingBytes(
            self._trained() * TRAINED_FLOATS * FLOAT,
            throughout + kept,
            temporaries + REDUCING * self.reduces * self.stream,
        )

    def _trained(self) -> int:
        """Return the count of numbers that are trained on this rank."""
        if self.work.method == "prompt":
            return self.work.n_virtual * self.dim
        return self.n_layers * self.work.lora_r * sum(sum(self.sizes[name]) for name in self.work.lora_targets)

    # -- kept for the backward -------------------------------------------------------------------------

    def _throughout(self) -> int:
        """The batch: tokens, positions, targets, supervised places and weights; RoPE's table; the biases."""
        per_token = 5 * INDEX + 3 * FLOAT + self.head_dim * FLOAT  # a place's loss and norm among them
        return self.n_tokens * per_token + self._biases()

    def _biases(self) -> int:
        """The masks [Q / K * T, S] of each stretch, the same in every layer."""
        return self.q // self.kv * sum(own * seen for own, seen in self.stretches) * self.itemsize

    def _norm(self) -> int:
        """RMSNorm's input and one factor a token."""
        return self.stream + self.n_tokens * FLOAT

    def _block(self) -> int:
        """All tensors that a block keeps."""
        # SwiGLU keeps both linears' outputs and the first one's activation.
        return 2 * self._norm() + self._attention() + 3 * self.width + self._lora()

    def _attention(self) -> int:
        """Queries, keys and values by heads; the softmax is computed again."""
        return self.queries + 2 * self.keys

    def _lora(self) -> int:
        """LoRA's inputs (with dropout, one for each linear), the products with A, and A and B in the dtype."""
        if self.work.method != "lora":
            return 0
        targets, itemsize = self.work.lora_targets, self.itemsize
        # wq, wk and wv have one input, and so have w1 and w3.
        inputs = {{"wk": "wq", "wv": "wq", "w3": "w1"}.get(name, name) for name in targets}
        if self.work.lora_dropout:
            kept = sum(self.sizes[name][0] for name in targets) * (itemsize + 1)
        else:
            kept = sum(self.sizes[name][0] for name in inputs) * itemsize
        narrow = itemsize * self.work.lora_r * sum(sum(self.sizes[name]) for name in targets)
        between = len(targets) * self.work.lora_r * itemsize
        return self.n_tokens * (kept + between) + (narrow if self.narrow else 0)

    def _not_in_the_first_block(self) -> int:
        """The tensors before the first updated linear, which are not kept: LoRA's gradient ends there."""
        if self.work.method != "lora":
            return 0
        targets, kept = set(self.work.lora_targets), self._norm()
        for names, before in (
            ({"wq", "wk", "wv"}, self._attention()),
            ({"wo"}, self._norm()),
            ({"w1", "w3"}, 3 * self.width),
        ):
            if names & targets:
                break
            kept += before
        return kept

    # -- temporaries -----------------------------------------------------------------------------------

    def _at_the_end(self) -> int:
        """The peak of the loss and of the last norm's backward; an example's first place is not supervised."""
        supervised = self.n_places * self.dim * self.itemsize  # [M, E]
        rows = min(self.n_places, self.loss_rows)
        # A piece's logits in float32, where they become slopes in place, and in the dtype; the slopes of [M, E].
        logits = rows * self.vocab * (FLOAT + self.itemsize * self.narrow) + supervised
        logits += self._product(self.vocab, self.dim, rows, self.output_form)
        output = Product(self.output_form, self.vocab, self.dim, self.kernels)
        logits = max(logits, rows * self.vocab * self.itemsize + output.forward(rows, kept=True))
        loss = self.stream + supervised + max(logits, 2 * supervised)
        return max(loss, self._norm_backward())

    def _product(self, n_rows: int, n_columns: int, n_tokens: int, form: Form | None) -> int:
        """The scratch memory of a product's backward; its input's gradient is counted already."""
        product = Product(form, n_rows, n_columns, self.kernels)
        return product.backward(n_tokens) + self._laid_out(product.piece if form else n_rows * n_columns)

    def _laid_out(self, entries: int) -> int:
        """The scratch memory of a CPU's product with a 16-bit matrix of so many entries."""
        return self.threads * self.narrow * (min(entries * self.itemsize, LAID_OUT) + TILES)

    def _norm_backward(self) -> int:
        """The incoming gradient; in float32 its product with the weight, that with the input, and a narrow input."""
        return self.stream + (3 if self.narrow else 2) * self._wide(self.stream)

    def _within_a_block(self) -> int:
        """The peak of the last block's backward beside the tensors that it keeps and the residual's gradient."""
        freed = 3 * self.width
        # SwiGLU's backward has three tensors; before it comes w2's backward, and before that w2's forward.
        down = self.width + self._product(self.dim, self.ffn, self.n_tokens, self.form)
        product = Product(self.form, self.dim, self.ffn, self.kernels)
        # Both norms' outputs wait in their frames; a gradient waits only where the block is computed again.
        waiting = 3 if self.n_layers - 1 in self.again else 2
        forward = waiting * self.stream + self.width + product.forward(self.n_tokens, kept=True)
        # Both gradients of w1 and w3 are there; the tensors that SwiGLU kept are freed.
        up = self.stream + self._product(self.ffn, self.dim, self.n_tokens, self.form) - self.width
        feed_forward = max(3 * self.width, down, forward, up)
        norm = self._norm_backward() - freed
        freed += self._norm()
        rows = max(self.q, self.kv)
        inward = self.stream + self.queries + self._product(rows, self.dim, self.n_tokens, self.form)
        outward = self.queries + self._product(self.dim, self.q, self.n_tokens, self.form)
        attention = max(
            self._attention_backward() - freed,
            outward - freed,
            max(self._turn_backward(), inward) - freed - self._attention(),
        )
        return self.stream + max(feed_forward, norm, attention)

    def _attention_backward(self) -> int:
        """Attention's backward in `llama.finetuning.packing`: gradients of all tokens, and the stretch at hand."""
        # The incoming gradient, its copy by heads and the queries' gradient; keys' and values' gradients in float32.
        throughout = 3 * self.queries + 2 * self._wide(self.keys)
        (own, seen), (own_before, seen_before) = self.stretches[:2]
        # Copies of the queries and of the incoming gradient, and the earlier stretch's copy of the latter; without
        # groups they are views. Copies of keys and values.
        copied = (2 * own + own_before) * self.q * (self.q > self.kv) + 2 * seen * self.kv
        # The softmax, its gradient and the scores' gradient, while the earlier stretch's scores' gradient is held.
        at_hand, before = (self.n_heads * entries for entries in (own * seen, own_before * seen_before))
        handed_back = self.queries + 2 * self.keys * self.narrow + 2 * at_hand * self.itemsize
        return throughout + copied * self.itemsize + max((3 * at_hand + before) * self.itemsize, handed_back)

    def _turn_backward(self) -> int:
        """RoPE's backward on the queries, beside the gradient of the input from keys and values."""
        wide = self._wide(self.queries)
        turned = wide + (wide + self.queries) * self.narrow
        return self.stream + self.queries + self.n_tokens * self.head_dim * FLOAT + turned
