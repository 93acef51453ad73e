"""How much memory a training step takes beyond the frozen weights: what autograd keeps, added up.

The weights are frozen, so a linear keeps nothing of its input for its backward, unless LoRA trains it; what is
kept is what products of two activations, norms and attention need. This file follows `llama.model`,
`llama.finetuning.packing` and `llama.finetuning.loss` line by line, and a test counts what a step allocates.

Shape legend: N computed tokens of a batch, B examples, T tokens of one, P virtual tokens, M supervised places,
S entries that one example sees, E dim, Q and K the widths of this rank's queries and keys, F its FFN columns,
H its heads, V' its part of the vocabulary, r the rank of a LoRA. All results are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llama.checkpoint.activations import FLOAT, INDEX, Kernels, Workload
from llama.parallel.partition import Partition
from llama.parallel.vocab import LOGIT_FLOATS

# A trained number, its gradient and Adam's two moments.
TRAINED_FLOATS = 4
# Tensors [N, E] in float32 that an RMSNorm's backward makes.
NORM_BACKWARD = 5
# Places to which a CPU pads a row of attention, see `llama.finetuning.packed`.
PADDING = 16
# Sums over the ranks, [N, E], that the thread or stream which reduces may not have let go of yet.
REDUCING = 4


@dataclass(frozen=True)
class Training(Workload):
    """A training run; `n_prompts` are the examples that one copy of the model takes at a time.

    Args:
        method: "prompt" or "lora".
        n_virtual: virtual tokens of a soft prompt; 0 with LoRA.
        lora_r: rank of the updates.
        lora_targets: kinds of linears that LoRA updates, by Meta's names.
        lora_dropout: whether LoRA leaves features out.
        checkpointing: whether only the blocks' inputs are kept, and the rest is computed again.
        copies: of the model, which share a batch out.
        lengths: tokens of the longest examples, longest first, as many as `n_prompts`, where the data is known;
            otherwise every example is taken to have `length`.
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
        """Tokens that are computed for each example of the largest batch: the last of each is only ever a target."""
        lengths = self.lengths[: self.n_prompts] or (self.length,) * self.n_prompts
        return tuple(min(length, self.length) - 1 for length in lengths)

    def words(self) -> str:
        """Such as "8 examples of 512 tokens"; with `lengths`, of how many the longest have together."""
        examples = "1 example" if self.n_prompts == 1 else f"{self.n_prompts} examples"
        if not self.lengths:
            return f"{examples} of {self.length} tokens"
        return f"{examples} of {sum(self.texts) + len(self.texts)} tokens together"

    def flags(self) -> dict[str, object]:
        """Flags of `ft_main.py`."""
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
    """What one rank needs for a training step beside its frozen weights.

    Args:
        trained: what is trained in float32, its gradients and Adam's moments.
        kept: for the backward, at its most.
        temporaries: at the moment at which most is held.
    """

    trained: int
    kept: int
    temporaries: int


def training_bytes(partition: Partition, rank: int, work: Training, kernels: Kernels) -> TrainingBytes:
    """What `rank` needs to train on full examples that share nothing but the soft prompt."""
    return _Step(partition, rank, work, kernels).total()


class _Step:
    """Forward, loss and backward of a batch on one rank."""

    def __init__(self, partition: Partition, rank: int, work: Training, kernels: Kernels) -> None:
        args = partition.args
        self.work, self.itemsize, self.fused = work, kernels.itemsize, kernels.fused
        self.on_cpu = kernels.threads > 0
        self.n_layers, self.dim, self.head_dim = args.n_layers, args.dim, args.head_dim
        self.n_examples, self.n_text, self.longest = len(work.texts), sum(work.texts), max(work.texts)
        self.n_tokens = work.n_virtual + self.n_text
        self.n_heads = len(partition.heads[rank])
        self.q, self.kv = len(partition.q_rows[rank]), len(partition.kv_rows[rank])
        self.ffn, self.vocab = len(partition.ffn[rank]), len(partition.vocab[rank])
        self.reduces = partition.world_size > 1
        self.stream = self.n_tokens * args.dim * kernels.itemsize  # [N, E]
        self.wide = self.n_tokens * args.dim * FLOAT  # [N, E] float32
        self.width = self.n_tokens * self.ffn * kernels.itemsize  # [N, F]
        self.sizes = {
            "wq": (args.dim, self.q), "wk": (args.dim, self.kv), "wv": (args.dim, self.kv), "wo": (self.q, args.dim),
            "w1": (args.dim, self.ffn), "w3": (args.dim, self.ffn), "w2": (self.ffn, args.dim),
        }  # fmt: skip

    def total(self) -> TrainingBytes:
        block, last = self._block(), self._norm()
        throughout = self._throughout()
        if self.work.checkpointing:
            inputs = self.n_layers * self.stream
            # The last block is computed again; in float32 its first norm keeps the block's input itself.
            again = block - (self.wide if self.itemsize == FLOAT else 0)
            moments = ((inputs + last, self._at_the_end()), (inputs + again, self._within_a_block()))
        else:
            blocks = self.n_layers * block - self._not_in_the_first_block()
            moments = ((blocks + last, self._at_the_end()), (blocks, self._within_a_block()))
        kept, temporaries = max(moments, key=sum)
        return TrainingBytes(
            self._trained() * TRAINED_FLOATS * FLOAT,
            throughout + kept,
            temporaries + REDUCING * self.reduces * self.stream,
        )

    def _trained(self) -> int:
        """Numbers that are trained on this rank."""
        if self.work.method == "prompt":
            return self.work.n_virtual * self.dim
        return self.n_layers * self.work.lora_r * sum(sum(self.sizes[name]) for name in self.work.lora_targets)

    # -- kept for the backward -------------------------------------------------------------------------

    def _throughout(self) -> int:
        """The batch itself: tokens, positions, targets, supervised places and weights; RoPE's table; the mask."""
        per_token = 5 * INDEX + 3 * FLOAT + self.head_dim * FLOAT  # a place's loss and norm among them
        return self.n_tokens * per_token + self._mask_entries()

    def _norm(self) -> int:
        """RMSNorm's input and one factor a token, as `llama.lean` keeps them."""
        return self.stream + self.n_tokens * FLOAT

    def _block(self) -> int:
        # SwiGLU keeps both linears' outputs and the first one's activation.
        return 2 * self._norm() + self._attention() + 3 * self.width + self._lora()

    def _attention(self) -> int:
        """Queries, the keys and values that each example sees, outputs and what the softmax needs."""
        queries = self.n_tokens * self.q
        n_seen = self.n_tokens + self.n_examples * self.work.n_virtual
        if self.on_cpu:
            # Padded rows in `llama.lean`, whose softmax is not kept; the mask as numbers for every head of a group.
            rows = int((queries + 2 * n_seen * self.kv) * self._padded())
            return (rows + self.q // self.kv * self._mask_entries()) * self.itemsize
        if not self.fused:
            # Repeated for each head and scaled in float32, with all probabilities.
            return (queries + 2 * n_seen * self.q + self._scores()) * FLOAT + queries * self.itemsize
        # Where examples differ in length their queries are padded beside the row, which the prefix keeps.
        rows = 3 * queries + 2 * n_seen * self.kv + self._mask_entries()
        return rows * self.itemsize + self.n_tokens * self.n_heads * FLOAT

    def _padded(self) -> float:
        """By how much a CPU's padding of attention makes rows longer, at its most."""
        return 1 + self.n_examples * PADDING / self.n_tokens

    def _mask_entries(self) -> int:
        """[T, S]: every example sees the soft prompt and, causally, itself."""
        return self.longest * (self.work.n_virtual + self.longest)

    def _scores(self) -> int:
        """[B, H, T, S]: where no fused kernel serves, all of them exist."""
        return self.n_examples * self.n_heads * self._mask_entries()

    def _lora(self) -> int:
        """The linears' inputs (with dropout each its own), what lies between A and B, and both in the dtype."""
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
        return self.n_tokens * (kept + between) + (narrow if itemsize < FLOAT else 0)

    def _not_in_the_first_block(self) -> int:
        """LoRA's gradient ends at the first linear that it updates: what lies before it keeps nothing."""
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
        """The loss of all places but the first of each example, and the backward of the last norm."""
        supervised = self.n_text * self.dim * self.itemsize  # [M, E]
        rows = min(self.n_text, max(1, LOGIT_FLOATS // self.vocab))
        # A piece's logits in the dtype and in float32, where they become slopes in place; slopes of pieces done.
        copied = self.itemsize if self.itemsize < FLOAT else 0
        logits = rows * self.vocab * (FLOAT + 2 * copied) + 2 * rows * FLOAT + (supervised if rows < self.n_text else 0)
        loss = self.stream + supervised + max(logits, 2 * supervised)
        return max(loss, NORM_BACKWARD * self.wide)

    def _within_a_block(self) -> int:
        """The backward of the last block: of SwiGLU, its norm, or attention, beyond what a whole block keeps."""
        # The gradients of the heads' output, of the row of queries, keys and values, and of the groups'.
        inner = (3 * self.q + 4 * self.kv) * self.n_tokens * self.itemsize
        if self.on_cpu:
            # The softmax, its gradient and that of the scores.
            inner = int(inner * self._padded()) + 3 * self._scores() * self.itemsize
        elif not self.fused:
            inner += 2 * self._scores() * FLOAT
        freed = 3 * self.width
        return self.stream + max(3 * self.width, NORM_BACKWARD * self.wide - freed, inner - freed - self._norm())
