"""Download a model, or check one: `python -m llama.download --model llama-3.2-1b`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from llama.cli import run
from llama.download import checklist, hub, models, presigned
from llama.errors import UsageError

FOLDER = Path("ckpts")


def main(
    model: str | None = None,
    model_size: str | None = None,
    repo: str | None = None,
    file: str | None = None,
    original: bool = False,
    url: str | None = None,
    output_dir: str | None = None,
    verify: str | None = None,
) -> None:
    """Download a model from Hugging Face's hub or by the link in Meta's e-mail; or check a folder.

    Args:
        model: a published model, such as llama-3.2-1b or llama-2-7b-chat.
        model_size: 7B, 13B or 70B, each also with -chat, of Llama 2; or a model's name.
        repo: any other repository of the hub, OWNER/NAME.
        file: only this file of the repository.
        original: Meta's layout (consolidated.00.pth) instead of Hugging Face's.
        url: Meta's link, with its '*', in quotes; without a value it is asked for.
        output_dir: folder to write; by default ckpts/ and the model's name.
        verify: check the checklists of this folder, and download nothing.
    """
    if verify is not None:
        _refuse_beside("--verify", model, model_size, repo, file, original, url, output_dir)
        return _verify(Path(verify))
    if sum(name is not None for name in (model, model_size, repo)) != 1:
        raise UsageError("say what to download: one of --model, --model_size and --repo; or --verify DIR")
    if url is not None:
        _refuse_beside("--url", repo, file, original)
        published = _published(model, model_size)
        folder = Path(output_dir) if output_dir else FOLDER / published.name
        presigned.download(presigned.Link.parse(url or _ask()), published, folder)
    else:
        name = repo or _repo_of(_published(model, model_size), original)
        stem = name.split("/")[-1] if repo else _published(model, model_size).name
        folder = hub.download(name, Path(output_dir) if output_dir else FOLDER / stem, original, file)
    print(f"downloaded to {folder}")
    if file is None:
        print(f"run it: torchrun --nproc_per_node 1 example.py --ckpt_dir {folder}")


def _refuse_beside(flag: str, *others: object) -> None:
    if any(others):
        raise UsageError(f"{flag} does not go with the other flags given: see --help")


def _published(model: str | None, model_size: str | None) -> models.Published:
    return models.find(model) if model is not None else models.find_size(model_size or "")


def _repo_of(published: models.Published, original: bool) -> str:
    return published.original_repo if original else published.repo


def _ask() -> str:
    """Ask for Meta's link at the terminal, so that no shell's history keeps it."""
    if not sys.stdin.isatty():
        raise UsageError("--url needs the link from Meta's e-mail, in quotes, or a terminal to ask for it")
    try:
        return input("Paste the link from Meta's e-mail: ")
    except EOFError:
        raise UsageError("no link was given") from None


def _verify(folder: Path) -> None:
    total = checklist.total_bytes(folder)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", leave=False) as bar:
        n_files = checklist.verify(folder, bar.update)
    print(f"{folder}: {n_files} files are what the checklists say")


def spell_out(words: Sequence[str]) -> list[str]:
    """Return the command line with a link always as `--url=LINK`.

    `--url` without a value asks for the link. A link without its flag, which must not appear in
    an error, gets the flag.
    """
    spelled: list[str] = []
    for word in words:
        if not word.startswith(("http://", "https://")):
            spelled.append("--url=" if word == "--url" else word)
        elif spelled[-1:] == ["--url="]:
            spelled[-1] += word
        else:
            spelled.append(f"--url={word}")
    return spelled


def start() -> None:
    """Run `main`; `--url` may stand alone, and a link without it."""
    run(main, spell_out(sys.argv[1:]))
