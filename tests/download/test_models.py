import pytest

from llama.config import GEOMETRIES
from llama.download.models import MODELS, find, find_size
from llama.errors import DownloadError


def test_every_geometry_that_is_published_can_be_downloaded() -> None:
    offered = {name.removesuffix("-chat").removesuffix("-instruct") for name in MODELS}
    # Llama 1 was given out to researchers alone.
    assert offered == {name for name in GEOMETRIES if not name.startswith("llama-1-")}


@pytest.mark.parametrize(
    ("name", "repo", "original", "folder", "n_shards"),
    [
        ("llama-2-7b", "Llama-2-7b-hf", "Llama-2-7b", "llama-2-7b", 1),
        ("llama-2-70b-chat", "Llama-2-70b-chat-hf", "Llama-2-70b-chat", "llama-2-70b-chat", 8),
        ("llama-3-8b", "Meta-Llama-3-8B", "Meta-Llama-3-8B", "8b_pre_trained", 1),
        ("Llama-3-70B-Instruct", "Meta-Llama-3-70B-Instruct", None, "70b_instruction_tuned", 8),
        ("llama-3.1-405b", "Llama-3.1-405B", None, "Llama-3.1-405B-MP8", 8),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B", None, "Llama-3.2-1B", 1),
        ("llama-3.3-70b-instruct", "Llama-3.3-70B-Instruct", None, "Llama-3.3-70B-Instruct", 8),
    ],
)
def test_where_models_are(name: str, repo: str, original: str | None, folder: str, n_shards: int) -> None:
    model = find(name)
    assert (model.repo, model.original_repo) == (f"meta-llama/{repo}", f"meta-llama/{original or repo}")
    assert (model.folder, model.n_shards) == (folder, n_shards)


def test_sizes_are_those_of_llama_2() -> None:
    assert find_size("7B").name == "llama-2-7b"
    assert find_size("13B-chat").name == "llama-2-13b-chat"
    assert find_size("llama-3.2-1b").name == "llama-3.2-1b"
    with pytest.raises(DownloadError, match=r"8B is no size of Llama 2 .*llama-3-8b.*llama-3\.1-8b"):
        find_size("8B")


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with pytest.raises(DownloadError, match=r"'llama-3\.2-1': try llama-3\.2-1b"):
        find("llama-3.2-1")
    with pytest.raises(DownloadError, match="30B"):
        find_size("30B")
