"""Text that comes in pieces: nothing is given out that must be taken back."""

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
