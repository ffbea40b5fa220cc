"""The text sources: whole, clean, and what SOURCES.md says of them."""

import hashlib
import pathlib
import re

import pytest

from tokeff.data import PROMPT_KINDS, prompts, sources
from tokeff.errors import UserError

pytestmark = pytest.mark.core
FOLDER = pathlib.Path(sources.__file__).parent / "text"
PASSAGES = (sources.PROSE, sources.CALIBRATION)


@pytest.mark.parametrize("name", PASSAGES)
def test_the_committed_passages_are_those_that_sources_md_names(name):
    stated = re.search(rf"{name}\.txt` \|.*`([0-9a-f]{{64}})`", (FOLDER / "SOURCES.md").read_text())
    assert stated is not None
    assert hashlib.sha256((FOLDER / f"{name}.txt").read_bytes()).hexdigest() == stated[1]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 400_000


def test_calibration_and_evaluation_share_no_eight_words_in_a_row():
    """Not with the prose that tasks read, nor with the short prompts; five in a row they share, so that the test can see something."""

    def runs(text: str, n: int) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z']+", text.lower())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    read, calibrated = [sources.text(), *(prompt.text for prompt in prompts())], sources.text(sources.CALIBRATION)
    assert 20_000 < len(calibrated.split()) < 30_000
    assert not runs(calibrated, 8) & set().union(*(runs(text, 8) for text in read))
    assert runs(calibrated, 5) & runs(sources.text(), 5)


@pytest.mark.parametrize("source", sources.SOURCES)
def test_pieces_join_to_the_text(source):
    pieces = sources.pieces(source)
    assert "".join(pieces).strip() == sources.text(source)
    assert all(piece[0].isspace() and not piece[-1].isspace() for piece in pieces)


@pytest.mark.parametrize("name", PASSAGES)
def test_prose_is_unwrapped_and_has_no_headings(name):
    text = sources.text(name)
    assert not re.search("CHAPTER", text, re.IGNORECASE)
    assert "\n" not in text.replace("\n\n", "")
    assert "  " not in text


def test_sentences_do_not_end_at_abbreviations():
    assert not [piece for piece in sources.pieces() if piece.endswith(("Mr.", "Mrs.", "Dr.", "St."))]
    assert sources._split("Mrs. Allen sat. She rose! Then she left.") == [
        "Mrs. Allen sat. She rose!",
        "Then she left.",
    ]


def test_code_keeps_its_indentation():
    assert "\n    def error(self, message):\n" in sources.text("stdlib")


def test_a_text_file_is_a_source(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("One sentence of a file here.\nIt goes on.\n\nAnd ends.\n")
    assert sources.text(str(path)) == "One sentence of a file here. It goes on.\n\nAnd ends."


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("none.txt", None, "give a readable"),
        ("bad.txt", b"\xff\xfe\xff", "save it as UTF-8"),
        ("empty.txt", b" \n", "is empty"),
    ],
)
def test_bad_text_files_are_refused_in_one_line(tmp_path, name, content, fix):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=fix):
        sources.text(str(tmp_path / name))


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'northanger_abbey'"):
        sources.text("northanger_abby")


def test_digests_tell_texts_apart():
    assert sources.digest("stdlib") != sources.digest("northanger_abbey") == sources.digest("northanger_abbey")


def test_there_are_forty_prompts_of_every_kind():
    assert {kind: len(prompts(kind)) for kind in PROMPT_KINDS} == dict.fromkeys(PROMPT_KINDS, 40)
    assert len({prompt.text for prompt in prompts()}) == 200
    assert all(prompt.text.strip() for prompt in prompts())
    with pytest.raises(UserError, match="known: chat, code, copy, prose|did you mean"):
        prompts("poetry")


def test_what_is_to_be_summarised_stands_in_the_passage():
    """The longest paragraph of each such prompt is the passage; the other asks."""
    for prompt in prompts("summarise"):
        passage, ask = sorted(prompt.text.split("\n\n"), key=len, reverse=True)
        assert passage in sources.text() and prompt.said and re.search("summar|main point|What happens", ask, re.IGNORECASE)


def test_the_share_that_is_copied_was_measured_for_every_copy_prompt_and_no_other():
    shares = [prompt.copied for prompt in prompts("copy")]
    assert all(share is not None and 0 <= share <= 1 for share in shares) and not any(p.copied for p in prompts() if p.kind != "copy")
    heavy = sources.copy_heavy()
    assert len(heavy) >= 16 and min(prompt.copied for prompt in heavy) >= sources.COPY_HEAVY > min(shares)


def test_prose_prompts_stand_in_the_passage():
    assert all(prompt.text in sources.text() for prompt in prompts("prose"))


def test_prompts_are_short(encode):
    most = 128 if len(encode(sources.text())) < 40000 else 300  # the small test tokenizer cuts words into more tokens
    assert max(len(encode(prompt.text)) for prompt in prompts()) <= most
