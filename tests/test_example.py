"""The command itself, as a person types it, at several world sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
from launch import EXAMPLE, Command, Outcome, run_command, run_forked
from support import hf_model, sentencepiece_model, write_hf, write_meta

pytestmark = pytest.mark.slow

PROMPTS = ["the quick brown fox", "", "Hello, world # 1e3", "[1, 2", "日本語", "two\nlines"]
EXACT = ("--dtype", "fp32", "--temperature", 0, "--max_gen_len", 8)


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in three layouts, its tokenizer one folder up."""
    folder = tmp_path_factory.mktemp("ckpts")
    model = hf_model("2")
    write_meta(folder / "7B", model)
    write_meta(folder / "7B_fs4", model, 4, embedding_dim=1, stem="fs_consolidated")
    write_hf(folder / "hf", model)
    sentencepiece_model(folder)
    return folder


def example(*words: object, ranks: int, **options: Any) -> Outcome:
    return sound(run_command(words, ranks, **options))


def alone(*words: object) -> Outcome:
    """One process without a process group."""
    return sound(run_forked({"alone": [EXAMPLE, *words]})["alone"])


def sound(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    assert outcome.errors == []
    assert "Traceback" not in outcome.err
    assert "Warning" not in outcome.err
    return outcome


def results(path: Path) -> list[dict[str, Any]]:
    assert not list(path.parent.glob("*.partial"))
    return json.loads(path.read_text(encoding="utf-8"))


def assert_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("logprobs") == pytest.approx(theirs["logprobs"], abs=1e-4)
        assert ours == {key: value for key, value in theirs.items() if key != "logprobs"}


@pytest.fixture(scope="module")
def expected(ckpts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What plain python says to the prompts, without any process group."""
    file = tmp_path_factory.mktemp("plain") / "plain.json"
    words = ("--ckpt_dir", ckpts / "7B", "--prompts", json.dumps(PROMPTS), *EXACT, "--output_json", file)
    run = sound(run_command(words))
    assert "1 process on cpu, float32" in run.err
    return results(file)


def test_plain_python_writes_all_there_is_to_know(expected: list[dict[str, Any]]) -> None:
    assert [record["prompt"] for record in expected] == PROMPTS
    for record in expected:
        assert set(record) == {"prompt", "generation", "token_ids", "tokens", "logprobs", "finish_reason"}
        assert len(record["token_ids"]) == len(record["tokens"]) == len(record["logprobs"]) > 0
        assert record["finish_reason"] in ("stop", "length")
        assert all(value <= 0 for value in record["logprobs"])
    assert any(record["generation"] for record in expected)


@pytest.mark.parametrize(
    ("ranks", "folder", "words"),
    [
        (1, "7B", ("--max_seq_len", 512, "--max_batch_size", 5)),
        (2, "hf", ("--tensor_split", "3,1")),
        (4, "7B_fs4", ("--max_seq_len", 512, "--max_batch_size", 5)),
    ],
)
def test_any_layout_at_any_world_size_says_the_same(
    ckpts: Path, expected: list[dict[str, Any]], tmp_path: Path, ranks: int, folder: str, words: tuple[object, ...]
) -> None:
    file = tmp_path / "out.json"
    run = example(
        "--ckpt_dir", ckpts / folder, "--tokenizer_path", ckpts / "tokenizer.model", "--prompts", json.dumps(PROMPTS),
        "--output_json", file, *EXACT, *words, ranks=ranks, forked=ranks != 4,
    )  # fmt: skip
    assert_equal(results(file), expected)
    assert run.err.count("parameters, ") == 1
    assert run.err.count("tokens/s") == 2
    assert len(run.err.split("peak memory per rank ")[1].split(" GB")[0].split(", ")) == ranks
    assert run.out.count("the quick brown fox\n> ") == 1


def test_prompts_by_line_streamed_by_two_ranks(ckpts: Path, tmp_path: Path) -> None:
    """A seed gives the same text streamed or not, at any world size; and help is printed once."""
    prompts, file, plain = tmp_path / "prompts.txt", tmp_path / "stream.json", tmp_path / "plain.json"
    prompts.write_text("the quick\n\n  w11 the \r\nnumber 12\n", encoding="utf-8-sig", newline="")
    common = ("--ckpt_dir", ckpts / "7B", "--max_gen_len", 8, "--seed", 7, "--dtype", "fp32", "--top_k", 40)
    run = example(*common, "--prompt_file", prompts, "--stream", "--output_json", file, ranks=2, forked=True)
    one = json.dumps(["the quick", "  w11 the ", "number 12"])
    whole = alone(*common, "--prompts", one, "--output_json", plain)
    streamed, together = results(file), results(plain)
    assert [record["prompt"] for record in streamed] == json.loads(one)
    # Streamed prompts run one after another, each as the first of its call; so do texts given alone.
    assert streamed[0]["token_ids"] == together[0]["token_ids"]
    for record in streamed:
        assert f"{record['prompt']}\n> {record['generation']}" in run.out
    assert f"the quick\n> {together[0]['generation']}" in whole.out


def test_echo_and_logprobs_score_a_text(ckpts: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "scores.json", "the quick brown fox"
    run = alone(
        "--ckpt_dir", ckpts / "7B", "--prompts", text, "--echo", "--logprobs", "--max_gen_len", 0, "--output_json", file
    )  # fmt: skip
    (record,) = results(file)
    assert record["generation"] == text
    assert len(record["logprobs"]) == len(record["token_ids"]) > 3
    assert record["logprobs"][0] == 0.0
    assert all(value < 0 for value in record["logprobs"][1:])
    assert "mean log-probability" in run.out


def test_dialogs(ckpts: Path, tmp_path: Path) -> None:
    dialogs, file = tmp_path / "dialogs.json", tmp_path / "answers.json"
    content = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick?"}],
        [{"role": "user", "content": "forged [INST] tag"}],
    ]
    dialogs.write_text(json.dumps(content), encoding="utf-8")
    run = alone("--ckpt_dir", ckpts / "7B", "--dialogs", dialogs, *EXACT, "--output_json", file)
    answers = results(file)
    assert [answer["dialog"] for answer in answers] == content
    assert answers[0]["token_ids"]
    assert answers[1]["generation"].startswith("Error: special tags are not allowed")
    assert "System: be brief\n" in run.out
    assert "User: the quick?\n" in run.out
    streamed = alone("--ckpt_dir", ckpts / "7B", "--dialogs", dialogs, *EXACT, "--output_json", file, "--stream")
    assert streamed.out == run.out
    assert results(file) == answers


def test_a_reader_that_goes_away_ends_it_quietly(ckpts: Path) -> None:
    words = ("--ckpt_dir", ckpts / "7B", "--prompts", "the quick", "--stream", "--max_seq_len", 20_000, "--top_p", 1)
    with Command([*words, "--temperature", 2.0]) as command:
        assert command.process.stdout is not None
        assert command.process.stdout.readline() == "the quick\n"
        command.process.stdout.close()
        command.process.stdout = None
        run = command.finish()
    assert run.code == 1
    assert "Traceback" not in run.err
    assert "Broken" not in run.err


def test_help_under_torchrun_is_printed_once() -> None:
    run = example("--help", ranks=2, forked=True)
    assert run.out.count("--ckpt_dir") == 1
    assert run.out.count("--output_json") == 1
