"""What only a GPU can show: it computes what a CPU does, runs end there as well, and a compiled model is the same. Skipped without one."""

import json
import math
import signal

import pytest
import torch

import bench
import common
import linreg
from conftest import SCRIPTS, accepts, call
from test_common import K, SIGNALS, close, make, task  # noqa: F401 (task is a fixture)
from test_smoke import CAPTURED, check_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = [
    *(dict(regime=regime, mask=mask, decoder=decoder, signal=signal) for regime in ("parametric", "explicit") for mask in ("causal", "none") for decoder in ("linear", "span", "solve") for signal in SIGNALS),
    *(dict(regime="implicit", mask=mask, decoder=decoder, attention=attention, history=2) for mask in ("causal", "none") for decoder in ("linear", "solve") for attention in ("softmax", "linear")),
]  # fmt: skip


def training_step(device, task, dtype="float32", compiled=False, **case):  # noqa: F811
    """Predictions of all steps and the gradients of all parameters, on the CPU."""
    model = make(**case).to(device).train()
    model.transformer.dtype = getattr(torch, dtype)
    if compiled:
        common.compile_blocks(model.transformer)
    predictions = list(common.refine(model, common.Task(*(x.to(device) for x in task))))
    sum((p - task.query_y.to(device)).square().mean() for p in predictions).backward()
    return [x.detach().cpu() for x in (*predictions, *(p.grad for p in model.parameters() if p.grad is not None))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_a_gpu_computes_what_a_cpu_does(task, case, monkeypatch):  # noqa: F811
    monkeypatch.setattr(common, "draw_size", lambda N, shape, device="cpu": torch.full(shape, N - 2, device=device))
    there, here = (training_step(device, task, **case) for device in ("cuda", "cpu"))
    assert len(here) > K and there[0].shape == here[0].shape
    close(there, here, 1e-3)


@pytest.mark.parametrize("regime", common.REGIMES)
def test_a_compiled_transformer_is_the_same(task, regime):  # noqa: F811
    """At more sizes than torch.compile makes versions for by default, and after which it would go on uncompiled."""
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        for n in range(1, task.context_x.shape[2] + 1):
            cut = task._replace(context_x=task.context_x[:, :, :n], context_y=task.context_y[:, :, :n])
            plain, compiled = (training_step("cuda", cut, regime=regime, mask="causal", decoder="solve", compiled=c) for c in (False, True))
            close(compiled, plain, 1e-3)


@pytest.mark.parametrize("variant", [f"--regime {regime} --mask {mask}" for regime in common.REGIMES for mask in ("causal", "none")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_end_on_a_gpu(script, variant):
    if not accepts(script, variant):
        pytest.skip(f"{script} has one regime and one mask")
    call(script, variant, "--device cuda --dtype auto --out here")
    results = check_run("here", script, 2, 3)
    assert results["dtype"] == common.pick_device("cuda", "auto")[1] and results["machine"] == torch.cuda.get_device_name()


def test_a_run_on_a_gpu_is_resumed_there(monkeypatch):
    """What a checkpoint holds comes back on the CPU, also the rows of the log that are still to be written."""
    sample, calls = linreg.sample_tasks, []
    monkeypatch.setattr(linreg, "sample_tasks", lambda *args: (calls.append(1), len(calls) == 10 and signal.raise_signal(signal.SIGINT), sample(*args))[2])
    call("linreg", "--iters 20", "--device cuda --out run")
    call("linreg", "--resume run --device cuda", tiny=False)
    assert [json.loads(row)["iteration"] for row in open("run/log.jsonl")] == [20]


@pytest.mark.parametrize("script,variant", CAPTURED)
def test_a_replayed_run_is_the_eager_one(script, variant, monkeypatch):
    """With the same sizes: losses, and the checkpoint's weights."""
    runs = []
    for launch in ("graph", "eager"):
        if launch == "eager":
            monkeypatch.setattr(common, "replayed", lambda step, model, args: lambda: (setattr(model, "size", args.context if model.causal else common.rounded_size(args.context)), step())[1])
        call(script, f"{variant} --iters 12 --context 20 --dtype float32 --device cuda --launch {launch} --out {launch}")
        weights = torch.load(f"{launch}/checkpoint.pt", weights_only=True)["model"]
        runs.append([torch.tensor(json.loads(row)["loss"]) for row in open(f"{launch}/log.jsonl")] + list(weights.values()))
    close(runs[0], runs[1], 1e-3)


def test_what_cannot_be_captured_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(linreg, "objective", lambda prediction, y: (prediction - y).square().mean() * float(y.sum() != 0))  # waits for the GPU
    with pytest.raises(SystemExit):
        call("linreg", "--device cuda --launch graph --out run")
    assert "use --launch eager" in capsys.readouterr().err


@pytest.mark.parametrize("script", ("mog_flow", "alphabets"))
def test_flows_end_on_a_gpu(script):
    call(script, "--device cuda --out here")
    results = json.load(open("here/results.json"))
    assert results["device"] == "cuda" and all(math.isfinite(mean) for metric in results["metrics"].values() for mean in metric["mean"])


def test_the_bench_runs_on_a_gpu():
    toy = "--dim 4 --context 5 --queries 4 --tasks 4 --width 8 --depth 1 --heads 2 --steps 2 --repeats 1"
    bench.main(f"--scripts linreg mog_flow --regimes explicit implicit --out b.json --device cuda {toy}".split())
    assert [row["script"] for row in json.load(open("b.json"))["rows"]] == ["linreg", "linreg", "mog_flow"]
