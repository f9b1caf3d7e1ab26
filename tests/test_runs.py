"""What a run promises: it can be stopped, resumed, evaluated and redrawn without a bit of difference, and never keeps a NaN."""

import contextlib
import importlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
import linreg
from conftest import ROOT, SCRIPTS, TINY, call
from test_ranks import checkpoint, ends, start

# ---------------------------------------------------------------- stop, resume, evaluate, redraw


TWENTY = "--iters 20 --regime parametric --mask causal --history 2 --signal both"  # all that could keep a hidden state


def contents(folder):
    """Everything in a run that must repeat: weights, optimizer, log, results; without times and folders."""
    checkpoint = torch.load(os.path.join(folder, "checkpoint.pt"), weights_only=True)
    results = json.load(open(os.path.join(folder, "results.json")))
    rows = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
    for row in rows:
        del row["seconds"]
    for key in ("command", "train_seconds", "cpu_seconds"):
        del results[key], checkpoint[key]
    return checkpoint, results, rows


def assert_same_run(a, b):
    (checkpoint_a, results_a, rows_a), (checkpoint_b, results_b, rows_b) = contents(a), contents(b)
    assert identical(checkpoint_a, checkpoint_b)
    assert results_a == results_b
    assert rows_a == rows_b


def identical(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("script", (*SCRIPTS, "mog_flow"))
def test_twenty_iterations_equal_ten_an_interrupt_and_ten_more(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    twenty = TWENTY if script not in ("toposort", "mog_flow") else "--iters 20 --history 2"
    monkeypatch.setattr(common.Journal, "every", 4)  # so that the interrupt falls between two rows of the log
    call(script, twenty, "--out straight")
    sample, calls = module.sample_tasks, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
        return sample(*args)

    monkeypatch.setattr(module, "sample_tasks", interrupted)
    call(script, twenty, "--out broken")
    assert "stopped after 10 of 20" in capsys.readouterr().out
    assert json.load(open("broken/results.json"))["iterations"] == 10, "Ctrl-C evaluates"
    assert os.path.exists("broken/error.png"), "and plots"
    call(script, "--resume broken", tiny=False)
    assert_same_run("straight", "broken")


def test_the_clock_counts_what_a_gpu_still_had_to_do(monkeypatch):
    check = common.Journal.check_finite
    monkeypatch.setattr(common.Journal, "check_finite", lambda self: (time.sleep(0.3), check(self)))  # as long as it takes to fetch a loss
    call("linreg", "--iters 1 --out run")
    assert json.load(open("run/results.json"))["train_seconds"] >= 0.3


def test_results_say_where_training_took_place_and_where_the_evaluation():
    call("linreg", "--dtype bfloat16 --out run")
    for flags in ("--eval run/checkpoint.pt", "--resume run"):
        call("linreg", flags, "--dtype float32", tiny=False)
        results = json.load(open("run/results.json" if "resume" in flags else "run/eval/results.json"))
        assert (results["dtype"], results["trained_on"]["dtype"]) == ("float32", "bfloat16") and results["trained_on"]["machine"] == results["machine"]
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    del checkpoint["trained_on"]  # as one from before it was kept
    torch.save(checkpoint, "run/checkpoint.pt")
    call("linreg", "--eval run/checkpoint.pt --overwrite", tiny=False)
    assert json.load(open("run/eval/results.json"))["trained_on"] is None


@pytest.mark.parametrize("script", ("linreg", "mnist", "imagenet"))
def test_an_evaluation_goes_as_far_as_it_is_told(script, finished_copy):
    """On the same tasks, so that what it passes on the way does not change."""
    folder = finished_copy(script)
    usual = json.load(open(folder / "results.json"))
    for steps in (1, 7):
        call(script, "--eval", folder / "checkpoint.pt", f"--overwrite --eval-steps {steps}", tiny=False)
        results = json.load(open(folder / "eval" / "results.json"))
        assert results["args"] == usual["args"] | {"eval_steps": steps}, "says how it was trained"
        for split, metric in results["metrics"].items():
            assert metric["steps"] == list(range(steps + 1))
            shared = min(steps, 4) + 1
            assert metric["mean"][:shared] == pytest.approx(usual["metrics"][split]["mean"][:shared])
            for name, row in results["baselines"][split].items():
                beside = usual["baselines"][split][name]
                both = {k: (row["mean"][i], beside["mean"][beside["steps"].index(k)]) for i, k in enumerate(row["steps"]) if k in beside["steps"]}
                assert both and row["steps"][-1] == steps and all(a == pytest.approx(b, rel=1e-4) for a, b in both.values())


def test_graphs_of_another_size_can_be_evaluated_without_training_anew(finished_copy):
    folder = finished_copy("toposort")
    usual = json.load(open(folder / "results.json"))
    call("toposort", "--eval", folder / "checkpoint.pt", "--eval-nodes 6", tiny=False)
    results = json.load(open(folder / "eval" / "results.json"))
    assert results["args"] == usual["args"] | {"eval_nodes": 6}, "says how it was trained"
    same, other = (m["data"] for m in results["metrics"].values() if m["data"].startswith("LIN in"))
    assert "4 nodes" in same and "6 nodes" in other


def test_a_resumed_run_keeps_what_it_was_told_and_can_be_told_otherwise():
    def outcome():
        results = json.load(open("run/results.json"))
        return results["command"], results["dtype"], results["metrics"]["id"]["steps"], results["metrics"]["id"]["tasks"]

    call("linreg", "--dtype float32 --eval-steps 7 --eval-tasks 3 --out run")
    told = outcome()
    assert told[1:] == ("float32", list(range(8)), 3) and "--eval-steps 7" in told[0]
    call("linreg", "--resume run", tiny=False)
    assert outcome() == told
    call("linreg", "--resume run --eval-steps 3", tiny=False)
    assert outcome()[1:] == ("float32", list(range(4)), 3)


@pytest.mark.parametrize("script", ("toposort", "mog_flow", "alphabets"))
def test_scripts_whose_evaluation_has_fixed_steps_have_no_such_flag(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).get_args(["--eval-steps", "3"])
    assert stop.value.code == 2 and "--eval-steps" in capsys.readouterr().err


def python(script, *words):
    return [sys.executable, os.path.join(ROOT, script), *words]


def test_ctrl_c_at_a_random_moment_of_a_real_process_loses_nothing():
    flags = [*TINY["linreg"].split(), *TWENTY.split(), "--iters", "200"]
    call("linreg", *flags, "--out straight", tiny=False)
    process = subprocess.Popen(python("linreg.py", *flags, "--out", "broken"), stderr=subprocess.PIPE, text=True, bufsize=1)
    seen, moment = "", random.randrange(60)
    while not any(int(count) >= moment for count in re.findall(r"(\d+)/200 ", seen)):  # as shown by the bar
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "Traceback" not in rest, rest
    stopped = torch.load("broken/checkpoint.pt", weights_only=True)["iteration"]
    assert stopped < 200 and json.load(open("broken/results.json"))["iterations"] == stopped
    call("linreg", "--resume broken", tiny=False)
    assert_same_run("straight", "broken")


def test_ctrl_c_while_torch_loads_leaves_no_traceback():
    slow = "import signal, sys; sys.meta_path.insert(0, type('Finder', (), {'find_spec': lambda name, *_: name == 'torch' and signal.raise_signal(signal.SIGINT) or None}))"
    done = subprocess.run([sys.executable, "-c", f"{slow}; import linreg"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stderr


def test_sigterm_saves_and_leaves_without_evaluating(monkeypatch):
    """As a cluster does that wants its machine back: the rest of the run is the same as if nothing had happened."""
    call("linreg", TWENTY, "--out straight")
    sample, calls = linreg.sample_tasks, []
    monkeypatch.setattr(linreg, "sample_tasks", lambda *args: (calls.append(1), len(calls) == 10 and signal.raise_signal(signal.SIGTERM), sample(*args))[2])
    with pytest.raises(SystemExit) as stop:
        call("linreg", TWENTY, "--out broken")
    assert stop.value.code == 143 and not os.path.exists("broken/results.json")
    assert torch.load("broken/checkpoint.pt", weights_only=True)["iteration"] == 10
    call("linreg", "--resume broken", tiny=False)
    assert_same_run("straight", "broken")


def test_a_signal_during_the_last_save_counts(monkeypatch):
    save = common.Journal.save
    monkeypatch.setattr(common.Journal, "save", lambda self: (save(self), self.iteration == 3 and signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit) as stop:
        call("linreg", "--out run")
    assert stop.value.code == 143


def test_a_second_ctrl_c_does_not_wait_for_the_iteration(monkeypatch):
    monkeypatch.setattr(linreg, "sample_tasks", lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    with pytest.raises(KeyboardInterrupt):
        call("linreg", "--out run")
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kills", [int(os.environ.get("KILLS", 5))])
def test_sigkill_at_random_moments_loses_no_bit(kills, monkeypatch):
    """Whatever a kill cuts short, the last checkpoint is whole, and resuming replays what came after it."""
    call("linreg", TWENTY, "--iters 100 --out straight")
    monkeypatch.setattr(common.Journal, "save_seconds", 0)  # a checkpoint an iteration
    flags = TWENTY, "--iters 100 --out broken"
    for kill in range(kills):
        moment = 90 * kill // kills + random.randrange(90 // kills)
        (process,) = start(1, "linreg", *flags)
        while not os.path.exists("broken/checkpoint.pt") or checkpoint("broken")["iteration"] < moment:
            assert process.is_alive()
        time.sleep(0.02 * random.random())  # up to a few iterations
        process.kill()
        assert ends([process]) == [-signal.SIGKILL] and checkpoint("broken")["iteration"] < 100
        flags = ("--resume broken",)
    call("linreg", "--resume broken", tiny=False)
    assert_same_run("straight", "broken")


def test_rows_that_a_kill_left_ahead_of_the_checkpoint_are_replayed(monkeypatch):
    monkeypatch.setattr(common.Journal, "every", 2)
    call("linreg", TWENTY, "--out straight")
    sample, left = linreg.sample_tasks, iter(range(9, -1, -1))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(linreg, "sample_tasks", lambda *args: (1 / next(left), sample(*args))[1])
        call("linreg", TWENTY, "--out broken")  # the checkpoint is of iteration 1, the log goes on to 8
    assert sum(1 for _ in open("broken/log.jsonl")) == 4
    call("linreg", "--resume broken", tiny=False)
    assert_same_run("straight", "broken")


def test_a_full_disk_is_one_line_and_keeps_the_last_good_checkpoint(finished_copy, monkeypatch, capsys):
    """A limit on the size of files stands in for the disk."""
    resource = pytest.importorskip("resource")
    folder, save, (soft, hard) = finished_copy("linreg"), common.Journal.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(journal):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            save(journal)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(common.Journal, "save", full)
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        call("linreg", "--resume", folder, tiny=False)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("error: cannot write")
    assert (folder / "checkpoint.pt").read_bytes() == before and not (folder / "checkpoint.pt.tmp").exists()


def test_resuming_a_finished_run_changes_nothing(finished, finished_copy):
    folder = finished_copy("linreg")
    call("linreg", "--resume", folder, tiny=False)
    assert_same_run(finished("linreg"), folder)


def test_a_row_of_the_log_is_the_mean_since_the_last_one(monkeypatch):
    rows = {}
    for every in (1, 3):
        monkeypatch.setattr(common.Journal, "every", every)
        call("linreg", f"--iters 6 --out {every}")
        rows[every] = [json.loads(row) for row in open(f"{every}/log.jsonl")]
    assert [row["iteration"] for row in rows[3]] == [3, 6]
    for i, row in enumerate(rows[3]):
        for key in ("loss", "metric"):
            np.testing.assert_allclose(row[key], np.mean([one[key] for one in rows[1][3 * i : 3 * i + 3]], 0), rtol=1e-5)


@pytest.mark.parametrize("flags,dtype", (("avx2 avx512f", "float32"), ("avx512f avx512_bf16", "bfloat16"), ("amx_bf16 amx_tile", "bfloat16")))
def test_bfloat16_is_for_chips_that_have_it(flags, dtype, monkeypatch):
    monkeypatch.setattr(common, "CPUINFO", f"flags : fpu {flags}\n")
    assert common.pick_device("auto", "auto")[:2] == ("cpu", dtype) and common.pick_device("cpu", "float32")[1:] == ("float32", "as asked")


def test_compile_compiles_the_transformer(monkeypatch):
    compiled = []
    monkeypatch.setattr(common, "compile_blocks", compiled.append)
    call("linreg", "--out plain")
    assert not compiled
    call("linreg", "--compile --out run")
    assert [type(x) for x in compiled] == [common.Transformer]


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluating_a_checkpoint_reproduces_its_results(script, finished, finished_copy):
    folder = finished_copy(script)
    before = {f: (folder / f).read_bytes() for f in os.listdir(folder)}
    call(script, "--eval", folder / "checkpoint.pt", tiny=False)
    trained, again = (json.load(open(f)) for f in (folder / "results.json", folder / "eval" / "results.json"))
    for key in ("metrics", "baselines", "iterations", "parameters", "train_seconds", "seed"):
        assert again[key] == trained[key]
    assert before == {f: (folder / f).read_bytes() for f in before}
    call(script, "--eval", folder / "checkpoint.pt", "--out more --eval-tasks 5", tiny=False)
    assert all(metric["tasks"] == 5 for metric in json.load(open("more/results.json"))["metrics"].values())


def test_time_is_of_all_processes_of_a_run(finished_copy):
    folder = finished_copy("linreg")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["cpu_seconds"] <= json.load(open(folder / "results.json"))["cpu_seconds"] + 0.1
    torch.save(checkpoint | {"cpu_seconds": 1e6, "train_seconds": 1e6, "iteration": 2}, folder / "checkpoint.pt")
    call("linreg", "--resume", folder, tiny=False)
    for saved in (json.load(open(folder / "results.json")), torch.load(folder / "checkpoint.pt", weights_only=True)):
        assert saved["cpu_seconds"] > 1e6 and saved["train_seconds"] >= 1e6


def test_a_run_of_a_gpu_can_be_evaluated_without_one(finished_copy):
    folder = finished_copy("linreg")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"args": checkpoint["args"] | {"launch": "graph"}}, folder / "checkpoint.pt")
    call("linreg", "--eval", folder / "checkpoint.pt", tiny=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_plots_are_redrawn_from_the_json_alone(script, finished_copy, pictures):
    folder = finished_copy(script)
    (folder / "checkpoint.pt").unlink()
    before = {f: (folder / f).read_bytes() for f in os.listdir(folder)}
    (folder / "error.png").unlink()
    call(script, "--plot-only", folder, tiny=False)
    assert before == {f: (folder / f).read_bytes() for f in os.listdir(folder)}
    results = json.load(open(folder / "results.json"))
    next(iter(results["metrics"].values()))["mean"][1] += 1
    json.dump(results, open(folder / "results.json", "w"))
    call(script, "--plot-only", folder, tiny=False)
    assert (folder / "error.png").read_bytes() != before["error.png"]


def test_a_plot_shows_no_losses_from_after_its_errors(finished_copy, monkeypatch):
    """As of a run that was evaluated, went on and was then killed."""
    folder, figures = finished_copy("linreg"), []
    results, (row,) = json.load(open(folder / "results.json")), map(json.loads, open(folder / "log.jsonl"))
    (folder / "log.jsonl").write_text("".join(json.dumps(row | {"iteration": i}) + "\n" for i in (row["iteration"], 50)))
    monkeypatch.setattr(common, "save_figure", lambda fig, path: figures.append(fig))
    call("linreg", "--plot-only", folder, tiny=False)
    assert [max(line.get_xdata()) for line in figures[0].axes[-1].lines] == [results["iterations"]] * results["args"]["steps"]


def test_a_reader_that_has_seen_enough_is_no_traceback(finished_copy):
    process = subprocess.Popen(python("linreg.py", "--plot-only", str(finished_copy("linreg"))), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| head` does when it has its lines
    assert process.stderr.read() == "" and process.wait(60) == 0


def test_ctrl_c_that_ends_the_reader_too_loses_nothing():
    """As in `python linreg.py 2>&1 | tee log`: the bar and all that is printed find no reader."""
    flags = [*TINY["linreg"].split(), "--iters", "100000", "--out", "run"]
    process = subprocess.Popen(python("linreg.py", *flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not os.path.exists("run/checkpoint.pt"):
        process.stdout.read(1)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and os.path.exists("run/error.png")
    assert json.load(open("run/results.json"))["iterations"] == torch.load("run/checkpoint.pt", weights_only=True)["iteration"] > 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_on_a_full_disk_is_one_line(finished_copy):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = python("linreg.py", "--plot-only", str(finished_copy("linreg")))
    done = subprocess.run(command, stdout=open("/dev/full", "w"), stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: [Errno 28] No space left on device"]


def test_streams_that_are_closed_or_cannot_encode_a_name(finished_copy):
    os.rename(finished_copy("linreg"), "rü")
    command = shlex.join(python("linreg.py", "--resume", "rü")) + " 2>&-"
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"plot: r\\xfc/error.png" in done.stdout


def test_a_logarithmic_plot_starts_after_one_mini_batch_and_leaves_out_what_stays_far_behind(monkeypatch):
    curve = lambda *mean: {"steps": list(range(len(mean))), "mean": list(mean), "stderr": [0.1] * len(mean), "data": "MNIST", "name": "error %"}
    near, far = (dict(curve(*mean), steps=[1, 2]) for mean in ((32.0, 25.0), (75.0, 74.0)))
    results = {"args": {"steps": 1, "regime": "implicit", "decoder": "solve"}, "script": "mnist", "data": "MNIST", "iterations": 3, "seed": 0}
    results |= {"metrics": {"id": curve(90.0, 30.0, 20.0)}, "baselines": {"id": {"kernel ridge": near, "majority label": far}}}
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda fig, path: figures.append(fig))
    for log_scale in (False, True):
        common.plot_steps("nowhere", results, log_scale)
    for fig, model, labels in zip(figures, ([0, 1, 2], [1, 2]), ("majority label", "majority label (off the scale)")):
        drawn = {line.get_label(): list(line.get_xdata()) for line in fig.axes[0].lines}
        assert model in drawn.values() and drawn["kernel ridge"] == [1, 2] and drawn["trained up to here"] == [1, 1]
        assert "trained on MNIST:" in fig.get_suptitle() and fig.axes[0].get_title() == "in distribution: MNIST"
        assert drawn[labels] == ([] if "scale" in labels else [1, 2])


# ---------------------------------------------------------------- losses that are no number


def stops(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        call("linreg", *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def finite(checkpoint):
    return all(w.isfinite().all() for w in checkpoint["model"].values())


@pytest.mark.parametrize("seconds,last", ((0, 7), (60, 1)), ids=("when-saving", "when-logging"))
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(seconds, last, monkeypatch, capsys):
    sample, calls = linreg.sample_tasks, []

    def spoiled(*args):
        task = sample(*args)
        calls.append(1)
        if len(calls) == 8:
            task.query_y[2, 3] = float("nan")
        return task

    monkeypatch.setattr(linreg, "sample_tasks", spoiled)
    monkeypatch.setattr(common.Journal, "save_seconds", seconds)
    assert "iteration 8;" in stops(capsys, "--iters 20 --out run")
    kept = torch.load("run/checkpoint.pt", weights_only=True)
    assert kept["iteration"] == last and finite(kept) and os.listdir("run") == ["checkpoint.pt"]


@pytest.mark.parametrize("iters", (8, 20), ids=("last-iteration", "mid-run"))
def test_an_update_that_spoils_the_weights_is_not_saved(iters, monkeypatch, capsys):
    """The loss of the same iteration is still finite: it was computed before the update."""
    clip, calls = nn.utils.clip_grad_norm_, []

    def spoiled(parameters, most):
        parameters = list(parameters)
        clip(parameters, most)
        calls.append(1)
        if len(calls) == 8:
            parameters[0].grad.fill_(float("nan"))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spoiled)
    monkeypatch.setattr(common.Journal, "save_seconds", 0)
    assert "iteration" in stops(capsys, f"--iters {iters} --out run")
    kept = torch.load("run/checkpoint.pt", weights_only=True)
    assert kept["iteration"] == 7 and finite(kept)


@pytest.mark.parametrize("fails", (False, True))
def test_a_notebook_keeps_its_own_ctrl_c(fails, monkeypatch):
    """main() is called there without `run`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    if fails:
        monkeypatch.setattr(linreg, "sample_tasks", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        linreg.main([*TINY["linreg"].split(), "--out", "run"])
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
