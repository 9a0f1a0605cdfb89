"""Text that comes in pieces: nothing is given out that must be taken back."""

import random

import pytest

from jaxhybrid.decoding.text import Answer


def decode(tokens):
    """A token is a byte."""
    return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one, two. three", [], "one, two. three"),
        ("one, two. three", ["."], "one, two"),
        ("one, two. three", ["never", "two. t"], "one, "),
        ("aaaab and", ["aab"], "aa"),
        ("ends with sto", ["stop"], "ends with sto"),
        ("stop", ["stop"], ""),
        ("öö and ü", ["ü"], "öö and "),
        ("both here", ["here", "bo"], ""),
    ],
)
def test_pieces_make_the_text_before_the_first_stop_string(text, stops, expected, size):
    answer, given = Answer(decode, stops), ""
    tokens = list(text.encode())
    for start in range(0, len(tokens), size):
        given += answer.add(tokens[start : start + size])
        assert expected.startswith(given)
        if answer.is_stopped:
            break
    assert given + answer.rest() == answer.text == expected
    assert answer.is_stopped == (expected != text)


def test_half_a_character_is_held_back():
    answer = Answer(decode)
    first, second = "é".encode()
    assert answer.add([65, first]) == "A"
    assert answer.add([second]) == "é"
    assert Answer(decode).add([first]) == ""


def test_the_stop_string_that_ends_first_counts_whatever_the_pieces():
    for size in (1, 2, 3, 100):
        answer, tokens = Answer(decode, ["bcdef", "cd"]), list(b"abcdefg")
        while tokens and not answer.is_stopped:
            answer.add(tokens[:size])
            tokens = tokens[size:]
        assert (answer.text, bytes(answer.tokens)) == ("ab", b"abcd")


@pytest.mark.parametrize("strips", [False, True])
def test_pieces_of_any_size_make_the_text_of_all_tokens(strips):
    """Characters of one to four bytes, broken ones, and a tokenizer that drops the space before a text."""
    marks = "aé€😀 �".encode()
    rng = random.Random(0)
    parts = [marks[:1], marks[1:3], marks[3:6], marks[6:10], marks[10:11], b"\xff", b"\xe2\x82"]
    seen = []

    def decoded(tokens):
        seen.append(len(tokens))
        text = decode(tokens)
        return text[1:] if strips and text.startswith(" ") else text

    for _ in range(100):
        tokens = list(b"".join(rng.choices(parts, k=60)) + b"end")
        answer, given, rest = Answer(decoded), "", tokens
        while rest:
            size = rng.randrange(1, 9)
            given += answer.add(rest[:size])
            rest = rest[size:]
        assert given + answer.rest() == answer.text == decoded(tokens)
    seen.clear()
    answer = Answer(decoded)
    for _ in range(1000):
        answer.add(list(b"fourteen bytes"))
    assert max(seen) <= 3 * 14
