"""Many runs of train.py, arms times seeds, and then a table with error bars.

    python sweep.py studies/mix.py --jobs=2                # a study: arms with names, see there
    python sweep.py config/train_11m.py --seeds=3 --inner_lr=0.2,0.6,2 --meta_ratio=0.25,0.5
    python sweep.py studies/mix.py --list=True             # a command a line, for other machines
    python sweep.py studies/mix.py --report=True           # the table of the runs that are there

A study is a Python file with `base` (words for train.py), `arms` (name -> more words), `seeds`, and perhaps
`evaluate` (commands to run after training, at each call, with {run} for the folder). Runs go to
out/<study>/<arm>/seed<k>. The same command goes on: what is finished is kept, what is not is resumed.

Runs of one seed see the same rows at the same step, so that arms are compared with the baseline seed by seed.
Intervals are of 95%, by Student's t over seeds; p is of the paired t test, and by Holm over the whole table.
"""
import itertools
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from plumbing.files import ROOT, fail, on_signals, read_json, write_atomic
from plumbing.settings import Count, load

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from plumbing import figures
from plumbing.run import read_log
from spectra import reached

@dataclass
class Config:
    seeds: str = ""  # 3 is 0, 1, 2; 5,7 are those two; empty takes the study's, or seed 0
    jobs: Count = 1  # runs side by side, each with its share of the cores, or a GPU
    baseline: str = ""  # the arm that others are compared with; empty takes the first
    report: bool = False  # only write the table
    list: bool = False  # only print the commands
    out: str = "out"  # where the studies go

METRICS = {  # in the last evaluation of a run, or below
    "val_loss": "validation loss (nats)", "val_bits_per_byte": "bits per byte",
    "heldout_query_acc": "accuracy, held-out words", "val_query_acc": "accuracy, training words",
    "ner_f1": "NER, strict F1", "lm_tokens": "LM tokens", "flops": "FLOPs", "seconds": "seconds",
    "steps_to": "steps to the baseline's loss", "lm_tokens_to": "LM tokens to it", "flops_to": "FLOPs to it"}
TESTED = "val_loss heldout_query_acc val_query_acc ner_f1".split()

# --------------------------------------------------------------------------------------------------
# Running

class Runs:
    """The runs of a study: a folder and a command each, and the processes at work on them."""

    def __init__(self, config, folder, base, arms, seeds, evaluate=()):
        self.config, self.folder, self.evaluate = config, folder, evaluate
        self.lock, self.working, self.stopped, self.gpus = Lock(), [], False, SimpleQueue()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        for i in range(config.jobs):  # each worker has one
            self.gpus.put(gpus.split(",")[i % len(gpus.split(","))])
        self.commands = {}  # run folder -> words of train.py
        for seed, arm in itertools.product(seeds, arms):  # first all arms of a seed
            run = folder / arm / f"seed{seed}"
            self.commands[run] = shlex.split(f"{base} {arms[arm]} --seed={seed}") + [f"--out_dir={run}"]

    def begin(self, words, gpu):
        """Start a command with its share of the machine, away from the Ctrl-C that this process gets."""
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // self.config.jobs)),
                                    "CUDA_VISIBLE_DEVICES": gpu}
        with self.lock:
            if not self.stopped:
                self.working.append(subprocess.Popen(
                    [sys.executable, ROOT / words[0], *words[1:]], env=environment, start_new_session=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
                return self.working[-1]

    def run(self, run, bar):
        """Train and evaluate one run; what it says goes to output.txt beside its log."""
        if self.stopped:
            return False
        gpu = self.gpus.get()
        words = ["train.py", *self.commands[run]] + ["--resume=True"] * (run / "config.json").exists()
        run.mkdir(parents=True, exist_ok=True)
        after = [shlex.split(command.format(run=shlex.quote(str(run)))) for command in self.evaluate]
        with open(run / "output.txt", "a", buffering=1) as output:
            for command in [words] * (not finished(run)) + after:
                output.write(f"$ {shlex.join(command)}\n")
                process, line = self.begin(command, gpu), ""
                for line in process.stdout if process else []:
                    output.write(line)
                    bar.update(line.startswith("step "))
                if process and process.wait() and not self.stopped:
                    bar.write(f"failed: {shlex.join(command)}: {line.strip()} (see {run}/output.txt)")
                if not process or process.returncode:
                    break
        self.gpus.put(gpu)
        return bool(process) and not process.returncode

    def run_all(self):
        """All of them, some side by side; returns whether all went well."""
        steps = {run: steps_of(words) for run, words in self.commands.items()}
        done = {run: len(read_log(run)) and read_log(run)[-1]["step"] for run in steps}
        on_signals(self.stop)
        with (tqdm(total=sum(steps.values()), initial=sum(done.values()), unit=" steps", smoothing=0) as bar,
              ThreadPoolExecutor(self.config.jobs) as pool):
            return all([*pool.map(lambda run: self.run(run, bar), self.commands)])

    def stop(self, number, frame):
        """Ctrl-C: each run saves and leaves, and none is begun any more."""
        with self.lock:
            self.stopped = True
            for process in self.working:
                process.send_signal(signal.SIGTERM)

def steps_of(words):
    """max_steps of a command, for the progress bar."""
    from config.defaults import Config as Train

    return load(Train, "", argv=words)[0].max_steps

def finished(run):
    """Whether a run has come to its end, or to that which on_collapse=stop set it."""
    log = read_log(run)
    last = max((line["step"] for line in log if line["kind"] == "eval"), default=0)
    stopped = any(line["kind"] == "collapse" and line["action"] == "stop" for line in log)
    return last > 0 and (stopped or last == read_json(run / "config.json")["max_steps"])

# --------------------------------------------------------------------------------------------------
# Reporting

def results(commands):
    """A row for each finished run: arm, seed, and the numbers of its last evaluation."""
    rows = []
    for run in filter(finished, commands):
        last = [line for line in read_log(run) if line["kind"] == "eval"][-1]
        ner = [row["f1"] for path in sorted(run.glob("ner_*.json")) for row in read_json(path)["table"]
               if row["system"] == str(run)]
        rows.append({"arm": run.parent.name, "seed": int(run.name[4:]), "run": run, **last,
                     "ner_f1": np.mean(ner) if ner else np.nan})
    return pd.DataFrame(rows)

def add_distance(frame, baseline):
    """Where each run's loss came down to the final loss of the baseline of its seed; NaN if it did not."""
    goal = frame[frame["arm"] == baseline].set_index("seed")["val_loss"]
    for i, row in frame.iterrows():
        evals = [line for line in read_log(row["run"]) if line["kind"] == "eval"]
        if row["seed"] in goal and min(line["val_loss"] for line in evals) <= goal[row["seed"]]:
            for x, place in reached(evals, goal[row["seed"]]).items():
                frame.loc[i, f"{x}s_to" if x == "step" else f"{x}_to"] = place

def interval(values):
    """Half the width of the 95% interval of a mean, by Student's t."""
    n = len(values)
    return stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan

def table(frame, baseline):
    """A row for each arm and metric: mean, interval, paired difference from the baseline, interval, p."""
    rows, base = [], frame[frame["arm"] == baseline].set_index("seed")
    for (arm, of_arm), metric in itertools.product(frame.groupby("arm", sort=False), METRICS):
        if metric not in of_arm or of_arm[metric].isna().any():  # not all came to the baseline's loss
            continue
        of_arm = of_arm.set_index("seed")[metric]
        row = {"arm": arm, "metric": metric, "n": len(of_arm), "mean": of_arm.mean(),
               "interval": interval(of_arm)}
        paired = (of_arm - base[metric]).dropna()
        if arm != baseline and len(paired) > 1:
            row |= {"difference": paired.mean(), "difference_interval": interval(paired)}
            if metric in TESTED:
                row |= {"p": stats.ttest_1samp(paired, 0).pvalue, "p_sign_flip": stats.permutation_test(
                    (paired,), np.mean, permutation_type="samples", n_resamples=2**15).pvalue}
        rows.append(row)
    rows = pd.DataFrame(rows)
    if "p" in rows:  # Holm 1979: the smallest p times m, the next times m - 1, and none below the one before
        order = rows["p"].dropna().sort_values()
        rows["p_holm"] = (order * np.arange(len(order), 0, -1)).cummax().clip(upper=1)
    return rows

def markdown(rows, baseline):
    """The table for people: an arm a line."""
    def cell(row):
        text = f"{row['mean']:.4g}" + f" ± {row['interval']:.2g}" * (row["n"] > 1)
        if pd.notna(row.get("difference")):
            text += f" ({row['difference']:+.3g} ± {row['difference_interval']:.2g}"
            text += f", p {row['p_holm']:.3f})" if pd.notna(row.get("p_holm")) else ")"
        return text
    cells = rows.assign(text=[cell(row) for _, row in rows.iterrows()])
    wide = cells.pivot(index="arm", columns="metric", values="text").loc[rows["arm"].unique()]
    wide = wide[[metric for metric in METRICS if metric in wide]].rename(columns=METRICS).fillna("")
    lines = [["arm, n", *wide.columns], ["---"] * (1 + len(wide.columns))]
    seeds = rows.groupby("arm")["n"].max()
    lines += [[f"{arm}, {seeds[arm]}", *line] for arm, *line in wide.reset_index().values.tolist()]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Mean over seeds ± 95% interval (difference from {baseline}, p by Holm).\n\n{lines}\n"

def report(folder, commands, baseline):
    """Write table.md, .csv, .json, and the figures, of what has been run."""
    frame = results(commands)
    if frame.empty or baseline not in set(frame["arm"]):
        fail(f"no finished run of the baseline {baseline} in {folder}")
    made = {run: read_json(run / "config.json") for run in frame["run"]}
    for run, one in made.items():
        if [word for word in one["argv"] if word != "--resume=True"] != list(map(str, commands[run])):
            print(f"note: {run} was made with other settings: {shlex.join(one['argv'])}")
    for what in ("git", "corpus_hash", "system", "versions"):
        if len(different := {json.dumps(one[what]) for one in made.values()}) > 1:
            print(f"note: the runs differ in {what}: {'; '.join(sorted(different))}")
    add_distance(frame, baseline)
    rows = table(frame, baseline)
    print(text := markdown(rows, baseline))
    write_atomic(f"{folder}/table.md", text)
    write_atomic(f"{folder}/table.csv", rows.to_csv(index=False))
    write_atomic(f"{folder}/table.json", rows.to_json(orient="records", indent=1))
    write_atomic(f"{folder}/runs.csv", frame.drop(columns="run").to_csv(index=False))
    arms = [figures.Arm(arm, [read_log(run) for run in of_arm["run"]], made[of_arm["run"].iloc[0]])
            for arm, of_arm in frame.groupby("arm", sort=False)]
    for x in ("step", "lm_tokens", "flops"):
        figures.save(figures.phase(arms, x), f"{folder}/{x}.png")
    if "difference" in rows:
        figures.save(figures.forest(rows, METRICS, TESTED, baseline), f"{folder}/differences.png")
    print(f"written {folder}/table.md, .csv, .json, runs.csv and figures")

def main():
    own = {field.name for field in fields(Config)} | {"help"}
    grid = [word for word in sys.argv[1:] if word[:2] == "--" and word[2:].split("=")[0] not in own]
    files = [word for word in sys.argv[1:] if word.endswith(".py")]
    words = [word for word in sys.argv[1:] if word not in grid and word not in files]
    config, _ = load(Config, __doc__, argv=words, allow_words=False)
    if len(files) != 1 or not os.path.isfile(files[0]):
        fail("name one file: a study, studies/<name>.py, or a configuration (see --help)")
    study = runpy.run_path(files[0])
    if wrong := [word for word in grid if "=" not in word or word.startswith(("--seed=", "--out_dir="))]:
        fail(f"{wrong[0]}: settings to vary are written --key=value,value; for seeds --seeds=3")
    if "arms" not in study:
        axes = [[f"{word.split('=')[0]}={value}" for value in word.split("=")[1].split(",")] for word in grid]
        study = {"base": files[0], "arms": {" ".join(words).replace("--", "") or "all": shlex.join(words)
                                            for words in itertools.product(*axes)}}
    elif grid:
        fail(f"{grid[0]}: a study names its own settings, in {files[0]}")
    arms = {arm.replace("/", "_"): words for arm, words in study["arms"].items()}
    baseline = config.baseline or next(iter(arms))
    if baseline not in arms:
        fail(f"no arm {baseline}, but {', '.join(arms)}")
    if not re.fullmatch(r"(\d+,?)*", config.seeds):
        fail(f"seeds = {config.seeds}: 3 is seeds 0, 1 and 2; 5,7 are those two")
    seeds = [int(seed) for seed in config.seeds.split(",") if seed] or study.get("seeds", [0])
    seeds = range(seeds[0]) if config.seeds.isdigit() else seeds
    folder, evaluate = Path(config.out, Path(files[0]).stem), study.get("evaluate", [])
    runs = Runs(config, folder, study["base"], arms, seeds, evaluate)
    commands = runs.commands.values()
    if config.list:
        return print(*(shlex.join(["python", "train.py", *words]) for words in commands), sep="\n")
    well = config.report or runs.run_all()
    if not runs.stopped:
        report(folder, runs.commands, baseline)
    sys.exit(not well)

if __name__ == "__main__":
    main()
