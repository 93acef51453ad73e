"""Templates that write a record for a model: as Alpaca's prompt, as a turn of a chat, or plainly."""

from __future__ import annotations

from dataclasses import dataclass

from llama import chat
from llama.chat import AlpacaFormat, ChatFormat, Dialog, Message
from llama.data.records import Record
from llama.errors import DataError
from llama.tokenizer import Tokenizer


class PlainFormat(ChatFormat):
    """A format of the texts alone, each but the last answer followed by a line end, between BOS and EOS."""

    name = "plain"

    def _encode(self, dialog: Dialog) -> list[int]:
        return self.tokenizer.encode(self._text(dialog), bos=True, eos=False)

    def _encode_answered(self, dialog: Dialog, answer: str) -> list[int]:
        return self._encode(dialog) + self.tokenizer.encode(answer, bos=False, eos=True)

    def _text(self, dialog: Dialog) -> str:
        return "".join(f"{message['content']}\n" for message in dialog)


# By name: every chat format, and the plain one, which is for records alone.
_ALL: dict[str, type[ChatFormat]] = {**chat.FORMATS, PlainFormat.name: PlainFormat}
FORMATS = {name: _ALL[name] for name in sorted(_ALL)}


@dataclass(frozen=True)
class Template:
    """A way to write records.

    | name | prompt | answer |
    |---|---|---|
    | alpaca | Stanford's text, with or without an input | the output, EOS |
    | llama2 | a user's turn, `[INST] ... [/INST]` | the output, EOS |
    | llama3 | a user's turn and the assistant's header | the output, `<|eot_id|>` |
    | plain | instruction, line end; input, line end if there is one | the output, EOS |

    A chat's user says the instruction and, after an empty line, the input if there is one.
    """

    format: ChatFormat

    def encode_prompt(self, record: Record) -> list[int]:
        """Return the prompt's ids, BOS first."""
        return self.format.encode(self._dialog(record))

    def encode(self, record: Record) -> list[int]:
        """Return the ids of prompt and answer, from BOS to the id that ends the answer."""
        return self.format.encode_answered(self._dialog(record), record.output)

    def _dialog(self, record: Record) -> list[Message]:
        if isinstance(self.format, AlpacaFormat):
            return [_message("system", record.instruction), _message("user", record.input)]
        between = "\n" if isinstance(self.format, PlainFormat) else "\n\n"
        text = f"{record.instruction}{between}{record.input}" if record.input else record.instruction
        return [_message("user", text)]


def find_template(name: str, tokenizer: Tokenizer) -> Template:
    """Return the template called `name`.

    Raises:
        DataError: no template has this name.
        TokenizerError: the tokenizer lacks the template's special tokens.
    """
    if name not in FORMATS:
        raise DataError(f"unknown template {name!r}: use {', '.join(FORMATS)}")
    return Template(FORMATS[name](tokenizer))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
