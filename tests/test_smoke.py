"""Every script x regime x mask runs at toy size, its variants too, and writes what it promises; and one run learns."""

import contextlib
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

import common
from conftest import ROOT, SCRIPTS, TINY, accepts, call

PAIRS = [(regime, mask) for regime in ("parametric", "explicit", "implicit") for mask in ("causal", "none")]
VARIANTS = [
    *(f"--regime {regime} --mask {mask}" for regime, mask in PAIRS),
    *(f"--regime {regime} --mask {mask} --signal {signal} --history 2" for regime, mask in PAIRS[:4] for signal in ("grad", "both")),
    "--regime explicit --decoder linear --mask none --latent-tokens 2 --signal both",
    *(f"--regime {regime} --mask {mask} --decoder linear" for regime, mask in PAIRS[:4]),
    "--regime implicit --decoder linear --state latent --mask causal --history 2",
    "--regime implicit --decoder linear --state latent --mask none",
    "--regime parametric --steps 1",
    "--regime parametric --signal both --history 3 --dtype bfloat16",
    "--regime implicit --dtype bfloat16",
    "--regime implicit --history 2",
    "--regime explicit --mask none --attention softmax",
    "--regime implicit --mask causal --attention linear",
    *(f"--regime implicit --decoder solve --mask {mask} --attention {attention} --history 2 --dtype bfloat16" for mask in ("causal", "none") for attention in ("softmax", "linear")),
    "--regime implicit --clock steps",
    "--regime explicit --clock steps",
    "--regime explicit --decoder linear --update direct",
    *(f"--regime {regime} --method paper" for regime in ("parametric", "explicit", "implicit")),
]
EVERYWHERE = [variant for variant in VARIANTS if re.fullmatch(r"--regime \w+ (--mask \w+|--method paper)", variant)]
# All scripts run some of them; of the others, which differ in common.py, each of the first three runs a third, and toposort.py all it has.
RUNS = [(script, variant) for i, script in enumerate(SCRIPTS) for variant in VARIANTS if accepts(script, variant) and (variant in EVERYWHERE or script == "toposort" or VARIANTS.index(variant) % 3 == i)]
# Of every script, what `--launch graph` is tried on.
CAPTURED = [("linreg", "--regime parametric --mask causal"), ("linreg", "--regime explicit"), ("mnist", ""), ("mnist", "--regime implicit --mask causal"), ("imagenet", ""), ("imagenet", "--regime parametric"), ("toposort", ""), ("mog_flow", ""), ("alphabets", "")]
KEYS = "command script args data device dtype threads torch seed parameters iterations train_seconds cpu_seconds metrics baselines".split()


def assert_finite(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            assert_finite(part)
    elif isinstance(content, (int, float)):
        assert math.isfinite(content)


def check_run(folder, script, steps, iterations):
    results = json.load(open(os.path.join(folder, "results.json")))
    assert set(KEYS) <= set(results) and results["script"] == script and results["iterations"] == iterations
    assert_finite(results)
    for split, metric in results["metrics"].items():
        shown = [*range(steps + 1), 2 * steps] if script == "toposort" else list(range(2 * steps + 1))
        assert metric["steps"] == shown, "from the initial state to twice the training"
        assert len(metric["mean"]) == len(metric["stderr"]) == len(shown) and metric["name"] and metric["tasks"] == 4
        assert results["baselines"][split]
        for baseline in results["baselines"][split].values():
            assert len(baseline["steps"]) == len(baseline["mean"]) == len(baseline["stderr"])
            assert set(baseline["steps"]) <= set(metric["steps"])
    rows = [json.loads(row) for row in open(os.path.join(folder, "log.jsonl"))]
    assert rows[-1]["iteration"] == iterations and len(rows[-1]["loss"]) == steps
    checkpoint = torch.load(os.path.join(folder, "checkpoint.pt"), weights_only=True)
    assert checkpoint["iteration"] == iterations and checkpoint["script"] == script
    assert results["parameters"] == sum({w.data_ptr(): w.numel() for w in checkpoint["model"].values()}.values())  # shared ones once
    with open(os.path.join(folder, "error.png"), "rb") as f:
        assert f.read(8) == b"\x89PNG\r\n\x1a\n"
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp") or name.startswith(".")]
    return results


@pytest.mark.parametrize("script,variant", CAPTURED)
def test_a_training_step_waits_for_no_number(script, variant, monkeypatch):
    """What a CUDA graph needs, shown without a GPU: a step runs on tensors that have shapes and hold nothing."""

    class Enough(Exception):
        pass

    def replayed(step, model, args):
        model.size = args.context
        with FakeTensorMode(allow_non_fake_inputs=True):
            losses, _ = step()
        assert len(losses) == args.steps and all(p.grad is not None for p in model.parameters())
        raise Enough

    monkeypatch.setattr(common, "replayed", replayed)
    with pytest.raises(Enough):
        call(script, variant, "--out here")


@pytest.mark.parametrize("script,variant", RUNS)
def test_smoke(script, variant, capsys):
    call(script, variant, "--out here", *["--eval-nodes 4"] * (script == "toposort"))  # one size of graphs will do
    results = check_run("here", script, 1 if "--steps 1" in variant else 2, 3)
    flags = variant.replace("--", "").split()
    found = results["args"] | {"dtype": results["dtype"]}
    assert all(str(found[flag.replace("-", "_")]) == value for flag, value in zip(flags[::2], flags[1::2]))
    printed = capsys.readouterr().out
    for split, metric in results["metrics"].items():
        for step, mean in zip(metric["steps"], metric["mean"]):
            assert any(line.startswith(split) and f"step {step}:" in line and f"{mean:.3f}" in line for line in printed.splitlines())
    assert len(os.listdir()) == 1, "everything goes to --out"


def draw(script, args, images=60):
    """A batch of tasks of any script, on its device."""
    s = importlib.import_module(script)
    if script == "mnist":
        split = torch.randn(images, 784, device=args.device), torch.randint(10, (images,), device=args.device)
        return s.sample_tasks({"train": split, "test": split}, args.tasks, args.steps, args)
    if script == "imagenet":
        start, count = torch.arange(10, device=args.device), torch.ones(10, dtype=torch.long, device=args.device)
        split = s.Split(torch.randn(10, args.dim, device=args.device), start, count)
        return s.sample_tasks(s.Features("toy", "toy", split, split), args.tasks, args.steps, args)
    return s.sample_tasks(args.tasks, args.steps, args)


@pytest.mark.parametrize("script,variant", RUNS)
def test_nothing_of_a_training_step_is_left_behind_on_the_cpu(script, variant, monkeypatch):
    """On the device "meta", which computes shapes alone and refuses tensors of the CPU as a GPU would."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it has none
    s = importlib.import_module(script)
    args = s.get_args([*TINY[script].split(), *variant.split()])
    args.device = "meta"
    task = draw(script, args)
    like = [s.Features("toy", "toy", s.Split(task.query_x[0], None, None), None)] if script == "imagenet" else []
    model = s.make_model(*like, args).train()
    for prediction in common.refine(model, task):
        loss = s.loss(prediction, task.query_y, *([task.query_x] if script == "toposort" else []))
        loss.mean().backward()
    assert prediction.device.type == "meta" and any(p.grad is not None for p in model.parameters())
    model.eval()
    assert [p.device.type for p in common.refine(model, task)] == ["meta"] * args.steps


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_default_folder_is_named_after_the_script_and_what_differs(script):
    name, value = ("regime", "explicit") if accepts(script, "explicit") else ("history", "2")
    folder = importlib.import_module(script).get_args([*TINY[script].split(), f"--{name}={value}", "--dtype=float32"]).out
    assert folder.startswith(f"out/{script}-") and "device" not in folder
    assert all(part in folder for part in (f"{name}_{value}", "width_8", "dtype_float32"))


PROGRAMS = [*(f"{name}.py" for name in ("linreg", "mnist", "imagenet", "toposort", "mog_flow", "alphabets", "bench")), *(f"results/{name}.py" for name in ("race", "cost", "sampler"))]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_loads_nothing_heavy_and_says_the_same(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # reading flags takes over Ctrl-C
    command = [sys.executable, "-X", "importtime", os.path.join(ROOT, program), "--overwrite", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "common" in loaded and not {"torch", "numpy", "scipy", "torchvision", "matplotlib"} & loaded
    with pytest.raises(SystemExit):
        importlib.import_module(os.path.basename(program).removesuffix(".py")).get_args(["--help"])
    assert capsys.readouterr().out == done.stdout and "--overwrite" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_the_defaults_of_the_script(script, monkeypatch, capsys):
    module, before, checked = importlib.import_module(script), common.parse_args, []

    def look(parser, *rest):
        text = " ".join(parser.format_help().split())
        for flag in ("regime", "steps", "width", "lr", "seed", "clock"):
            checked.append(flag)
            assert re.search(rf"--{flag} (?:(?! --).)*\(default: {re.escape(str(parser.get_default(flag)))}\)", text.partition("the method:")[2]), flag
        assert "default: None" not in text and "default: False" not in text
        return before(parser, *rest)

    monkeypatch.setattr(common, "parse_args", look)
    module.get_args(["--out=nowhere"])
    assert len(checked) == 6


def test_a_small_model_learns():
    """Two dimensions, seven observations a step: most of the way from doing nothing (2.25) to the oracle, and steps help."""
    call("linreg", "--dim 2 --context 7 --queries 16 --tasks 64 --width 24 --depth 2 --iters 500 --lr 4e-3 --steps 3 --eval-tasks 128 --out here")
    results = json.load(open("here/results.json"))
    model, oracle = results["metrics"]["id"]["mean"], results["baselines"]["id"]["ridge, all seen"]["mean"]
    assert model[3] < 0.5 < model[0] and model[3] < model[1]
    assert 0.2 < oracle[2] < model[3], "held-out queries cannot be answered better than the oracle, and have noise"


LOSSES = {  # of predictions (T, B, Q, Y), by hand
    "linreg": lambda p, task: torch.stack([(q - task.query_y).square().mean().log() for q in p]).mean(),
    "mnist": lambda p, task: -(task.query_y * p.log_softmax(-1)).sum(-1).mean(),
    "imagenet": lambda p, task: -(task.query_y * p.log_softmax(-1)).sum(-1).mean(),
    "toposort": lambda p, task: -torch.stack([row[alive].softmax(0)[leaf[alive]].sum().log() for row, leaf, alive in zip(p[0], task.query_y, task.query_x)]).mean(),
    "mog_flow": lambda p, task: (p - task.query_y).square().mean() * p.shape[-1],
}
STEPS = ["--regime parametric --mask causal", "--regime explicit", "--regime implicit --mask causal", "--regime implicit"]


@pytest.mark.parametrize("script,variant", [(script, variant) for script in LOSSES for variant in STEPS if accepts(script, variant) and (script != "mog_flow" or "implicit" in variant)])
def test_a_training_step_leaves_the_gradient_of_the_mean_of_its_k_losses(script, variant, monkeypatch):
    """By one backward pass through all steps. Weights and tasks are drawn by --seed and iteration, and the rate ends at zero."""
    drawn, seen, keys, clip = [], [], [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(common, "seed_all", lambda *key, seed_all=common.seed_all: keys.append(key) or seed_all(*key))
    monkeypatch.setattr(common, "share", lambda task: drawn.append((task, torch.get_rng_state())) or task)  # sizes are drawn after the tasks
    monkeypatch.setattr(common, "place", lambda model, args, place=common.place: seen.append(place(model, args)) or seen[0])

    def clipped(parameters, limit):
        (model, *_), (task, state), found = seen, drawn[-1], [p.grad.clone() for p in seen[0].parameters()]
        torch.set_rng_state(state)
        losses = [LOSSES[script](prediction, task) for prediction in common.refine(model, task)]
        for a, b in zip(found, torch.autograd.grad(sum(losses) / 2, list(model.parameters())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        seen.append(limit)
        return clip(model.parameters(), limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipped)
    call(script, f"{variant} --dtype float32 --steps 2 --iters 2 --seed 7 --out run")
    assert seen[1:] == [1.0, 1.0] and json.load(open("run/log.jsonl"))["lr"] == pytest.approx(0, abs=1e-12)
    assert keys[:3] == [(common.WEIGHTS, 7), (common.TRAINING, 7, 0), (common.TRAINING, 7, 1)]
    assert not torch.equal(drawn[0][0].context_x, drawn[1][0].context_x)
