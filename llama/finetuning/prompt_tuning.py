"""Prompt tuning (arXiv:2104.08691): the only thing that is trained is what stands before the text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama.adapters.adapter import PromptAdapter
from llama.errors import UsageError
from llama.model import Transformer
from llama.parallel.trained import Trained
from llama.tokenizer import Tokenizer


class SoftPrompt:
    """Virtual tokens' embeddings, float32, the same on every rank.

    Args:
        model: the frozen model that they stand before.
        embeddings: [n_virtual_tokens, dim]; what they start from.
        init_text: the text that they start from, if it was one.
    """

    def __init__(self, model: Transformer, embeddings: Tensor, init_text: str | None = None) -> None:
        self.init_text = init_text
        self.parameter = nn.Parameter(embeddings.detach().float().clone().to(model.ranks.device))
        # Every rank sees the whole gradient: the residual stream's is summed over the ranks in each block.
        self.trained = [Trained("prompt_embeddings", self.parameter, model.ranks)]

    @property
    def n_virtual(self) -> int:
        """Virtual tokens."""
        return self.parameter.shape[0]

    def embeddings(self) -> Tensor | None:
        """What stands before every text, [P, dim] float32, with gradient."""
        return self.parameter

    def begin_pass(self, step: int, micro: int) -> None:
        """Nothing here is random."""

    def see(self, rows: Tensor) -> None:
        """Nothing here depends on them."""

    def adapter(self, base_model: str | None = None) -> PromptAdapter:
        """The soft prompt as it is now, on the CPU."""
        return PromptAdapter(self.parameter.detach().cpu().clone(), self.init_text, base_model)


def initial_embeddings(model: Transformer, tokenizer: Tokenizer, n_virtual: int, text: str | None, seed: int) -> Tensor:
    """What a soft prompt starts from, [n_virtual, dim] float32; a collective call.

    Args:
        model: whose embedding table is read.
        tokenizer: of the text.
        n_virtual: virtual tokens.
        text: its tokens' embeddings are taken, repeated or cut to `n_virtual` as in PEFT; None draws tokens of
            the vocabulary by the seed (the paper's "sampled vocabulary": embeddings of the right size, where
            PEFT's standard normals are fifty times as large as a Llama's).
        seed: of the draw.

    Raises:
        UsageError: when the text has no token.
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
