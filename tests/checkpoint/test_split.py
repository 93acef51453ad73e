"""Splitting and merging: bit for bit, whatever goes in, whatever happens on the way."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import hf_model, meta_state, sentencepiece_model, write_hf, write_meta

from llama.checkpoint import manifest
from llama.checkpoint.source import open_checkpoint
from llama.checkpoint.split import split
from llama.errors import LlamaError

SLOW_IS_FINE = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read whole."""
    state = {}
    for name, tensor in open_checkpoint(folder).tensors.items():
        state[name] = torch.empty(tensor.spec.shape, dtype=tensor.dtype)
        tensor.read_into(tuple(slice(0, size) for size in tensor.spec.shape), state[name])
    return state


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@given(
    generation=st.sampled_from(["1", "2", "3", "3.1", "3.2"]),
    layout=st.sampled_from(["meta", "views", "hf"]),
    source_shards=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shards=st.integers(1, 4),
    weights=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    weighted=st.booleans(),
)
@SLOW_IS_FINE
def test_splitting_and_merging_gives_every_tensor_back(
    tmp_path_factory: pytest.TempPathFactory, generation: str, layout: str, source_shards: int, dtype: torch.dtype,
    shards: int, weights: list[int], weighted: bool,
) -> None:  # fmt: skip
    folder, model = tmp_path_factory.mktemp("split"), hf_model(generation)
    shards = min(shards, model.config.num_key_value_heads)
    if layout == "hf":
        write_hf(folder / "model", model.to(dtype))
    else:
        write_meta(folder / "model", model, source_shards, dtype=dtype, views=layout == "views")
    tensor_split = ",".join(map(str, weights[:shards])) if weighted else None
    parts = split(folder / "model", shards, tensor_split=tensor_split)
    merged = split(parts, 1, folder / "merged", names="consolidated")
    expected = {name: weight.to(dtype) for name, weight in meta_state(model).items()}
    assert same(whole(merged), expected)
    state = torch.load(merged / "consolidated.00.pth", weights_only=True)
    assert same({name: state[name] for name in expected}, expected)
    assert manifest.verify(parts) == len(expected) * shards


@pytest.mark.parametrize(("vocab_size", "dim"), [(320, 1), (100_096, 0)])
def test_the_embedding_is_cut_as_its_generation_cuts_it(tmp_path: Path, vocab_size: int, dim: int) -> None:
    model = hf_model("2", vocab_size=vocab_size)
    parts = split(write_meta(tmp_path / "m", model), 2)
    shards = [torch.load(file, weights_only=True) for file in sorted(parts.glob("*.pth"))]
    for name, weight in meta_state(model).items():
        shapes = [tuple(shard[name].shape) for shard in shards]
        assert shapes[0] == shapes[1], "Meta's code wants equal shards"
        if name == "tok_embeddings.weight":
            assert torch.equal(torch.cat([shard[name] for shard in shards], dim), weight)


def test_each_shard_is_a_plain_archive_of_its_own_bytes(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"), n_shards=2, views=True)
    for file in split(source, 2).glob("*.pth"):
        assert zipfile.ZipFile(file).testzip() is None
        state = torch.load(file, weights_only=True)
        assert file.stat().st_size < sum(t.nbytes for t in state.values()) + 512 * len(state)  # names and alignment
        assert all(t.is_contiguous() and t.storage_offset() == 0 for t in state.values())


def test_tokenizer_and_params_come_along(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path)
    parts = split(write_hf(tmp_path / "m", hf_model("3.1")), 2)
    assert (parts / "tokenizer.model").exists()
    assert parts.name == "m_fs2"
    ours, theirs = open_checkpoint(parts).args, open_checkpoint(tmp_path / "m").args
    # Meta's keys say the FFN's width by a rule, Hugging Face's by a number.
    assert ours == dataclasses.replace(theirs, multiple_of=ours.multiple_of, ffn_dim_multiplier=ours.ffn_dim_multiplier)


def test_a_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    parts = split(write_meta(tmp_path / "m", hf_model("2")), 2)
    file = parts / "fs_consolidated.01.pth"
    state = torch.load(file, weights_only=True)
    state["layers.1.attention.wo.weight"][3, 5] += 1
    torch.save(state, file)
    with pytest.raises(LlamaError, match=r"01\.pth: layers\.1\.attention\.wo\.weight differs in sha256"):
        manifest.verify(parts)


# -- bad input -------------------------------------------------------------------------------------


def test_more_shards_than_kv_heads_are_refused(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"))
    with pytest.raises(LlamaError, match="3 shards but only 2 key/value heads"):
        split(source, 3)


def test_a_folder_that_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear")
    with pytest.raises(LlamaError, match="not written by a split"):
        split(source, 2, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "diary.txt").read_text() == "dear"
    with pytest.raises(LlamaError, match="itself"):
        split(source, 2, source, force=True)


def test_an_earlier_split_is_replaced_only_by_force(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"))
    parts = split(source, 2)
    with pytest.raises(LlamaError, match="--force"):
        split(source, 2)
    assert len(list(split(source, 1, parts, force=True).glob("*.pth"))) == 1


def test_a_full_disk_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(LlamaError, match=r"GB free"):
        split(source, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_meta(tmp_path / "m", hf_model("2"))
    written = []

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        written.append(offset)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(LlamaError, match="No space left"):
        split(source, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_manifest_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    parts = split(write_meta(tmp_path / "m", hf_model("2")), 1)
    content = json.loads((parts / "manifest.json").read_text())
    content["shards"]["../m/consolidated.00.pth"] = {}
    (parts / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(LlamaError, match="outside its folder"):
        manifest.verify(parts)


# -- kills -----------------------------------------------------------------------------------------

N_KILLS = 20
# Runs splits in forks, each killed before one of the system calls by which files come to be; prints how many there are.
DYING = """
import os, pathlib, shutil, signal, sys
import llama.checkpoint.split as split
from llama.checkpoint import manifest
split.CHUNK_BYTES = 4096
at = n_calls = 0

def counted(call):
    def before(*args, **options):
        global n_calls
        n_calls += 1
        if n_calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return before

for module, name in ((os, "pwrite"), (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "fsync")):
    setattr(module, name, counted(getattr(module, name)))
for kill in map(int, sys.stdin):
    child = os.fork()
    if not child:
        at = kill
        split.split(sys.argv[1], 2)
        pathlib.Path(sys.argv[1], "calls").write_text(str(n_calls))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_nothing_that_loads(tmp_path: Path) -> None:
    source, target = write_meta(tmp_path / "m", hf_model("2")), tmp_path / "m_fs2"
    with subprocess.Popen(
        [sys.executable, "-c", DYING, str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def killed_before(call: int) -> int:
            """How a run ends that is killed before a call; 0 is none."""
            process.stdin.write(f"{call}\n")
            return int(process.stdout.readline())

        assert killed_before(0) == 0
        n_calls = int((source / "calls").read_text())
        (source / "calls").unlink()
        assert n_calls > 5 * N_KILLS
        for kill in range(N_KILLS):
            shutil.rmtree(target, ignore_errors=True)
            assert killed_before(1 + kill * (n_calls - 1) // (N_KILLS - 1)) == -signal.SIGKILL
            for folder in tmp_path.iterdir():
                if folder != source:
                    assert folder.name == "m_fs2.partial"
                    with pytest.raises(LlamaError):
                        open_checkpoint(folder)
    assert manifest.verify(split(source, 2)) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m_fs2"]
