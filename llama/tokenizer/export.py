"""Tokenizers written as Hugging Face's `tokenizer.json`, from SentencePiece models and tiktoken ranks.

Only the `tokenizers` library is needed. Merges are recovered from the vocabulary, as in transformers'
convert_slow_tokenizer.py. The new tokenizer is compared with the original on awkward texts before it is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

from llama.errors import TokenizerError
from llama.tokenizer import Tokenizer, load_tokenizer
from llama.tokenizer.base import SPACE_MARK
from llama.tokenizer.bpe import SPLIT_PATTERN, read_ranks
from llama.tokenizer.vocabulary import all_merges, spell

# Texts on which tokenizers that are nearly the same differ.
PROBES = (
    "", " ", "   ", "a", " a", "a ", "  two  blanks  ", "\n\n\ttabs\r\nand ends \n",
    "The quick brown fox, 12345 times.",
    "naïve café œuvre", "你好，世界", "日本語のテキスト", "🦙 emoji 👩‍👩‍👧‍👦", "don't I'LL we've",
    "x" * 40 + "aaaaabaaab" * 5,
    "\x00\x7f", "ﬁ ligature ① ｆｕｌｌ", "e\u0301 combining", "def f(x):\n    return x**2  # code", "<0x0A> ▁ mark",
)  # fmt: skip


def write_hf_tokenizer(file: Path, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` of a SentencePiece model or of tiktoken ranks.

    `transformers.AutoTokenizer` opens the folder; a text gets BOS in front, as published Llamas' do.

    Args:
        file: the tokenizer.
        folder: where to; it exists.

    Raises:
        TokenizerError: when no tokenizer.json gives the same ids, or the file is of another kind.
    """
    ours = load_tokenizer(file)
    if ours.kind == "sentencepiece":
        core = _from_sentencepiece(sentencepiece.SentencePieceProcessor(model_file=str(file)), ours)
    elif ours.kind == "tiktoken":
        core = _from_ranks(read_ranks(file.read_bytes(), str(file)), ours)
    else:
        raise TokenizerError(f"{file} is a tokenizer.json already: copy it")
    _check_same(core, ours, file)
    names = {token_id: name for name, token_id in ours.special_tokens.items()}
    bos = names[ours.bos_id]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, ours.bos_id)]
    )
    core.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(ours, folder)


def write_tokenizer_config(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer_config.json`, which makes `AutoTokenizer` use the `tokenizer.json` beside it unchanged."""
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    config = {
        # LlamaTokenizer would build a pipeline of its own around the vocabulary.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names.get(tokenizer.bos_id),
        "eos_token": names.get(tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if "<unk>" in names.values():
        config["unk_token"] = "<unk>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _from_sentencepiece(sp: sentencepiece.SentencePieceProcessor, ours: Tokenizer) -> Core:
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # Merging goes by score, best first; control, unknown and byte pieces never come from merges.
    mergeable = {
        piece: -sp.get_score(i)
        for i, piece in enumerate(pieces)
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))
    }
    model = models.BPE(
        vocab=vocab, merges=all_merges(mergeable, vocab), unk_token=sp.id_to_piece(sp.unk_id()), fuse_unk=True,
        byte_fallback=any(sp.is_byte(i) for i in range(len(pieces))),
    )  # fmt: skip
    core = Core(model)
    adds_blank = sp.normalize("a").startswith(SPACE_MARK)
    core.normalizer = normalizers.Sequence(_blanks(sp, adds_blank))
    ends = [decoders.Strip(content=" ", left=1)] if adds_blank else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ours.special_tokens])
    return core


def _blanks(sp: sentencepiece.SentencePieceProcessor, adds_blank: bool) -> list[Any]:
    """Return the steps by which SentencePiece normalizes blanks before it looks for pieces."""
    steps: list[Any] = []
    if sp.normalize("a  b ").count(SPACE_MARK) == 1 + adds_blank:  # extra blanks are removed
        steps = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if adds_blank:
        steps.append(normalizers.Prepend(SPACE_MARK))
    return [*steps, normalizers.Replace(" ", SPACE_MARK)]


def _from_ranks(ranks: Mapping[bytes, int], ours: Tokenizer) -> Core:
    vocab = {spell(token): rank for token, rank in ranks.items()}
    model = models.BPE(vocab=vocab, merges=all_merges(vocab, vocab), fuse_unk=False)
    model.ignore_merges = True  # a word that is in the vocabulary is one token, however it came about
    core = Core(model)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    in_order = sorted(ours.special_tokens, key=ours.special_tokens.__getitem__)
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in in_order])
    return core


def _check_same(core: Core, ours: Tokenizer, file: Path) -> None:
    for text in PROBES:
        expected = ours.encode(text, bos=False, eos=False)
        found = core.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise TokenizerError(
                f"{file} cannot be written as a tokenizer.json that gives the same ids: {text!r} would be "
                f"{found[:8]}, not {expected[:8]}"
            )
