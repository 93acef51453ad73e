"""`Llama`: a model with its tokenizer, and the calls that generate text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.adapters.adapter import Adapter, LoraAdapter, PromptAdapter
from llama.adapters.lora import load_lora
from llama.adapters.soft_prompt import describe_adapter, fitting_adapter, n_virtual_tokens, prefix_of
from llama.cache import KVCache
from llama.chat import REFUSAL, ChatFormat, Dialog
from llama.chat import chat_format as choose_format
from llama.device import peak_memory
from llama.env import notice
from llama.errors import LlamaError
from llama.generation.engine import Engine, EngineOptions, FinishReason, Request
from llama.generation.sampling import Sampling
from llama.generation.steps import choose_mode
from llama.generation.stops import TextWatch
from llama.model import Transformer
from llama.offload import offload_of
from llama.parallel import groups
from llama.plan.inference import Workload
from llama.runtime import RunOptions, open_model
from llama.tokenizer import Tokenizer

Stop = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class StreamedToken:
    """One token of one prompt, as it comes.

    Args:
        index: the prompt, counted from 0.
        token: the token's id; None on an end that adds no token (a stop token, or nothing to generate).
        text: the text that has become certain with this token; it lags behind while a character, or a
            possible stop string, is incomplete. With `echo` the first new token carries the prompt's text too.
        logprob: the token's log-probability, natural logarithm, under the model without temperature.
        finish_reason: "stop" or "length" on the prompt's last token.
        is_prompt: whether the token is one of the prompt's own, which come first with `echo`.
        n_dropped: on the last token, how many of the newest tokens belong to a stop string.
    """

    index: int
    token: int | None
    text: str = ""
    logprob: float = 0.0
    finish_reason: FinishReason | None = None
    is_prompt: bool = False
    n_dropped: int = 0


@dataclass
class Completion:
    """The whole result of one prompt.

    Args:
        tokens: new token ids, without stop token or stop string; after the prompt's own with `echo`.
        logprobs: log-probability of each token; 0.0 for a prompt's first token.
        text: the tokens as text.
        finish_reason: "stop" or "length".
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"

    def add(self, item: StreamedToken) -> None:
        """Add the next item of this prompt's stream."""
        self.text += item.text
        if item.token is not None:
            self.tokens.append(item.token)
            self.logprobs.append(item.logprob)
        if item.finish_reason is not None:
            kept = len(self.tokens) - item.n_dropped
            del self.tokens[kept:], self.logprobs[kept:]
            self.finish_reason = item.finish_reason


class Llama:
    """A model ready to generate; make one with `Llama.build`.

    Under torchrun every rank holds one with its own shard, and every rank must make the same calls in
    the same order, iterators consumed to the same point. Results are the same on every rank.

    Args:
        model: this rank's shard.
        tokenizer: its tokenizer.
        options: limits and compiling.
        seed: seed of the sampling noise, unless a call brings its own.
        chat: the format that turns dialogs into tokens; None for the format that the tokenizer's tokens show.
        prefix: keys and values before every prompt; see `Engine`. A prefix does not count for `max_seq_len`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        options: EngineOptions,
        *,
        seed: int = 1,
        chat: ChatFormat | None = None,
        prefix: KVCache | None = None,
    ) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.max_seq_len, self.max_batch_size = options.max_seq_len, options.max_batch_size
        self.format = choose_format("auto", tokenizer) if chat is None else chat
        mode = choose_mode(options.compile, is_offloaded=offload_of(model) is not None)
        self.engine = Engine(model, min(tokenizer.n_words, model.args.vocab_size), prefix, mode)

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = EngineOptions.max_seq_len,
        max_batch_size: int = EngineOptions.max_batch_size,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        compile: str = EngineOptions.compile,
        plan: bool | Workload = True,
        chat_format: str = "auto",
        adapter: str | Path | Adapter | None = None,
        **options: Any,
    ) -> Llama:
        """Load a checkpoint, this rank's shard of it, and its tokenizer.

        Args:
            ckpt_dir: a folder in Meta's or Hugging Face's layout, cut into any number of files, or
                LLMs-from-scratch's single `.pth`.
            tokenizer_path: SentencePiece, tiktoken or `tokenizer.json`; None looks beside the weights,
                then one folder up.
            max_seq_len: tokens of prompt and generation together, at most.
            max_batch_size: prompts that run at a time, at most. No memory is reserved for them.
            model_parallel_size: ranks that share the model; None for all that torchrun started.
            seed: seed of the sampling noise.
            compile: "on", "off", or "auto" to compile where the time saved pays for compiling; see
                `llama.generation.steps.Steps`. "off" also leaves out the kernels of `llama.kernels`.
            plan: whether to check first that the model fits into memory; a `Workload` says what will be run,
                if that is less than `max_batch_size` and `max_seq_len` allow.
            chat_format: "auto", "llama2", "llama3" or "alpaca".
            adapter: a soft prompt or LoRA matrices, or the folder or file that holds them; see
                `llama.adapters.files.read_adapter`. A soft prompt stands before BOS, is run once, by this
                call, and does not count for `max_seq_len`.
            options: the fields of `RunOptions` (dtype, device, threads, tensor_split, offload_layers), and `quantize`:
                "int8" or "int4", or a `Scheme` for every detail; None for what the checkpoint holds.

        Raises:
            LlamaError: on every rank, with the message of the first rank that failed.
        """
        return cls.open(
            ckpt_dir, tokenizer_path, EngineOptions(max_seq_len, max_batch_size, compile),
            RunOptions.of(**options, no_plan=plan is False), model_parallel_size=model_parallel_size, seed=seed,
            expected=plan if isinstance(plan, Workload) else None, chat_format=chat_format, adapter=adapter,
        )  # fmt: skip

    @classmethod
    def open(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None,
        engine: EngineOptions,
        options: RunOptions,
        *,
        model_parallel_size: int | None = None,
        seed: int = 1,
        expected: Workload | None = None,
        chat_format: str = "auto",
        adapter: str | Path | Adapter | None = None,
    ) -> Llama:
        """Do what `build` does, with the options of commands.

        Args:
            ckpt_dir, tokenizer_path, model_parallel_size, seed, chat_format, adapter: as in `build`.
            engine: limits and compiling.
            options: device, precision and memory.
            expected: what will be run; None where only the limits are known.

        Raises:
            LlamaError: on every rank, with the message of the first rank that failed.
        """
        started = time.perf_counter()
        with groups.phase("files"):
            opened = open_model(ckpt_dir, tokenizer_path, options, model_parallel_size)
            args = opened.checkpoint.args
            choose_mode(engine.compile, is_offloaded=options.offload_layers > 0)
            chat = choose_format(chat_format, opened.tokenizer)
            adapter = fitting_adapter(adapter, args)
        with groups.phase("plan"):
            n_virtual = n_virtual_tokens(adapter)
            limits = Workload(engine.max_batch_size, engine.max_seq_len, n_virtual)
            opened.check_fit(limits, expected and dataclasses.replace(expected, prefix=n_virtual))
        ranks = groups.start(opened.device, model_parallel_size)
        if engine.compile != "off":
            ranks = opened.prepare_kernels()
        with groups.phase("load"):
            model = opened.load(ranks)
            if isinstance(adapter, LoraAdapter):
                load_lora(model, adapter)
        # The ranks compute the prefix together, once each of them has its shard.
        prefix = prefix_of(model, adapter.prompt) if isinstance(adapter, PromptAdapter) else None
        llama = cls(model, opened.tokenizer, engine, seed=seed, chat=chat, prefix=prefix)
        notice(opened.describe(time.perf_counter() - started) + describe_adapter(adapter))
        return llama

    # -- tokens ------------------------------------------------------------------------------------

    def stream(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        stop: Stop = None,
        seed: int | None = None,
        first_index: int = 0,
    ) -> Iterator[StreamedToken]:
        """Generate for every prompt and yield tokens as they come, prompts interleaved.

        Args:
            prompts: texts (BOS is put in front) or token ids.
            max_gen_len: new tokens a prompt, at most; None for as many as `max_seq_len` leaves.
            temperature: 0 is greedy.
            top_p, top_k: see `llama.generation.sampling.Sampling`.
            logprobs: whether a prompt's own log-probabilities are wanted too (with `echo`).
            echo: yield the prompt's tokens first.
            stop: strings or token ids that end the text besides the model's own stop tokens.
            seed: seed of the noise; None for the seed of `build`.
            first_index: place of the first prompt in the noise, for a list of prompts that is run in several calls.

        Raises:
            LlamaError: before anything runs, for an unusable prompt or setting.
        """
        encoded = [self._encode(prompt, number) for number, prompt in enumerate(_checked_list(prompts))]
        sampling = Sampling(temperature, top_p, top_k, self.seed if seed is None else seed)
        stop_tokens, stop_strings = _split_stop(stop)
        watches = [TextWatch(self.tokenizer, stop_strings, prompt if echo else ()) for prompt in encoded]
        requests = [
            Request(
                index=number,
                prompt=prompt,
                max_new=self._room(prompt, max_gen_len, number),
                sampling=sampling,
                stop_tokens=self.tokenizer.stop_tokens | stop_tokens,
                score_prompt=echo and logprobs,
                watch=watch.push,
                noise_index=first_index + number,
            )
            for number, (prompt, watch) in enumerate(zip(encoded, watches, strict=True))
        ]
        return self._stream(requests, watches, echo)

    def _stream(self, requests: Sequence[Request], watches: Sequence[TextWatch], echo: bool) -> Iterator[StreamedToken]:
        echoed: set[int] = set()
        for event in self.engine.run(requests, self.max_batch_size):
            number = event.index
            if echo and number not in echoed:
                echoed.add(number)
                scores = event.prompt_log_probs or [0.0] * len(requests[number].prompt)
                for token, score in zip(requests[number].prompt, scores, strict=True):
                    yield StreamedToken(number, token, logprob=score, is_prompt=True)
            if event.token is None and event.finish_reason is None:
                continue
            watch, done = watches[number], event.finish_reason is not None
            yield StreamedToken(
                number,
                event.token,
                watch.new_text(final=done),
                event.log_prob,
                event.finish_reason,
                n_dropped=watch.n_dropped if done else 0,
            )

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        stop: Stop = None,
        seed: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Generate token ids for prompts of token ids, as Meta's `generate` does.

        Arguments are those of `stream`.

        Returns:
            New tokens of each prompt, without the stop token (with `echo`, after the prompt's own tokens); and
            with `logprobs` the log-probability of each token, 0.0 for a prompt's first token.
        """
        results = self.collect(
            prompt_tokens, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p, top_k=top_k,
            logprobs=logprobs, echo=echo, stop=stop, seed=seed,
        )  # fmt: skip
        scores = [result.logprobs for result in results] if logprobs else None
        return [result.tokens for result in results], scores

    def collect(self, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """Run `stream` to its end with these arguments; return one completion a prompt."""
        completions = [Completion() for _ in _checked_list(prompts)]
        for item in self.stream(prompts, **options):
            completions[item.index].add(item)
        return completions

    def _encode(self, prompt: str | Sequence[int], number: int) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True, eos=False)
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise LlamaError(f"prompt {number} has no tokens: even an empty text begins with BOS")
        strangers = [token for token in tokens if not 0 <= token < self.model.args.vocab_size]
        if strangers:
            raise LlamaError(
                f"prompt {number} holds token id {strangers[0]}; ids run from 0 to {self.model.args.vocab_size - 1}"
            )
        return tokens

    def _room(self, prompt: Sequence[int], max_gen_len: int | None, number: int) -> int:
        """Return how many new tokens a prompt may get."""
        if len(prompt) > self.max_seq_len:
            raise LlamaError(
                f"prompt {number} has {len(prompt)} tokens, but max_seq_len is {self.max_seq_len}: "
                "shorten it or raise --max_seq_len"
            )
        room = self.max_seq_len - len(prompt)
        if max_gen_len is None:
            return room
        if max_gen_len < 0:
            raise LlamaError(f"max_gen_len must be 0 or more, is {max_gen_len}")
        return min(room, max_gen_len)

    # -- texts -------------------------------------------------------------------------------------

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        top_k: int | None = None,
        stop: Stop = None,
        seed: int | None = None,
    ) -> list[dict[str, Any]]:
        """Complete texts; results have the shape of Meta's `text_completion`, with a finish reason.

        Arguments are those of `stream`. `echo=True, logprobs=True, max_gen_len=0` scores a text.

        Returns:
            One dict a prompt: `{"generation": str, "finish_reason": "stop" | "length"}`, and with `logprobs`
            also `"tokens"` (texts of single tokens) and `"logprobs"`.
        """
        results = self.collect(
            prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p, top_k=top_k,
            logprobs=logprobs, echo=echo, stop=stop, seed=seed,
        )  # fmt: skip
        completions = []
        for result in results:
            completion: dict[str, Any] = {"generation": result.text, "finish_reason": result.finish_reason}
            if logprobs:
                completion |= self._details(result)
            completions.append(completion)
        return completions

    def _details(self, result: Completion) -> dict[str, Any]:
        texts = [self.tokenizer.token_text(token) for token in result.tokens]
        return {"tokens": texts, "logprobs": result.logprobs}

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> list[dict[str, Any]]:
        """Answer dialogs; results have the shape of Meta's `chat_completion`.

        Args:
            dialogs: each a list of `{"role": ..., "content": ...}`; see `llama.chat` for the order.
            temperature, top_p, max_gen_len, logprobs, top_k, seed: as in `stream`.

        Returns:
            One dict a dialog: `{"generation": {"role": "assistant", "content": str}}`, and with `logprobs`
            also `"tokens"` and `"logprobs"`. A dialog that forges Llama 2's structure is answered with
            Meta's refusal, without running the model.

        Raises:
            DialogError: for a dialog of wrong order or role, naming dialog and turn.
        """
        answers = self.answer(
            dialogs, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p, top_k=top_k,
            logprobs=logprobs, seed=seed,
        )  # fmt: skip
        return [
            {"generation": {"role": "assistant", "content": answer.text}} | (self._details(answer) if logprobs else {})
            for answer in answers
        ]

    def answer(self, dialogs: Sequence[Dialog], **options: Any) -> list[Completion]:
        """Answer dialogs with the arguments of `stream`; return one completion a dialog, see `chat_completion`."""
        encoded = [self.format.encode(dialog, number) for number, dialog in enumerate(_checked_list(dialogs))]
        answers = [Completion(text=REFUSAL, finish_reason="stop") for _ in dialogs]
        safe = [number for number, dialog in enumerate(dialogs) if not self.format.unsafe(dialog)]
        if safe:
            options["stop"] = sorted(self.format.stop_tokens)
            for number, answer in zip(safe, self.collect([encoded[n] for n in safe], **options), strict=True):
                answers[number] = answer
        return answers

    def stream_answer(self, dialog: Dialog, **options: Any) -> Iterator[StreamedToken]:
        """Answer one dialog with the arguments of `stream`, token by token; see `chat_completion`.

        Raises:
            DialogError: for a dialog of wrong order or role.
        """
        prompt = self.format.encode(dialog, 0)
        if self.format.unsafe(dialog):
            return iter([StreamedToken(0, None, REFUSAL, finish_reason="stop")])
        return self.stream([prompt], **options, stop=sorted(self.format.stop_tokens))

    def summary(self) -> str:
        """Return time, speed and memory so far as one line of text; a collective call."""
        stats = self.engine.stats
        peaks = groups.gather_objects(peak_memory(self.model.ranks.device))
        memory = ", ".join(f"{peak / 1e9:.2f}" for peak in peaks)
        offload = offload_of(self.model)
        return (
            f"prefill {stats.prefill_tokens} tokens in {stats.prefill_seconds:.2f} s "
            f"({_rate(stats.prefill_tokens, stats.prefill_seconds)}), "
            f"decode {stats.decode_tokens} tokens in {stats.decode_seconds:.2f} s "
            f"({_rate(stats.decode_tokens, stats.decode_seconds)}); peak memory per rank {memory} GB"
            + ("" if offload is None else f"; {offload.words()}")
        )


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if seconds > 0 else "no time"


# -- arguments -------------------------------------------------------------------------------------


def _checked_list(values: Any) -> Any:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise LlamaError(f"prompts must be a list, found {type(values).__name__}")
    if not values:
        raise LlamaError("the list of prompts is empty")
    return values


def _split_stop(stop: Stop) -> tuple[frozenset[int], list[str]]:
    """Return stop token ids and stop strings, from either or a list of both."""
    if stop is None:
        return frozenset(), []
    entries = [stop] if isinstance(stop, (str, int)) else list(stop)
    if any(entry == "" for entry in entries):
        raise LlamaError("an empty stop string would end every text at once")
    ids = frozenset(entry for entry in entries if not isinstance(entry, str))
    return ids, [entry for entry in entries if isinstance(entry, str)]
