"""The README's exercises: their edits still fit the code, and the edited code still runs."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest

import common
import linreg
import mnist

spec = importlib.util.spec_from_file_location("ablations", os.path.join(os.path.dirname(__file__), "..", "results", "ablations.py"))
ablations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablations)


@pytest.mark.parametrize("change", ablations.EDITS)
def test_an_exercise_runs(change, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "OUT", tmp_path)
    base = next(base for base, variants in ablations.GROUPS.values() if change in variants.values())
    script, *flags = base.split()
    tiny = "--iters 4 --tasks 2 --width 8 --depth 1 --heads 1 --eval-tasks 2 --steps 3 --device cpu --out".split()

    def losses(folder, out):
        with monkeypatch.context() as patch:
            for module in (common, linreg, mnist):  # which come back afterwards
                patch.delitem(sys.modules, module.__name__)
            patch.syspath_prepend(folder)
            module = importlib.import_module(script.removesuffix(".py"))
            assert os.path.samefile(os.path.dirname(module.__file__), folder)
            module.main([*flags, *tiny, out])
        return json.loads(open(f"{out}/log.jsonl").read())["loss"]

    assert losses(ablations.edited(change), "edited") != losses(ablations.ROOT, "plain"), "it makes a difference"


def test_an_edit_that_no_longer_fits_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "OUT", tmp_path)
    monkeypatch.setitem(ablations.EDITS, "late", [("linreg.py", "what is not there", "")])
    with pytest.raises(SystemExit, match="linreg.py has 0 times, not once: what is not there"):
        ablations.edited("late")


def test_the_figure_is_drawn_from_the_file(tmp_path, monkeypatch, pictures):
    """With the runs of every group that is in the file at hand, and none trained here."""
    rows = json.loads((ablations.HERE / "ablations.json").read_text())
    summaries = iter([row for variants in rows.values() for row in variants.values()])
    monkeypatch.setattr(ablations, "summarize", lambda base, change: next(summaries))
    monkeypatch.setattr(ablations, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["ablations.py", *rows])
    ablations.main()
    assert json.loads((tmp_path / "ablations.json").read_text()) == rows
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("program,flags,code", [("tables", "--help", 0), ("tables", "stray", 2), ("ablations", "--help", 0), ("ablations", "stray", 2)])
def test_programs_that_write_into_results_do_not_start_by_mistake(program, flags, code):
    root = os.path.dirname(os.path.dirname(ablations.__file__))
    kept = [os.path.join(root, name) for name in ("README.md", "results/ablations.json")]
    before = [os.path.getmtime(path) for path in kept]
    done = subprocess.run([sys.executable, os.path.join(root, "results", f"{program}.py"), flags], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and [os.path.getmtime(path) for path in kept] == before


def test_runs_that_were_stopped_are_not_whole_and_small_differences_are_none(tmp_path):
    file = tmp_path / "results.json"
    assert not ablations.whole(file)
    for iterations in (3, 5):
        file.write_text(json.dumps({"iterations": iterations, "args": {"iters": 5}}))
        assert ablations.whole(file) == (iterations == 5)
    row = lambda after, stderr: {"mean": [9.0, 9.0, after], "stderr": [stderr] * 3, "trained": 2}
    assert ablations.differ(row(1.0, 0.01), row(1.05, 0.01))
    assert not ablations.differ(row(1.0, 0.01), row(1.015, 0.0)) and not ablations.differ(row(1.0, 0.02), row(1.05, 0.02))
