"""What the benchmark command measures, that it halves a batch when memory ends, and the columns of its file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from mixerzoo.vision import benchmark
from mixerzoo.vision.benchmark import Bench, Result, Setting, find_models, main, measure, prepare, table, write_csv
from torch import Tensor, nn

CPU = torch.device("cpu")
QUICK = ["--rounds", "2", "--seconds", "0", "--batch-size", "2", "--input-size", "64"]


class _Probe(nn.Module):
    """Stands in for a timm model of pictures [3, 8, 8]; notes what comes, and may fail above some batch."""

    def __init__(self, *, most: int = 1000, error: Exception | None = None, extra: int = 0) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 8, 8)}
        self.head = nn.Conv2d(3, 4, 8)
        self.most, self.error, self.extra, self.seen = most, error, extra, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((len(x), x.dtype, x.is_contiguous(memory_format=torch.channels_last)))
        if self.error is not None and len(x) > self.most:
            raise self.error
        if self.extra and not x.is_meta:
            torch.ones(self.extra // 4).sum()
        return self.head(x).flatten(1)


@pytest.fixture(autouse=True)
def _no_search_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the rest of a test here, and these models leave none."""
    monkeypatch.setattr(benchmark.gc, "collect", lambda: None)


def _setting(**changes: Any) -> Setting:
    return Setting(device=CPU, **{"batch_size": 8, "rounds": 2, "seconds": 0.0, **changes})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("kind", ["infer", "train"])
def test_memory_that_ends_halves_the_batch(kind: Any, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    model = _Probe(most=3, error=error)
    bench = Bench("probe", model, kind, _setting(batch_size=16))
    assert bench.result.batch == len(bench.images) == 2
    assert list(dict.fromkeys(batch for batch, *_ in model.seen if batch > 1)) == [16, 8, 4, 2]
    assert "memory ended at batch 4" in caplog.text and "trying 2" in caplog.text


def test_what_does_not_fit_at_all_and_what_is_no_lack_of_memory() -> None:
    with pytest.raises(ValueError, match="even at batch 1; try --input-size"):
        Bench("probe", _Probe(most=0, error=MemoryError()), "infer", _setting())
    other = _Probe(most=3, error=RuntimeError("expected 3 channels"))
    with pytest.raises(RuntimeError, match="expected 3 channels"):
        Bench("probe", other, "infer", _setting())
    assert [batch for batch, *_ in other.seen] == [8]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read on Linux only")
def test_memory_is_that_of_the_weights_and_of_the_largest_moment() -> None:
    extra = 64 << 20
    plain, greedy = (Bench("probe", _Probe(extra=size), "infer", _setting()).result for size in (0, extra))
    assert plain.memory is not None and greedy.memory is not None
    assert plain.memory < extra // 8
    assert extra * 0.95 < greedy.memory < extra * 1.3
    model = _Probe()
    # A training step adds gradients, two moments, and up to three times as much of what AdamW computes with. The layer
    # is linear: how often a convolution copies its weights into other layouts depends on the processor.
    model.head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 50_000))
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    trained = Bench("probe", model, "train", _setting(batch_size=1)).result
    assert trained.memory is not None and 3.9 * weights < trained.memory < 7.9 * weights


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    benches = [Bench(name, _Probe(), "infer", _setting()) for name in "ab"]
    names = {id(bench): name for bench, name in zip(benches, "ab", strict=True)}
    monkeypatch.setattr(benchmark, "_seconds", lambda call, _: turns.append(names[id(call.__self__)]) or len(turns))
    results = measure(benches, _setting(rounds=3))
    assert turns == [*"ababab"]
    assert [result.steps for result in results] == [[1, 3, 5], [2, 4, 6]]
    assert all(len(result.latencies) >= 30 for result in results)


def test_numbers_of_a_result() -> None:
    result = Result("a", "infer", 10, 20, (8, 8), batch=30, memory=None, steps=[0.4, 0.1, 0.3])
    assert result.step == 0.3 and result.samples_per_sec == pytest.approx(100) and result.spread == pytest.approx(1)
    assert result.latency(0.5) is None
    result.latencies = [float(number) for number in range(100, 0, -1)]
    assert (result.latency(0.5), result.latency(0.95), result.latency(1.0)) == (50, 95, 100)


def test_training_and_evaluation_share_a_model_and_not_its_mode() -> None:
    model = _Probe()
    infer, train = (Bench("probe", model, kind, _setting()) for kind in ("infer", "train"))
    before = model.head.weight.detach().clone()
    infer.enter()
    infer.step()
    assert not model.training and torch.equal(model.head.weight, before)
    train.enter()
    train.step()
    assert model.training and not torch.equal(model.head.weight, before)


def test_precision_format_and_compilation_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []
    probe = _Probe()
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append(how))
    monkeypatch.setattr(benchmark, "load_model", lambda *_, **__: probe)
    prepare("probe", _setting(precision="bfloat16", channels_last=True, compile=True), ["infer"])
    assert probe.seen[0] == (8, torch.bfloat16, True) and probe.head.weight.dtype == torch.bfloat16
    assert probe.head.weight.is_contiguous(memory_format=torch.channels_last) and compiled == [{"dynamic": False}]
    outputs: list[torch.dtype] = []
    probe = _Probe()
    probe.head.register_forward_hook(lambda *parts: outputs.append(parts[-1].dtype))
    prepare("probe", _setting(precision="bfloat16", amp=True), ["infer"])
    assert probe.seen[0] == (8, torch.float32, False) and outputs[0] == torch.bfloat16


def test_file_has_the_columns_of_timm(tmp_path: Path) -> None:
    def result(name: str, kind: Any, step: float) -> Result:
        times = {"steps": [step], "latencies": [0.01] if kind == "infer" else []}
        return Result(name, kind, 1_234_567, 2_000_000_000, (64, 96), 4, 3_000_000, **times)

    slow, fast = ([result(name, "infer", step), result(name, "train", 3 * step)] for name, step in (("a", 2), ("b", 1)))
    write_csv([*slow, *fast], tmp_path / "r.csv")
    with open(tmp_path / "r.csv") as file:
        rows = [*csv.DictReader(file)]
    assert [row["model"] for row in rows] == ["b", "a"]
    timms = "model,infer_samples_per_sec,infer_step_time,infer_batch_size,infer_img_size,infer_gmacs,"
    timms += "train_samples_per_sec,train_step_time,train_batch_size,train_img_size,param_count"
    assert [*rows[0]][:11] == timms.split(",")
    assert [*rows[0].values()][:7] == ["b", "4.0", "1000.0", "4", "96", "2.0", "1.33"]
    assert rows[0]["param_count"] == "1.23" and rows[0]["infer_latency"] == "10.0"
    write_csv([slow[0]], tmp_path / "r.csv")
    assert "train" not in (tmp_path / "r.csv").read_text()


def test_command_measures_and_names_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "r.csv"
    assert (
        main(
            ["test_convnext2", "vit_tiny_patch16_224", *QUICK, "--model-kwargs", "depths=(1,1,1,1)", "--csv", str(file)]
        )
        == 1
    )
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines[0] and "float32" in lines[0]
    assert len(lines) == 4 and lines[3].split()[:6] == ["test_convnext2", "infer", *lines[3].split()[2:4], "64", "2"]
    assert len({len(line) for line in lines[2:]}) == 1
    assert "vit_tiny_patch16_224 is left out" in caplog.text and "depths" in caplog.text
    assert len(file.read_text().splitlines()) == 2


def test_names_and_patterns() -> None:
    assert find_models(["nat_mini", "nat_[mt]*", "resnet18.a1_in1k"]) == ["nat_mini", "nat_tiny", "resnet18.a1_in1k"]
    with pytest.raises(ValueError, match="no model matches 'nat_minni'; did you mean nat_mini"):
        find_models(["nat_minni"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_*"], "no model matches"),
        (["nat_mini", "--batch-size", "0"], "whole number from 1"),
        (["nat_mini", "--device", "abacus"], "--device abacus cannot be used"),
        (["nat_mini", "--precision", "float8"], "invalid choice"),
        (["nat_mini", "--amp"], "--amp needs --precision"),
        (["nat_mini", "--input-size", "1", "2", "3"], "one or two numbers"),
        (["nat_mini", "--csv", "no/such/folder/r.csv"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1, error


def test_table_leaves_empty_what_is_not_known() -> None:
    line = table([Result("a", "train", 10, 0, (8, 8), 2, None, steps=[1.0])]).splitlines()[1]
    assert line.split() == ["a", "train", "0.0", "8", "2", "2", "0", "%", "1000"]
