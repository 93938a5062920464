"""sweep.py: which runs it makes, and the arithmetic of its table."""
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TINY, log_of, one_line, run_many
from scipy import stats

import sweep

def test_commands(tmp_path):
    study = tmp_path / "study.py"
    arms = '{"one": "--n_way=2", "two, three": "--n_way=3"}'
    study.write_text(f'base = "--lr=0.1"\narms = {arms}\nseeds = [4, 5]')
    words = [[study], ["config/train_11m.py", "--seeds=2", "--inner_lr=0.2,0.6", "--n_way=4,8"],
             ["--k_shot=6,7", study, "--seeds=3,"]]
    listed = [done.stdout.splitlines() for done in run_many(
        "sweep.py", [[*of_study, "--list=True", "--out=o"] for of_study in words])]
    assert listed[0] == [
        "python train.py --lr=0.1 --n_way=2 --seed=4 --out_dir=o/study/one/seed4",
        "python train.py --lr=0.1 --n_way=3 --seed=4 '--out_dir=o/study/two, three/seed4'",
        "python train.py --lr=0.1 --n_way=2 --seed=5 --out_dir=o/study/one/seed5",
        "python train.py --lr=0.1 --n_way=3 --seed=5 '--out_dir=o/study/two, three/seed5'"]
    assert len(listed[1]) == 8 and "--inner_lr=0.6 --n_way=4 --seed=1" in listed[1][6]
    assert "--n_way=2 --k_shot=7 --seed=3 '--out_dir=o/study/one k_shot=7/seed3'" in listed[2][1]
    mistakes = {"name one file": ["--jobs=2"], "no arm three": [study, "--baseline=three"],
                "--key=value,value": [study, "--seed=3"], "5,7": [study, "--seeds=x"],
                "seeds = 0": [study, "--seeds=0"],
                "nearest is": ["config/train_11m.py", "--n_weg=2,4", "--list=True"]}
    for number, (says, text) in enumerate({
            "never closed": "arms = {", "StopIteration": "arms = {}", "not iterable": "seeds = 3",
            "quotation": "base = '\"'", "unlike 'a_b'": "arms = {'a/b': '', 'a_b': ''}"}.items()):
        (path := tmp_path / f"{number}.py").write_text(text)
        mistakes[says] = [path]
    for (says, _), done in zip(mistakes.items(), run_many("sweep.py", mistakes.values()), strict=True):
        one_line(done, says)

def test_table_is_that_of_textbook_formulas():
    rng = np.random.default_rng(0)
    base = rng.normal(5, 1, 6)
    arms = {"base": base, "better": base - 1 + rng.normal(0, 0.1, 6), "same": base + rng.normal(0, 0.5, 6),
            "other": base[:5] + 0.4 + rng.normal(0, 0.5, 5)}  # one seed is missing
    frame = pd.DataFrame([{"arm": arm, "seed": seed, "val_loss": loss} for arm, of_arm in arms.items()
                          for seed, loss in enumerate(of_arm)])
    rows = sweep.table(frame, "base").set_index("arm")
    single = pd.DataFrame([{"arm": "base", "seed": 0, "val_query_acc": 0.2, "val_query_acc_se": 0.01}])
    assert sweep.table(single, "base").loc[0, "interval"] == pytest.approx(0.0196)  # by word
    for arm, losses in arms.items():
        row = rows.loc[arm]
        low, high = stats.t.interval(0.95, len(losses) - 1, losses.mean(), stats.sem(losses))
        assert (row["mean"], row["interval"]) == pytest.approx((losses.mean(), (high - low) / 2))
        if arm != "base":
            expected = stats.ttest_rel(losses, base[: len(losses)])
            low, high = expected.confidence_interval()
            assert row["difference"] == pytest.approx((low + high) / 2)
            assert row["difference_interval"] == pytest.approx((high - low) / 2)
            assert row["p"] == pytest.approx(expected.pvalue)
            flips = np.array(np.meshgrid(*[[-1, 1]] * len(losses))).reshape(len(losses), -1)
            differences = losses - base[: len(losses)]
            extreme = np.abs(flips.T @ differences) >= abs(differences.sum()) - 1e-9
            assert row["p_sign_flip"] == pytest.approx(extreme.mean())
    p = rows["p"].drop("base")  # Holm: times 3, 2, 1 from the least on, never falling
    first, second, third = p.sort_values().index
    holm = {first: 3 * p[first], second: max(3 * p[first], 2 * p[second])}
    holm[third] = max(holm[second], p[third])
    assert rows["p_holm"].drop("base").to_dict() == pytest.approx({arm: min(1, x) for arm, x in holm.items()})

@pytest.mark.parametrize(("visible", "gpus"), [("", ["0", "1"]), ("4,7", ["4", "7"]), ("3", ["3"])])
def test_workers_share_cores_and_gpus(monkeypatch, tmp_path, visible, gpus):
    """Each of three workers has a third of the cores and a GPU, in turn; what fails stops no other run."""
    begun = []

    def pretend(run, words, evaluate, environment):
        begun.append([environment[name] for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")])
        time.sleep(0.1)  # so that all three get some
        return run.name != "seed1"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 13)
    monkeypatch.setattr(sweep, "on_signals", lambda handler: None)
    monkeypatch.setattr(sweep, "train_and_evaluate", pretend)
    runs = [tmp_path / f"seed{seed}" for seed in range(9)]
    assert not sweep.run_all(3, dict.fromkeys(runs, []), [])
    assert len(begun) == 9 and sorted({*map(tuple, begun)}) == [(gpu, "4") for gpu in gpus]
    assert sweep.run_all(3, dict.fromkeys(runs[2:], []), []) and sweep.run_all(3, {}, [])

def test_stopping_needs_no_terminal(monkeypatch):
    """A closed terminal sends SIGHUP and takes no word any more: the runs are told all the same."""
    told, read_end, write_end = [], *os.pipe()
    os.close(read_end)
    monkeypatch.setattr(sweep, "processes", [SimpleNamespace(terminate=lambda: told.append(True))])
    monkeypatch.setattr(sweep, "stopped", threading.Event())
    write = os.write
    monkeypatch.setattr(sweep.os, "write", lambda number, text: write(write_end, text))
    sweep.stop(1, None)
    assert told and sweep.stopped.is_set()

def test_report(quick_start, tmp_path):
    """Of run folders that are there: the last evaluations, and where the baseline's loss was reached."""
    for arm, factor in (("a", 1), ("b, c", 0.9)):
        for seed in range(2):
            run = tmp_path / "study" / arm / f"seed{seed}"
            run.mkdir(parents=True)
            shutil.copy(quick_start.folder / "config.json", run)
            lines = [line | ({"val_loss": line["val_loss"] * factor + seed} if "val_loss" in line else {})
                     for line in log_of(quick_start.folder)]
            (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ner = [{"system": "moved/a/seed1", "mode": mode, "f1": f1} for mode, f1 in (("head", 0.2), ("full", 0.8))]
    (run.parents[1] / "a/seed1/ner_da.json").write_text(json.dumps({"table": ner}))
    damaged = tmp_path / "study/d/seed0"
    shutil.copytree(tmp_path / "study/a/seed0", damaged)
    (damaged / "config.json").write_text("")
    base = " ".join([*quick_start.words[:-1], "--lr=0.1"])
    study = f'base = "{base}"\narms = {{"a": "", "b, c": "", "d": ""}}\nseeds = [0, 1]'
    (tmp_path / "study.py").write_text(study)
    (done,) = run_many("sweep.py", [[tmp_path / "study.py", "--report=True", f"--out={tmp_path}"]])
    assert done.returncode == 1 and done.stderr.startswith(f"error: cannot read {damaged}"), done.stderr
    lr = json.loads((quick_start.folder / "config.json").read_text())["lr"]
    assert f"seed0 was made with lr = {lr}\n" in done.stdout and "was made with seed = 0, lr" in done.stdout
    rows = pd.read_csv(tmp_path / "study/table.csv").set_index(["arm", "metric"])
    last = log_of(quick_start.folder, "eval")[-1]
    assert rows.loc[("b, c", "val_loss"), "difference"] == pytest.approx(-0.1 * last["val_loss"])
    assert rows.loc[("a", "steps_to"), "mean"] == pytest.approx(last["step"])
    assert pd.read_csv(tmp_path / "study/runs.csv").set_index(["arm", "seed"]).loc[("a", 1), "ner_f1"] == 0.2
    assert rows.loc[("b, c", "steps_to"), "mean"] < last["step"]
    for name in ("table.md", "table.json", "runs.csv", "flops.png", "differences.png"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    assert "| b, c, 2 |" in done.stdout

@pytest.mark.slow
def test_interrupted_and_gone_on(data_dir, tmp_path):
    """A signal saves what runs; the same command goes on, keeps what is finished, and tells what failed."""
    base = " ".join([*TINY, "--max_steps=60", f"--data_dir={data_dir}"])
    arms = '{"good": "", "stopped": "--lr=1e-4", "bad": "--dataset=none"}'
    (tmp_path / "study.py").write_text(f'base = "{base}"\narms = {arms}')
    command = [sys.executable, ROOT / "sweep.py", tmp_path / "study.py", f"--out={tmp_path}"]
    good, stopped, bad = (tmp_path / f"study/{arm}/seed0/log.jsonl" for arm in ("good", "stopped", "bad"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (stopped.exists() and stopped.read_text().count("\n") > 5):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()  # Ctrl-C may be ignored where the tests run
    assert process.wait(100) == 1
    first, steps = good.read_bytes(), stopped.read_text().count('"lm"')
    assert steps < 60 and not bad.parent.exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("failed: train.py") == 1
    assert good.read_bytes() == first and stopped.read_text().count('"lm"') == 60
    assert "| stopped, 1 |" in done.stdout
