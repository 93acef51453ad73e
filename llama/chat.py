"""Chat formats: dialogs as token ids, as Meta's code encodes them.

A dialog is encoded straight to ids. Special tokens go in by id and message text as plain text, so no text
can open or close a turn in Llama 3's format. Llama 2's `[INST]` and `<<SYS>>` are plain text themselves:
`unsafe` finds them in a dialog, and the caller answers with `REFUSAL`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypedDict

from llama.errors import DialogError, TokenizerError, UsageError
from llama.tokenizer import Tokenizer

REFUSAL = "Error: special tags are not allowed as part of the prompt."


class Message(TypedDict):
    """One turn: the speaker ("system", "user", "assistant" or, for Llama 3, "tool") and the text."""

    role: str
    content: str


Dialog = Sequence[Message]

# Roles that may follow a role; None stands for the start. The last turn asks for an answer.
Order = Mapping[str | None, Sequence[str]]

ALTERNATING: Order = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
}
# Meta checks nothing here. Several users' turns in a row and several tools' are in use and allowed;
# Llama 3's own header calls a tool "ipython".
LLAMA3_ORDER: Order = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("user", "assistant"),
    "assistant": ("user", "tool", "ipython"),
    "tool": ("tool", "ipython", "user", "assistant"),
    "ipython": ("tool", "ipython", "user", "assistant"),
}
_ASKING = ("user", "tool", "ipython")


def validate(dialog: Dialog, index: int = 0, order: Order = ALTERNATING) -> None:
    """Check that `dialog` is a list of messages whose roles follow one another as `order` allows.

    Args:
        dialog: of any type.
        index: number of the dialog in the call, from 0; only for messages.
        order: the roles that may follow each role.

    Raises:
        DialogError: the dialog is empty or no list, a message lacks a role or text, a role is unknown or
            out of order, or no answer is asked for. Dialog and turn are named, both counted from 0.
    """
    if not isinstance(dialog, Sequence) or isinstance(dialog, str | bytes):
        raise DialogError(f"dialog {index}: a dialog is a list of messages, found {_kind(dialog)}")
    if not dialog:
        raise DialogError(f"dialog {index} is empty: it needs at least one user message")
    previous = None
    for turn, message in enumerate(dialog):
        where = f"dialog {index}, turn {turn} (both from 0)"
        _check_message(message, where)
        role = message["role"]
        if role not in order:
            raise DialogError(f"{where}: unknown role {role!r}, expected {_either(order[previous])}")
        if role not in order[previous]:
            raise DialogError(f"{where}: expected {_either(order[previous])}, found {role!r}")
        previous = role
    if previous not in _ASKING:
        asking = [role for role in _ASKING if role in order]
        raise DialogError(f"{where}: the last turn must be {_either(asking)}, found {previous!r}")


class ChatFormat(ABC):
    """The chat format of one generation of models.

    Args:
        tokenizer: the model's own.

    Attributes:
        name: of the format, as `--chat_format` takes it.
        stop_tokens: every id that ends an answer.
    """

    name: ClassVar[str]
    order: ClassVar[Order] = ALTERNATING

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.stop_tokens = tokenizer.stop_tokens

    def encode(self, dialog: Dialog, index: int = 0) -> list[int]:
        """Return the prompt's ids, BOS and the assistant's header included.

        Args:
            dialog: messages, of which the last is to be answered.
            index: number of the dialog in the call, from 0; only for error messages.

        Raises:
            DialogError: see `validate`.
        """
        validate(dialog, index, self.order)
        return self._encode(dialog)

    def encode_answered(self, dialog: Dialog, answer: str, index: int = 0) -> list[int]:
        """Return the ids of a training example: the dialog, its answer and the id that closes the turn.

        Args:
            dialog: messages, of which the last is answered.
            answer: the assistant's text.
            index: number of the dialog in the call, from 0; only for error messages.

        Raises:
            DialogError: see `validate`.
        """
        validate(dialog, index, self.order)
        return self._encode_answered(dialog, answer)

    def unsafe(self, dialog: Dialog) -> bool:
        """True for a dialog with text that this format cannot tell from its own marks."""
        return False

    @abstractmethod
    def _encode(self, dialog: Dialog) -> list[int]:
        """Encode a dialog that is known to be valid."""

    @abstractmethod
    def _encode_answered(self, dialog: Dialog, answer: str) -> list[int]:
        """Encode a dialog that is known to be valid with its answer."""


class Llama2Format(ChatFormat):
    """Llama 2 chat: `[INST] ... [/INST]`, as `chat_completion` in meta-llama/llama.

    The system message is folded into the first user message; every finished pair is a text of its own,
    from BOS to EOS; the blanks around a message are dropped.
    """

    name = "llama2"
    tags: ClassVar = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def unsafe(self, dialog: Dialog) -> bool:
        """True where a message contains one of the format's tags, which are plain text to the model."""
        return any(tag in message["content"] for message in dialog for tag in self.tags)

    def _encode(self, dialog: Dialog) -> list[int]:
        *finished, last = self._turns(dialog)
        asked = self.tokenizer.encode(f"[INST] {last.strip()} [/INST]", bos=True, eos=False)
        return self._encode_finished(finished) + asked

    def _encode_answered(self, dialog: Dialog, answer: str) -> list[int]:
        return self._encode_finished([*self._turns(dialog), answer])

    def _turns(self, dialog: Dialog) -> list[str]:
        """Return the texts of users and assistants in turn, the system's folded into the first."""
        texts = [message["content"] for message in dialog]
        if dialog[0]["role"] == "system":
            texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
        return texts

    def _encode_finished(self, texts: list[str]) -> list[int]:
        ids: list[int] = []
        for user, answer in zip(texts[::2], texts[1::2], strict=True):
            pair = f"[INST] {user.strip()} [/INST] {answer.strip()} "
            ids += self.tokenizer.encode(pair, bos=True, eos=True)
        return ids


class Llama3Format(ChatFormat):
    """Llama 3 to 3.3 chat: headers and end of turn by special-token id, as in meta-llama/llama-models.

    Message text is not stripped, and is encoded apart from the line ends before it.

    Raises:
        TokenizerError: the tokenizer has no such special tokens.
    """

    name = "llama3"
    order = LLAMA3_ORDER
    needs: ClassVar = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        missing = [token for token in self.needs if token not in tokenizer.special_tokens]
        if missing:
            raise TokenizerError(
                f"the llama3 chat format needs {missing[0]}, which this {tokenizer.kind} tokenizer of "
                f"{tokenizer.n_words:,} tokens lacks: use the format llama2 or alpaca"
            )
        self._start, self._end, self._eot = (tokenizer.special_tokens[token] for token in self.needs)

    def _encode(self, dialog: Dialog) -> list[int]:
        ids = [self.tokenizer.bos_id]
        for message in dialog:
            ids += self._header(message["role"]) + self._plain(message["content"]) + [self._eot]
        return ids + self._header("assistant")

    def _encode_answered(self, dialog: Dialog, answer: str) -> list[int]:
        return [*self._encode(dialog), *self._plain(answer), self._eot]

    def _header(self, role: str) -> list[int]:
        name = "ipython" if role == "tool" else role
        return [self._start, *self._plain(name), self._end, *self._plain("\n\n")]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False)


class AlpacaFormat(ChatFormat):
    """Stanford Alpaca's instruction templates, one text with BOS in front.

    A system message becomes the instruction and the first user message its input. Stanford defines single
    turns only, the answer right behind the last heading; here later turns continue the text in the same way.
    """

    name = "alpaca"

    def _encode(self, dialog: Dialog) -> list[int]:
        return self.tokenizer.encode(self._text(dialog), bos=True, eos=False)

    def _encode_answered(self, dialog: Dialog, answer: str) -> list[int]:
        # Encoded apart, so that training continues from the same ids as generation.
        return self._encode(dialog) + self.tokenizer.encode(answer, bos=False, eos=True)

    def _text(self, dialog: Dialog) -> str:
        texts = [message["content"] for message in dialog]
        opening = 2 if dialog[0]["role"] == "system" else 1
        text = alpaca_prompt(*texts[:opening])
        for answer, user in zip(texts[opening::2], texts[opening + 1 :: 2], strict=True):
            text += f"{answer}\n\n### Instruction:\n{user}\n\n### Response:"
        return text


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return Stanford Alpaca's prompt (tatsu-lab/stanford_alpaca, train.py), up to "### Response:".

    Args:
        instruction: the task.
        input: data for the task; where it is empty, the template without input is used.
    """
    if not input:
        return (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    )


FORMATS: dict[str, type[ChatFormat]] = {chosen.name: chosen for chosen in (Llama2Format, Llama3Format, AlpacaFormat)}


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """Return the format called `name`; "auto" chooses it by the tokenizer's special tokens.

    Raises:
        UsageError: no format has this name.
        TokenizerError: the tokenizer cannot express the format.
    """
    if name == "auto":
        headers = {"<|start_header_id|>", "<|eot_id|>"} <= tokenizer.special_tokens.keys()
        name = "llama3" if headers else "llama2"
    if name not in FORMATS:
        raise UsageError(f"unknown chat format {name!r}: use {_either(['auto', *FORMATS])}")
    return FORMATS[name](tokenizer)


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, Mapping):
        raise DialogError(f"{where}: a message is an object with 'role' and 'content', found {_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise DialogError(f"{where}: the message has no {key!r}")
        if not isinstance(message[key], str):
            raise DialogError(f"{where}: {key!r} must be text, found {_kind(message[key])}")


def _kind(value: object) -> str:
    return type(value).__name__


def _either(names: Sequence[str]) -> str:
    """Return "'a', 'b' or 'c'"."""
    *most, last = (repr(name) for name in names)
    return f"{', '.join(most)} or {last}" if most else last
