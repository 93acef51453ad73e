"""Parts read by offset against torch.load and safetensors' own reader, bit for bit; and damaged files."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama.checkpoint import files
from llama.checkpoint.files import StoredTensor, read_header
from llama.errors import CheckpointError

State = dict[str, Tensor]


def contiguous(dtype: torch.dtype) -> State:
    return {"a": torch.randn(37, 29).to(dtype), "b": torch.randn(11).to(dtype), "c": torch.randn(1, 64).to(dtype)}


def views() -> State:
    """As the original fork cut: every shard a view into a whole storage, which is saved along."""
    whole, table = torch.randn(40, 24), torch.randn(64)
    return {
        "rows": whole[10:20],
        "columns": whole[:, 18:],
        "inner": whole[3:30:2, 5:17],
        "tail": table[50:],
        "apart": torch.randn(3, 3),
    }


def transposed() -> State:
    return {
        "t": torch.randn(30, 50).t(),
        "p": torch.randn(4, 5, 6).permute(2, 0, 1),
        "e": torch.randn(1, 9).expand(7, 9),
    }


STATES: dict[str, Callable[[], State]] = {
    "float32": lambda: contiguous(torch.float32),
    "float16": lambda: contiguous(torch.float16),
    "bfloat16": lambda: contiguous(torch.bfloat16),
    "float64": lambda: contiguous(torch.float64),
    "mixed": lambda: {"a": torch.randn(5, 5), "b": torch.randn(5, 5).half(), "c": torch.randn(5).bfloat16()},
    "views": views,
    "transposed": transposed,
    "parameters": lambda: {"p": nn.Parameter(torch.randn(12, 8)), "frozen": nn.Parameter(torch.randn(4), False)},
    "shared": lambda: dict.fromkeys(("one", "two"), torch.randn(9, 9)),
    "empty rows": lambda: {"none": torch.randn(0, 5), "some": torch.randn(2, 5)},
}


def read_part(stored: StoredTensor, index: tuple[slice, ...], multiple: int = 1) -> Tensor:
    """Put the pieces together; what no piece covers stays NaN."""
    part = torch.full([s.stop - s.start for s in index], torch.nan, dtype=stored.dtype)
    for dim, start, piece in stored.pieces(index, multiple):
        part.narrow(dim, start, piece.shape[dim]).copy_(piece)
    return part


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def check_random_parts(path: Path, expected: State, n_parts: int = 12) -> None:
    stored, draw = read_header(path), random.Random(1)
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tuple(tensor.shape))
        indices = [whole(tensor.shape)]
        for _ in range(n_parts):
            bounds = [sorted(draw.choices(range(size + 1), k=2)) for size in tensor.shape]
            indices.append(tuple(slice(start, stop) for start, stop in bounds))
        for index in indices:
            assert torch.equal(read_part(stored[name], index), tensor[index]), (name, index)


@pytest.fixture(params=[64, 1000, files.PIECE_BYTES], ids="pieces of {}".format)
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files, "PIECE_BYTES", request.param)
    return request.param


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", STATES)
def test_parts_of_a_pth_are_those_of_torch_load(tmp_path: Path, kind: str, new_format: bool) -> None:
    path = tmp_path / "consolidated.00.pth"
    torch.save(STATES[kind](), path, _use_new_zipfile_serialization=new_format)
    check_random_parts(path, torch.load(path, weights_only=True))


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64", "mixed", "empty rows"])
@pytest.mark.parametrize("padding", range(4))
def test_parts_of_a_safetensors_file_are_the_librarys(tmp_path: Path, kind: str, padding: int) -> None:
    """The data may start at any byte: the header's length is whatever the writer left it."""
    path = tmp_path / "model.safetensors"
    save_file(STATES[kind](), path, metadata={"format": "pt"})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip(b" ") + b" " * padding
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    check_random_parts(path, load_file(path))


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_any_strided_view_is_read_right(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    tensor = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape)
    for dim, size in enumerate(shape):
        start = data.draw(st.integers(0, size - 1))
        step = data.draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    path = tmp_path_factory.mktemp("view") / "a.pth"
    torch.save({"v": tensor}, path)
    index = tuple(
        slice(start, data.draw(st.integers(start, size)))
        for size in tensor.shape
        for start in [data.draw(st.integers(0, size))]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_BYTES", data.draw(st.sampled_from([1, 20, 100])))
        assert torch.equal(read_part(read_header(path)["v"], index), tensor[index])


@pytest.mark.parametrize("kept", [1, 4, 8])
def test_pieces_are_small_and_keep_heads_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)
    path = tmp_path / "a.pth"
    torch.save({"w": torch.randn(64, 20)}, path)
    sizes = [piece.shape[0] for _, _, piece in read_header(path)["w"].pieces(whole((64, 20)), kept)]
    assert sum(sizes) == 64
    assert len(sizes) > 4
    assert all(size % kept == 0 and size * 80 <= 1000 for size in sizes)


@pytest.mark.parametrize("kind", ["rows", "transposed", "tall"])
def test_hardly_a_byte_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 4000)
    tensor = {"rows": torch.randn(80, 60), "transposed": torch.randn(80, 60).t(), "tall": torch.randn(900, 4)}[kind]
    path = tmp_path / "a.pth"
    torch.save({"w": tensor}, path)
    pieces = list(read_header(path)["w"].pieces(whole(tuple(tensor.shape))))
    n_bytes = [piece.untyped_storage().nbytes() for _, _, piece in pieces]
    assert max(n_bytes) <= 4000
    assert sum(n_bytes) <= 1.05 * tensor.nbytes


@pytest.mark.parametrize("n_values", [1, 3, 20])
def test_a_lone_small_tensor_is_not_taken_for_a_record_of_the_same_size(tmp_path: Path, n_values: int) -> None:
    """torch's archive holds records of 2, 6 and 40 bytes of its own."""
    path, tensor = tmp_path / "a.pth", torch.randn(n_values).bfloat16()
    torch.save({"a": tensor}, path)
    assert torch.equal(read_part(read_header(path)["a"], (slice(0, n_values),)), tensor)


def test_headers_are_read_without_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(1 << 20)}, path)
    header = read_header(path)
    assert header["w"].value is None
    with path.open("r+b") as file:  # nothing was kept: what is read is what the file holds now
        file.seek(header["w"].offset + 4 * 77)
        file.write(struct.pack("<f", 5.0))
    assert read_part(header["w"], (slice(70, 80),)).tolist() == [0.0] * 7 + [5.0, 0.0, 0.0]


# -- what is refused -------------------------------------------------------------------------------


class _Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


class _Stranger:
    pass


def read_all(path: Path) -> None:
    for stored in read_header(path).values():
        read_part(stored, whole(stored.shape))


def refusal(path: Path) -> str:
    """What opening says, before any weights are read."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "Git LFS pointer.*git lfs pull"),
        (random.Random(5).randbytes(3000), "damaged"),
        (b"PK\x03\x04" + bytes(500), "damaged"),
        (b"\x80\x02", "damaged"),
        (b"[" * 100_000, "damaged"),
        (struct.pack("<Q", 50_000) + b"[" * 50_000, "damaged"),
    ],
    ids=["empty", "LFS", "random", "zip", "pickle", "brackets", "deep JSON"],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, suffix: str, content: bytes, reason: str) -> None:
    path = tmp_path / f"consolidated{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_header(path)
    refusal(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [4, 100, 0.5, 0.95, -1])
def test_a_truncated_pth_is_refused(tmp_path: Path, kept: float, new_format: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save(contiguous(torch.float32), path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("kept", [4, 100, 0.5, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.safetensors"
    save_file(contiguous(torch.float32), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    assert "cut off" in refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"w": torch.randn(1000)}, path)
    stored = read_header(path)["w"]
    os.truncate(path, stored.offset + 2000)
    with pytest.raises(CheckpointError, match="ended early"):
        read_part(stored, (slice(0, 1000),))


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_tries_to_run_code_is_refused_by_name_and_does_not(tmp_path: Path, new_format: bool) -> None:
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    torch.save({"w": torch.ones(2), "x": _Malice(trace)}, path, _use_new_zipfile_serialization=new_format)
    assert f"({os.system.__module__}.system)" in refusal(path)
    assert not trace.exists()
    torch.save({"x": _Stranger()}, path, _use_new_zipfile_serialization=new_format)
    assert "_Stranger" in refusal(path)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"w": torch.ones(2), "step": 3, "lr": "1e-3"}, "no plain tensors: step, lr"),
        ({"model": {"w": torch.ones(2)}}, "no plain tensors: model"),
        ({"w": torch.eye(3).to_sparse()}, "no plain tensors: w"),
        ({"w": torch.ones(2, device="meta")}, "no plain tensors: w"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"w": torch.ones(2, dtype=torch.int8)}, "w is stored as int8"),
    ],
)
def test_what_is_not_plain_weights_is_refused_by_name(
    tmp_path: Path, content: object, reason: str, new_format: bool
) -> None:
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert reason in refusal(path)


def test_float8_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.float8_e4m3fn)}, tmp_path / "a.pth")
    assert "w is stored as float8_e4m3fn" in refusal(tmp_path / "a.pth")


def test_int8_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2, dtype=torch.int8)}, path)
    assert "w is stored as I8" in refusal(path)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({**ENTRY, "data_offsets": [0, 20]}, "20 bytes for shape [2, 3]"),
        ({**ENTRY, "data_offsets": [24, 0]}, "damaged"),
        ({**ENTRY, "data_offsets": [1000, 1024]}, "cut off"),
        ({**ENTRY, "data_offsets": [-24, 0]}, "impossible shape or place"),
        ({**ENTRY, "shape": [-2, -3]}, "impossible shape or place"),
        ({**ENTRY, "shape": [2, 2.5]}, "impossible shape or place"),
        ({**ENTRY, "shape": None}, "header cannot be read"),
        ({**ENTRY, "dtype": ["F32"]}, "header cannot be read"),
        ({**ENTRY, "dtype": "F8_E4M3"}, "stored as F8_E4M3"),
        ({"dtype": "F32"}, "header cannot be read"),
        ([], "header cannot be read"),
        (None, "header cannot be read"),
    ],
)
def test_an_impossible_safetensors_entry_is_refused(tmp_path: Path, entry: object, reason: str) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("length", "header"),
    [(1000, b"{}"), (2**63, b"{}"), (0, b"{}"), (4, b"{'a'"), (4, b"[{}]"), (4, b"\xff\xfe\xff\xfe"), (4, b"null")],
)
def test_a_corrupt_safetensors_header_is_refused(tmp_path: Path, length: int, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header)
    assert "damaged" in refusal(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, kind: str) -> None:
    path, draw = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth"), random.Random(0)
    if kind == "safetensors":
        save_file(contiguous(torch.float32), path)
    else:
        torch.save(contiguous(torch.float32), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    # Beyond the tensors' own bytes, which nothing can check.
    places = [at for at in range(len(content)) if at < 1200 or at > len(content) - 900]
    messages = []
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 2, 8])):
            damaged[draw.choice(places)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_all(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert not any("\n" in message for message in messages)
