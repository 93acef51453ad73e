"""Which tokenizer a file or a folder is, and what is said where it is none."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from llama.errors import TokenizerError
from llama.tokenizer import load_tokenizer


def spm_bytes() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the dog and the bird"] * 3),
        model_writer=model,
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def rank_bytes() -> bytes:
    return b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


def hf_bytes() -> bytes:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return core.to_str(pretty=True).encode()


KINDS = {"sentencepiece": spm_bytes, "tiktoken": rank_bytes, "hf": hf_bytes}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "x.bin"])
def test_content_decides_not_the_name(tmp_path, kind, name):
    (tmp_path / name).write_bytes(KINDS[kind]())
    assert load_tokenizer(tmp_path / name).kind == kind
    assert load_tokenizer(str(tmp_path / name)).kind == kind


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + hf_bytes())
    assert load_tokenizer(tmp_path).kind == "hf"


def test_a_folder_is_searched_in_order(tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(rank_bytes())
    assert load_tokenizer(tmp_path).kind == "tiktoken"
    (tmp_path / "tokenizer.json").write_bytes(hf_bytes())
    assert load_tokenizer(tmp_path).kind == "hf"
    (tmp_path / "tokenizer.model").write_bytes(spm_bytes())
    assert load_tokenizer(tmp_path).kind == "sentencepiece"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 499723\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
        (b"<html>", "a web page"),
        (b"PK\x03\x04" + bytes(100), "neither a SentencePiece model, nor"),
        (b"hello world\n", "neither a SentencePiece model, nor"),
        (b"\n\nhello", "neither a SentencePiece model, nor"),
        (b"\xff\xfe{", "neither a SentencePiece model, nor"),
        (json.dumps({"bos_token": "<s>"}).encode(), "JSON without a 'model'"),
        (b'{"model": 3}', "JSON without a 'model'"),
        (b'{"model": {"type": "BPE", ', "JSON but is damaged or cut short"),
        (spm_bytes()[:-7], "damaged or cut short"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_what_is_no_tokenizer_is_named_in_one_line(tmp_path, content, message):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*missing: there is no such file"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(TokenizerError, match=r"no tokenizer in .*: looked for tokenizer\.model, "):
        load_tokenizer(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "file" / "below")


def test_weights_are_not_read(tmp_path):
    file = tmp_path / "consolidated.00.pth"
    with file.open("wb") as sparse:
        sparse.truncate(10 * 1024**3)
    with pytest.raises(TokenizerError, match="10,737,418,240 bytes"):
        load_tokenizer(file)


@pytest.mark.slow
def test_the_import_is_light():
    code = "import llama.tokenizer, sys; print(*sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    heavy = {"sentencepiece", "tiktoken", "tokenizers", "transformers"}
    assert not heavy & set(run.stdout.split())
