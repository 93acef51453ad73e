"""Prompt tuning (arXiv:2104.08691): the embeddings of virtual tokens before the text are trained, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama.adapters.adapter import PromptAdapter
from llama.errors import UsageError
from llama.model import Transformer
from llama.parallel.trained import Trained
from llama.tokenizer import Tokenizer


class SoftPrompt:
    """A soft prompt: embeddings of virtual tokens, float32, the same on every rank.

    Args:
        model: the frozen model.
        embeddings: the initial ones, [n_virtual_tokens, dim].
        init_text: the text whose embeddings these are; None where they are not a text's.
    """

    def __init__(self, model: Transformer, embeddings: Tensor, init_text: str | None = None) -> None:
        self.init_text = init_text
        self.parameter = nn.Parameter(embeddings.detach().float().clone().to(model.ranks.device))
        # Every rank has the whole gradient: each block's backward sums the residual stream's over the ranks.
        self.trained = [Trained("prompt_embeddings", self.parameter, model.ranks)]

    @property
    def n_virtual(self) -> int:
        """Number of virtual tokens."""
        return self.parameter.shape[0]

    def embeddings(self) -> Tensor | None:
        """Return the virtual tokens' embeddings, [P, dim] float32, with gradient."""
        return self.parameter

    def begin_pass(self, step: int, micro: int) -> None:
        """Do nothing: a soft prompt has no dropout."""

    def see(self, rows: Tensor) -> None:
        """Do nothing: a soft prompt has no dropout."""

    def adapter(self, base_model: str | None = None) -> PromptAdapter:
        """Return a copy of the soft prompt on the CPU."""
        return PromptAdapter(self.parameter.detach().cpu().clone(), self.init_text, base_model)


def initial_embeddings(model: Transformer, tokenizer: Tokenizer, n_virtual: int, text: str | None, seed: int) -> Tensor:
    """Return a soft prompt's initial embeddings, [n_virtual, dim] float32; a collective call.

    Args:
        model: the model whose embedding table is read.
        tokenizer: encodes the text.
        n_virtual: number of virtual tokens.
        text: text whose tokens are looked up, repeated or cut to `n_virtual` as in PEFT; None draws tokens of the
            vocabulary at random (the paper's "sampled vocabulary"). Embeddings of real tokens have the right size,
            where PEFT's standard normals are fifty times as large as a Llama's embeddings.
        seed: of the draw.

    Raises:
        UsageError: when the text is blank.
    """
    if text is None:
        n_words = min(tokenizer.n_words, model.args.vocab_size)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(n_words, (n_virtual,), generator=generator).tolist()
    else:
        ids = tokenizer.encode(text, bos=True, eos=False)
        if not text.strip():
            raise UsageError("--init_text is blank: give a text, or --init random")
        ids = (ids * -(-n_virtual // len(ids)))[:n_virtual]
    with torch.no_grad():
        return model.tok_embeddings(torch.tensor(ids, device=model.ranks.device)).float()
