"""bench.quality: what it says of a form of the weights, and what an interrupted run keeps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import quality
from tests.conftest import REPO


def test_scores_are_those_of_the_formulas() -> None:
    log_p, log_q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    values = quality.score(log_p, log_q, torch.tensor([1, 0]))
    assert values["kl"].tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0])
    assert values["same_top"].tolist() == [0, 1]
    total = quality.statistics(values)
    assert total["perplexity"].item() == pytest.approx((0.75 * 0.9) ** -0.5)
    assert total["change"].item() == pytest.approx((0.5 / 0.75) ** 0.5 - 1)


def test_the_standard_error_of_values_that_come_in_stretches_is_that_of_the_stretches() -> None:
    drawn = torch.randn(100, generator=torch.Generator().manual_seed(0)).abs()
    values = drawn.repeat_interleave(64)
    summary = quality.summarize({"kl": values, "nll": values, "change": values, "same_top": values})
    assert summary["kl_mean"] == pytest.approx([values.mean().item(), drawn.std().item() / 10], rel=0.2)
    assert summary["kl_90th_percentile"][0] == pytest.approx(values.quantile(0.9).item())


def test_the_noise_is_as_large_as_what_rounding_to_bf16_does() -> None:
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 10000)
    x[:100] = 0
    noise, rounding = quality.add_noise(x, torch.Generator().manual_seed(1)) - x, x.bfloat16().float() - x
    relative = [(error[100:] / x[100:]).square().mean() for error in (noise, rounding)]
    assert 0.9 < relative[0] / relative[1] < 1.1
    assert (noise.abs() <= x.abs() / 256).all()


def test_an_interrupted_run_keeps_the_forms_that_it_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "NAMES", ["int8-g128", "int4-gptq-g128"])
    monkeypatch.setattr(quality, "WINDOW", 24)
    given, quantized = [], quality.quantize.run

    def run(args: Any, windows: Any) -> None:
        given.append(windows if windows is None else windows.shape)
        if args.mode == "int4-gptq":
            raise KeyboardInterrupt
        quantized(args, windows)

    monkeypatch.setattr(quality.quantize, "run", run)
    options = ["--name", "x", "--num_tokens", "72", "--calibration_samples", "2", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="130"):
        quality.main(["--checkpoint_path", str(REPO / "checkpoints/demo"), *options])
    [path] = tmp_path.iterdir()
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["bfloat16", "noise", "int8-g128"] and given == [None, (2, 24)]
    assert {row["tokens"] for row in rows.values()} == {3 * 23}
    assert rows["bfloat16"]["kl_mean"] == [0, 0]
    assert 0 < rows["noise"]["kl_mean"][0] < rows["int8-g128"]["kl_mean"][0] < 0.01
    assert rows["int8-g128"]["step_bytes"] < 0.52 * rows["bfloat16"]["step_bytes"]
