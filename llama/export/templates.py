"""Chat formats in the template languages of others: Jinja (GGUF, Hugging Face) and Go (Ollama's Modelfile).

Each template writes a dialog as the format of the same name in `llama.data.templates` does; a test compares the Jinja
templates with the formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama.chat import alpaca_prompt
from llama.errors import CheckpointError

# The first line of a Modelfile of ours, by which a person's own is left alone.
SIGNATURE = "# Written by scripts/export_gguf.py"


@dataclass(frozen=True)
class Templates:
    """One chat format for other programs.

    Args:
        jinja: GGUF's `tokenizer.chat_template`.
        go: Ollama's TEMPLATE. Ollama puts BOS in front itself, unless the file says otherwise.
        stops: texts that end an answer besides the tokenizer's stop tokens.
    """

    jinja: str
    go: str
    stops: tuple[str, ...] = ()


TEMPLATES = {
    "llama2": Templates(
        jinja=(
            "{%- set folded = namespace(system='') -%}"
            "{%- for message in messages -%}"
            "{%- if message.role == 'system' -%}"
            "{%- set folded.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}"
            "{%- elif message.role == 'user' -%}"
            "{{ bos_token + '[INST] ' + (folded.system + message.content).strip() + ' [/INST]' }}"
            "{%- set folded.system = '' -%}"
            "{%- else -%}"
            "{{ ' ' + message.content.strip() + ' ' + eos_token }}"
            "{%- endif -%}"
            "{%- endfor -%}"
        ),
        go=(
            "{{- $system := .System }}{{- range .Messages }}"
            '{{- if eq .Role "user" }}[INST] '
            '{{ if $system }}<<SYS>>\n{{ $system }}\n<</SYS>>\n\n{{ $system = "" }}{{ end }}'
            "{{ .Content }} [/INST]"
            '{{- else if eq .Role "assistant" }} {{ .Content }} </s><s>'
            "{{- end }}{{- end }}"
        ),
        stops=("[INST]",),
    ),
    "llama3": Templates(
        jinja=(
            "{{- bos_token -}}"
            "{%- for message in messages -%}"
            "{%- set role = 'ipython' if message.role == 'tool' else message.role -%}"
            "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' -}}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}"
            "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
            "{%- endif -%}"
        ),
        go=(
            "{{- range .Messages }}<|start_header_id|>"
            '{{ if eq .Role "tool" }}ipython{{ else }}{{ .Role }}{{ end }}<|end_header_id|>\n\n'
            "{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "alpaca": Templates(
        jinja=(
            "{{- bos_token -}}"
            "{%- set opening = 2 if messages[0].role == 'system' else 1 -%}"
            "{%- if opening == 2 and messages[1].content -%}"
            + alpaca_prompt("{{ messages[0].content }}", "{{ messages[1].content }}")
            + "{%- else -%}"
            + alpaca_prompt("{{ messages[0].content }}")
            + "{%- endif -%}"
            "{%- for message in messages -%}"
            "{%- if loop.index > opening and message.role == 'assistant' -%}"
            "{{ message.content + '\\n\\n### Instruction:\\n' }}"
            "{%- elif loop.index > opening -%}"
            "{{ message.content + '\\n\\n### Response:' }}"
            "{%- endif -%}"
            "{%- endfor -%}"
        ),
        go=(
            "{{- $system := .System }}{{- range $number, $message := .Messages }}"
            '{{- if eq .Role "user" }}'
            "{{- if $system }}" + alpaca_prompt("{{ $system }}", "{{ .Content }}") + '{{ $system = "" }}'
            "{{- else if eq $number 0 }}" + alpaca_prompt("{{ .Content }}") + "{{- else }}"
            "### Instruction:\n{{ .Content }}\n\n### Response:{{ end }}"
            '{{- else if eq .Role "assistant" }}{{ .Content }}\n\n'
            "{{ end }}{{- end }}"
        ),
    ),
    "plain": Templates(
        jinja="{{- bos_token -}}{%- for message in messages -%}{{ message.content + '\\n' }}{%- endfor -%}",
        go="{{- range .Messages }}{{ .Content }}\n{{ end }}",
    ),
}


def templates(name: str) -> Templates | None:
    """Return the templates of a chat format; None for "none".

    Raises:
        CheckpointError: for a format that has none.
    """
    if name == "none":
        return None
    if name not in TEMPLATES:
        raise CheckpointError(
            f"there is no template of chat format {name!r} for llama.cpp: use {', '.join(TEMPLATES)} or none"
        )
    return TEMPLATES[name]


def modelfile(gguf_name: str, chat: Templates | None, stops: Sequence[str], opening: str = "") -> str:
    """Return the text of an Ollama Modelfile (https://docs.ollama.com/modelfile).

    Args:
        gguf_name: the file beside it.
        chat: templates of a chat format; None to pass the prompt on as it is.
        stops: texts that end an answer.
        opening: text before every prompt; it holds BOS where Ollama is not to add BOS itself.
    """
    template = opening + (chat.go if chat else "{{ .Prompt }}")
    lines = [
        SIGNATURE,
        "# ollama create NAME -f Modelfile, then ollama run NAME",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{template}"""',
        *(f'PARAMETER stop "{stop}"' for stop in dict.fromkeys([*stops, *(chat.stops if chat else ())])),
    ]
    return "\n".join(lines) + "\n"


def is_ours(path: Path) -> bool:
    """True for a Modelfile that an export wrote, which may be replaced."""
    try:
        return path.read_text(encoding="utf-8").startswith(SIGNATURE)
    except (OSError, UnicodeDecodeError):
        return False
