"""report.py: the text of a row, as it is shown."""

from pathlib import Path

from report import Row, held_back
from tokenizer import TextStream, load_tokenizer

DEMO = Path(__file__).resolve().parents[1] / "checkpoints" / "demo"


def test_a_stop_text_is_never_shown_in_part():
    tokenizer = load_tokenizer(DEMO)
    for stop in ("return", "):\n", "\n\n", "x"):
        ids = tokenizer.encode("def f(x):\n    y = x\n    return y\n\n\nclass A:", bos=False)
        whole = tokenizer.decode(ids)
        row = Row([], TextStream(tokenizer, []), [stop, "never there"])
        shown = "".join(row.push([i], ()) for i in ids) + row.finish("length")
        assert shown == row.text == whole[: whole.find(stop)]
        assert row.finish_reason == "stop"


def test_text_that_only_begins_like_a_stop_is_shown_in_the_end():
    tokenizer = load_tokenizer(DEMO)
    ids = tokenizer.encode("x = retu", bos=False)
    row = Row([], TextStream(tokenizer, []), ["return"])
    shown = "".join(row.push([i], ()) for i in ids) + row.finish("length")
    assert shown == row.text == "x = retu"


def test_held_back_is_the_longest_beginning_of_a_stop():
    assert held_back("abc", ["cab", "bcd"]) == 2
    assert held_back("abc", ["xyz"]) == 0
    assert held_back("abc", []) == 0
