"""Several ranks: N of them make the run of one, end together, and only rank 0 writes. Ranks are forks of this process that talk by gloo."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import common
import linreg
from conftest import ROOT, TINY, call

RUNS = [
    ("linreg", "--regime parametric --mask causal --signal both --history 2"),
    ("linreg", "--regime explicit --decoder linear"),
    ("linreg", "--regime implicit --mask causal"),
    ("mnist", "--regime parametric"),
    ("mnist", "--decoder linear"),
    ("mnist", "--mask causal"),
    ("imagenet", "--regime implicit --mask causal"),
    ("toposort", "--eval-nodes 4 --eval-tasks 2"),
    ("mog_flow", "--tasks 4"),
]


def be_rank(rank, ranks, port, script, *flags):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common.RANK, common.RANKS = rank, ranks
    if rank:
        common.replace_file = None  # whoever calls it fails
    call(script, *flags, tiny=not flags[0].startswith("--resume"))


def start(ranks, script, *flags):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=be_rank, args=(rank, ranks, port, script, *flags), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def ends(processes):
    return [process.join(120) or process.exitcode for process in processes]


def checkpoint(folder):
    return torch.load(os.path.join(folder, "checkpoint.pt"), weights_only=True)


def assert_same_run(a, b, tolerance=2e-5):
    rows_a, rows_b = ([json.loads(row) for row in open(os.path.join(folder, "log.jsonl"))] for folder in (a, b))
    assert len(rows_a) == len(rows_b)
    for row_a, row_b in zip(rows_a, rows_b):
        assert row_a["loss"] == pytest.approx(row_b["loss"], rel=1e-4, abs=1e-6) and row_a["metric"] == pytest.approx(row_b["metric"], rel=1e-3, abs=1e-6)
    a, b = checkpoint(a)["model"], checkpoint(b)["model"]
    for name in a:  # what is added to all keys, or to all of toposort's logits, changes nothing: its gradient is rounding, of which Adam makes steps
        if not name.endswith("key_value.bias") and name != "decoder.2.bias":
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("script,flags", RUNS)
def test_two_ranks_make_the_run_of_one(script, flags, monkeypatch, capfd):
    monkeypatch.setattr(common.Journal, "every", 1)
    call(script, flags, "--iters 5 --dtype float32 --out one")
    printed = capfd.readouterr().out
    assert ends(start(2, script, flags, "--iters 5 --dtype float32 --out two")) == [0, 0]
    assert_same_run("one", "two")
    assert capfd.readouterr().out.count("\n") == printed.count("\n") and sorted(os.listdir("one")) == sorted(os.listdir("two"))
    assert json.load(open("two/results.json"))["ranks"] == 2


def started(monkeypatch):
    """Two ranks in the middle of a run of which every iteration is saved."""
    monkeypatch.setattr(common.Journal, "save_seconds", 0)
    processes = start(2, "linreg", "--iters 60 --dtype float32 --out run")
    while not os.path.exists("run/checkpoint.pt") or checkpoint("run")["iteration"] < 3:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    return processes


@pytest.mark.parametrize("victim", (0, 1))
def test_when_a_rank_dies_the_other_says_so_and_the_run_can_be_resumed(victim, monkeypatch, capfd):
    call("linreg", "--iters 60 --dtype float32 --out one")
    processes = started(monkeypatch)
    processes[victim].kill()
    capfd.readouterr()
    codes = ends(processes)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "it/s" not in line and line]
    assert len(lines) == 1 and lines[0].startswith("error: another rank died"), lines
    assert 3 <= checkpoint("run")["iteration"] < 60
    assert set(ends(start(2 if victim else 1, "linreg", "--resume run --dtype float32"))) == {0}
    assert_same_run("one", "run", 1e-4)


@pytest.mark.parametrize("number,codes", ((signal.SIGINT, [0, 0]), (signal.SIGTERM, [143, 143])))
def test_a_signal_to_one_rank_stops_all(number, codes, monkeypatch):
    processes = started(monkeypatch)
    os.kill(processes[1].pid, number)
    assert ends(processes) == codes
    assert 3 <= checkpoint("run")["iteration"] < 60 and os.path.exists("run/results.json") == (number == signal.SIGINT)


def test_a_run_of_one_rank_goes_on_with_two(monkeypatch):
    call("linreg", "--iters 12 --dtype float32 --out one")
    sample, calls = linreg.sample_tasks, []
    monkeypatch.setattr(linreg, "sample_tasks", lambda *given: (calls.append(1), len(calls) == 7 and signal.raise_signal(signal.SIGINT), sample(*given))[2])
    call("linreg", "--iters 12 --dtype float32 --out run")
    assert checkpoint("run")["iteration"] == 7
    assert ends(start(2, "linreg", "--resume run")) == [0, 0]
    assert_same_run("one", "run")


def test_tasks_that_cannot_be_shared_are_refused_before_the_others_begin(capfd):
    processes = start(3, "linreg", "--out run")
    assert ends(processes[:1]) == [2]
    for process in processes:
        process.kill()  # as torchrun does
    assert capfd.readouterr().err == "error: --tasks 4 is not divisible by the 3 ranks that share them\n" and not os.path.exists("run")


def test_ranks_that_nobody_started_together_cannot_meet(monkeypatch, capsys):
    monkeypatch.setattr(common, "RANKS", 2)  # WORLD_SIZE=2, left over from elsewhere
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        call("linreg", "--out run")
    error = capsys.readouterr().err
    assert "torchrun" in error and error.count("\n") == 1 and not os.path.exists("run/log.jsonl")


@pytest.mark.parametrize("rank", ("abc", "2", "-1"))
def test_a_rank_that_there_cannot_be(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delitem(sys.modules, "common")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("common")
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.startswith("error: RANK") and printed.err.count("\n") == 1 and not printed.out


def test_a_graph_is_for_one_process(monkeypatch, capsys):
    """Gradients that are averaged over ranks do not lie where a graph would write the next ones."""
    monkeypatch.setattr(common, "RANKS", 2)
    with pytest.raises(SystemExit):
        linreg.get_args(["--launch", "graph", "--device", "cpu"])
    assert "torchrun" in capsys.readouterr().err


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch, capsys):
    """That of its place on its own machine."""
    monkeypatch.setattr(common, "RANKS", 2)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))  # every GPU is there
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert common.pick_device("cuda", "float32")[0] == f"cuda:{rank}"
    with pytest.raises(SystemExit):
        common.pick_device("cuda:0", "auto")
    assert "--device cuda:0: each of the 2 ranks" in capsys.readouterr().err


def test_torchrun():
    call("linreg", "--dtype float32 --out one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", os.path.join(ROOT, "linreg.py")]
    done = subprocess.run([*command, *TINY["linreg"].split(), "--dtype", "float32", "--out", "two"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("writes to two") == 1, done.stderr
    assert_same_run("one", "two")
