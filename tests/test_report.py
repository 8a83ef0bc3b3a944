"""cli/report.py: the text of a row, as it is shown."""

from pathlib import Path

import pytest
import torch

from checkpoint import load_model
from cli.report import TextPrinter, bytes_per_step, report_plain_linears, report_rows, run_batch, step_weight_bytes
from compressed import quantization_config
from engine import Engine
from kernels import cpu
from linears import Form
from random_weights import random_model
from rows import Row, num_pending
from steps import Sampling, decode
from tests.conftest import assert_user_error, run_command
from tests.test_graphs import RAW
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


def test_rows_together_are_as_fast_as_all_their_tokens_in_the_time_of_the_longest(capsys):
    """A row that ended soon was fast, and added nothing to the others after that."""
    short, long = Row([1], None, []), Row([1], None, [])
    for row, count in ((short, 3), (long, 21)):
        row.tokens, row.arrivals, row.finish_reason = [0] * count, [1 + 0.1 * i for i in range(count)], "eos"
    report_rows([short, long], context=64)
    assert capsys.readouterr().err.splitlines()[-1] == "2 rows together: 11.0 tok/s"  # 2 + 20 in 2 s
    report_rows([Row([1], None, [], finish_reason="length")] * 2, context=64)
    assert "together" not in capsys.readouterr().err


def test_text_that_only_begins_like_a_stop_is_shown_in_the_end():
    tokenizer = load_tokenizer(DEMO)
    ids = tokenizer.encode("x = retu", bos=False)
    row = Row([], TextStream(tokenizer, []), ["return"])
    shown = "".join(row.push([i], ()) for i in ids) + row.finish("length")
    assert shown == row.text == "x = retu"


def test_held_back_is_the_longest_beginning_of_a_stop():
    assert num_pending("abc", ["cab", "bcd"]) == 2
    assert num_pending("abc", ["xyz"]) == 0
    assert num_pending("abc", []) == 0


def test_a_row_that_a_stop_text_ended_is_decoded_no_further():
    tokenizer, sizes = load_tokenizer(DEMO), []
    model = load_model(DEMO, dtype=torch.float32)
    model.setup_caches(2, 64)

    def watched(model, tokens, *rest):
        sizes.append(len(tokens))
        return decode(model, tokens, *rest)

    engine = Engine(model, Sampling(temperature=0), decode=watched)
    prompts = [tokenizer.encode(text) for text in ("def main(", "import ")]
    first, second = run_batch(engine, prompts, 20, [")"], TextPrinter(tokenizer, 2, echo=True, quiet=True))
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert sizes == [2] * (len(first.tokens) - 1) + [1] * (20 - len(first.tokens))
    # Nor do its keys and values count in the steps after its end.
    alone = bytes_per_step(model, [first]) - step_weight_bytes(model)
    beside = bytes_per_step(model, [first, second]) - bytes_per_step(model, [second])
    assert abs(beside - alone * len(first.tokens) / 20) <= 1


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1", "ascii:strict"])
def test_a_stdout_that_cannot_take_every_text_is_refused_before_the_run(tmp_path, encoding):
    args = ("--prompt", "def", "--max_new_tokens", 1)
    result = run_command("generate.py", *args, cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert_user_error(result, f"stdout's encoding is {encoding[:5]}", "PYTHONIOENCODING")
    assert result.stdout == ""


def test_a_handler_that_the_user_has_named_is_taken(tmp_path):
    args = ("--prompt", "# café", "--max_new_tokens", 1)
    result = run_command("generate.py", *args, cwd=tmp_path, PYTHONIOENCODING="ascii:backslashreplace")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(r"# caf\xe9")


@pytest.mark.skipif(cpu.library() is None, reason="the CPU has no AVX2, or there is no C++ compiler")
def test_quantized_linears_without_a_kernel_are_named(capsys):
    for size, dtype, count in ((32, torch.bfloat16, 0), (16, torch.bfloat16, 8), (32, torch.float32, 9)):
        form = quantization_config(Form(4, size, has_zeros=True))
        report_plain_linears(random_model(RAW | {"quantization_config": form}, dtype=dtype))
        name, said = str(dtype).removeprefix("torch."), capsys.readouterr().err
        assert said.startswith(f"{count} quantized weights have no fast kernel in {name} here") if count else not said
    report_plain_linears(random_model(RAW, dtype=torch.float32))  # is not quantized
    assert not capsys.readouterr().err
