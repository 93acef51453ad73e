"""Write a quantized checkpoint: `python scripts/quantize.py CKPT OUT --type int4 --group_size 32`."""

import dataclasses
from collections.abc import Iterable
from typing import Annotated

from llama.checkpoint.calibrate import calibrated, read_calibration
from llama.checkpoint.quantize import quantize_checkpoint
from llama.checkpoint.save import Quantized
from llama.checkpoint.source import open_checkpoint
from llama.cli import run
from llama.device import choose_device
from llama.errors import QuantizationError
from llama.flags import Without
from llama.kernels.formats import KINDS
from llama.quantization.scheme import Asked
from llama.runtime import check_vocabulary
from llama.tokenizer import find_tokenizer, load_tokenizer


def main(
    ckpt_dir: str,
    output: str,
    type: str,
    calibrate: str | None = None,
    device: str = "auto",
    tokenizer_path: str | None = None,
    force: bool = False,
    asked: Annotated[Asked, Without("quantize")] = Asked(),
) -> None:
    """Write a checkpoint as integers with scales, which loads at any number of ranks; split_model.py cuts it.

    Args:
        ckpt_dir: anything that example.py reads and that is not quantized already.
        output: the folder to write.
        type: int8 (a scale a row) or int4 (a scale for each group of weights).
        calibrate: a UTF-8 text of the kind that the model is for; int4 is then rounded by GPTQ on that text.
        device: where calibration computes: auto, cpu, cuda or cuda:N.
        tokenizer_path: its tokenizer; by default beside the weights or one folder up.
        force: replace what an earlier quantization, split or conversion wrote.
    """
    if type not in KINDS:
        raise QuantizationError(f"--type {type!r} is not one of {', '.join(KINDS)}")
    checkpoint = open_checkpoint(ckpt_dir)
    checkpoint.require_numbers("quantizing it anew")
    scheme = dataclasses.replace(asked, quantize=type).scheme()
    assert scheme is not None  # `type` was given
    chosen: Iterable[Quantized] = ()
    if calibrate is not None:
        scheme = dataclasses.replace(scheme, calibrated=True)
        tokenizer = load_tokenizer(find_tokenizer(ckpt_dir, tokenizer_path))
        check_vocabulary(tokenizer, checkpoint)
        chosen = calibrated(checkpoint, scheme, read_calibration(calibrate, tokenizer), choose_device(device))
    written = quantize_checkpoint(checkpoint, output, scheme, tokenizer_path, force, chosen)
    size = sum(file.stat().st_size for file in written.glob("*.pth"))
    print(f"wrote {written} ({size / 1e6:.1f} MB, {scheme.words()})")
    print(f"run it: python3 example.py --ckpt_dir {written}")


def start() -> None:
    """Run `main`; `CKPT OUT` are `--ckpt_dir CKPT --output OUT`."""
    run(main, n_words=2)
