"""Train every arm with every seed, then write a table with error bars.

    python sweep.py studies/mix.py --jobs=2                # a study: arms with names, see there
    python sweep.py config/train_11m.py --seeds=3 --inner_lr=0.2,0.6,2 --meta_ratio=0.25,0.5
    python sweep.py studies/mix.py --list=True             # one command per line, for other machines
    python sweep.py studies/mix.py --report=True           # the table of the runs that are there

A study is a Python file with `base` (words for train.py), `arms` (name -> more words), `seeds`, and perhaps
`evaluate` (commands to run after training, with {run} for the folder, and again whenever the sweep is). Runs
go to out/<study>/<arm>/seed<k>. The same command continues: what is finished is kept, the rest is resumed.

Runs of one seed see the same rows at the same step, so that arms are compared with the baseline seed by seed.
Intervals are 95%, by Student's t over seeds; with one seed, an accuracy's is by word. All runs are asked
about the same words: an accuracy's interval says nothing of others. p is of the paired t test, corrected by
Holm over the whole table; table.csv also has that of an exact sign-flip test.
"""
import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from threading import Event, Lock

from plumbing.files import ROOT, attempt, fail, on_signals, read_json, write_atomic
from plumbing.settings import Count, load

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from config import defaults
from plumbing import figures
from plumbing.run import read_log
from spectra import reached

@dataclass
class Config:
    seeds: str = ""  # a count (3: seeds 0, 1, 2) or numbers (5,7, or 3, for one); empty: the study's, or 0
    jobs: Count = 1  # runs side by side, each with its share of the cores, or a GPU
    baseline: str = ""  # the arm that others are compared with; empty takes the first
    report: bool = False  # only write the table
    list: bool = False  # only print the commands
    out: str = "out"  # where the studies go

METRICS = {  # column: heading; most are in the last evaluation of a run
    "val_loss": "validation loss (nats)", "val_bits_per_byte": "bits per byte",
    "heldout_query_acc": "accuracy, held-out words", "val_query_acc": "accuracy, training words",
    "ner_f1": "NER, mean strict F1", "lm_tokens": "LM tokens", "flops": "FLOPs", "seconds": "seconds",
    "steps_to": "steps to the baseline's loss", "lm_tokens_to": "LM tokens to it", "flops_to": "FLOPs to it"}
RULES = [(lambda c: re.fullmatch(r"(?!0+$)(\d+(,\d+)*,?)?", c.seeds),
          "seeds is a count, as 3 for 0, 1, 2, or numbers, as 5,7; a single number has a comma: 3,")]
TESTED = "val_loss heldout_query_acc val_query_acc ner_f1".split()

# --------------------------------------------------------------------------------------------------
# Running

starting, processes, stopped = Lock(), [], Event()

def stop(number, frame):
    """Ctrl-C: each run saves and leaves, and no more are started."""
    with starting:
        stopped.set()
        for process in processes:
            process.terminate()
    with contextlib.suppress(OSError):  # who read this may have gone
        os.write(2, b"\nstopping: each run saves (once more to leave at once)\n")

def train_and_evaluate(run, words, evaluate, environment):
    """One run, in a session of its own: only `stop` passes Ctrl-C on. Returns whether all went well."""
    train = ["train.py", *words] + ["--resume=True"] * (run / "config.json").exists()
    after = [shlex.split(command.format(run=shlex.quote(str(run)))) for command in evaluate]
    for script, *arguments in after if finished(run) else [train, *after]:
        with starting:
            if stopped.is_set():
                return False
            run.mkdir(parents=True, exist_ok=True)
            with open(run / "output.txt", "a") as output:
                print("$", shlex.join([script, *arguments]), file=output, flush=True)
                process = subprocess.Popen(
                    [sys.executable, ROOT / script, *arguments], env=environment, start_new_session=True,
                    stdout=output, stderr=subprocess.STDOUT)
            processes.append(process)
        if code := process.wait():
            if not stopped.is_set():
                last = (run / "output.txt").read_text(errors="replace").splitlines()[-1]
                print(f"\nfailed: {shlex.join([script, *arguments])}, exit code {code}: {last} "
                      f"(see {run}/output.txt)")
            return False
    return True

def run_all(jobs, commands, evaluate):
    """All runs, `jobs` side by side, each with its share of the machine. Returns whether all went well."""
    jobs = max(1, min(jobs, len(commands)))  # none is left if all folders are damaged
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = gpus.split(",")
    threads, waiting = max(1, os.cpu_count() // jobs), iter(commands.items())

    def work(number):
        gpu = gpus[number % len(gpus)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": gpu}
        # Workers take the next run from `waiting`. all() alone would stop at a run that failed: hence a list.
        return all([train_and_evaluate(run, words, evaluate, environment) for run, words in waiting])

    def steps_done():
        return sum(log[-1]["step"] for log in map(read_log, commands) if log)

    total = sum(settings_of(words).max_steps for words in commands.values())
    on_signals(stop)
    with (ThreadPoolExecutor(jobs) as pool,
          tqdm(total=total, initial=steps_done(), unit=" steps", smoothing=0) as bar):
        workers = [pool.submit(work, number) for number in range(jobs)]
        while wait(workers, timeout=5).not_done:
            bar.update(steps_done() - bar.n)
        bar.update(steps_done() - bar.n)
    return all(worker.result() for worker in workers)

def settings_of(words):
    """train.py's settings with these words."""
    return load(defaults.Config, "", defaults.RULES, words, allow_words=False)[0]

def finished(run):
    """Whether a run has come to its end, or was ended by on_collapse=stop."""
    log = read_log(run)
    last = max((line["step"] for line in log if line["kind"] == "eval"), default=0)
    collapsed = any(line["kind"] == "collapse" and line["action"] == "stop" for line in log)
    return last > 0 and (collapsed or last == read_json(run / "config.json").get("max_steps"))

def damaged(run):
    """Whether a file in a run's folder cannot be read; `finished` prints why."""
    try:
        finished(run)
    except SystemExit:
        return True

# --------------------------------------------------------------------------------------------------
# Reporting

def results(commands, baseline):
    """A row for each finished run: arm, seed, its last evaluation, and where its validation loss came down to
    the final one of the baseline's run of that seed. Named entities: the mean of the head-only rows of all
    tables in its folder.
    """
    rows, runs = [], filter(finished, commands)
    evals = {run: [line for line in read_log(run) if line["kind"] == "eval"] for run in runs}
    final = {run: lines[-1]["val_loss"] for run, lines in evals.items()}
    for run, lines in evals.items():
        ner = [entry["f1"] for path in sorted(run.glob("ner_*.json")) for entry in read_json(path)["table"]
               if entry["mode"] == "head" and Path(entry["system"]).parts[-2:] == run.parts[-2:]]
        row = {"arm": run.parent.name, "seed": int(run.name[4:]), "run": run, **lines[-1],
               "ner_f1": np.mean(ner) if ner else np.nan}
        goal = final.get(run.parents[1] / baseline / run.name, -np.inf)  # no run reaches that
        if min(line["val_loss"] for line in lines) <= goal:
            for x, place in reached(lines, goal).items():
                row["steps_to" if x == "step" else f"{x}_to"] = place
        rows.append(row)
    return pd.DataFrame(rows)

def interval(values):
    """Half the width of the 95% interval of a mean, by Student's t."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)

def table(frame, baseline):
    """A row for each arm and metric: mean, interval, paired difference from the baseline, interval, p."""
    rows, base = [], frame[frame["arm"] == baseline].set_index("seed")
    for (arm, of_arm), metric in product(frame.groupby("arm", sort=False), METRICS):
        if metric not in of_arm or of_arm[metric].isna().any():  # no numbers, or a run never got there
            continue
        values = of_arm.set_index("seed")[metric]
        by_word = 1.96 * of_arm.get(f"{metric}_se", values * np.nan).mean()
        row = {"arm": arm, "metric": metric, "n": len(values), "mean": values.mean(),
               "interval": interval(values) if len(values) > 1 else by_word}
        paired = (values - base[metric]).dropna()
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
    """The table for people: one line per arm."""
    metrics = [metric for metric in METRICS if metric in set(rows["metric"])]
    lines = [["arm, n", *(METRICS[metric] for metric in metrics)], ["---"] * (1 + len(metrics))]
    for arm, of_arm in rows.groupby("arm", sort=False):
        cells = dict.fromkeys(metrics, "")
        for row in of_arm.to_dict("records"):
            text = f"{row['mean']:.4g}" + f" ± {row['interval']:.2g}" * pd.notna(row["interval"])
            if pd.notna(row.get("difference")):
                p = row.get("p_holm", np.nan)
                p = "" if pd.isna(p) else f", p {p:.3f}" if p >= 0.001 else ", p < 0.001"
                text += f" ({row['difference']:+.3g} ± {row['difference_interval']:.2g}{p})"
            cells[row["metric"]] = text
        lines.append([f"{arm}, {of_arm['n'].max()}", *cells.values()])
    lines = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (f"Mean over seeds ± 95% interval (difference from {baseline}, p by Holm).\n"
            f"A cell is empty where a run of the arm lacks the number.\n\n{lines}\n")

def report(folder, commands, baseline):
    """Write table.md, .csv and .json, runs.csv, and the figures, of what has been run."""
    frame = results(commands, baseline)
    if baseline not in set(frame.get("arm", [])):
        fail(f"no finished run of the baseline {baseline} in {folder}")
    made = {run: read_json(run / "config.json") for run in frame["run"]}
    for run, settings in made.items():
        differ = [f"{key} = {settings[key]}" for key, setting in asdict(settings_of(commands[run])).items()
                  if key not in ("out_dir", "data_dir", "resume") and settings.get(key, setting) != setting]
        if differ:
            print(f"note: {run} was made with {', '.join(differ)}")
    for key in ("git", "corpus_hash", "system", "versions"):
        if len({str(settings.get(key)) for settings in made.values()}) > 1:
            print(f"note: the runs differ in {key}; see their config.json")
    rows = table(frame, baseline)
    print(text := markdown(rows, baseline))
    write_atomic(f"{folder}/table.md", text)
    write_atomic(f"{folder}/table.csv", rows.to_csv(index=False))
    write_atomic(f"{folder}/table.json", rows.to_json(orient="records", indent=1))
    write_atomic(f"{folder}/runs.csv", frame.drop(columns="run").to_csv(index=False))
    arms = [figures.Arm(arm, [read_log(run) for run in runs], made[runs.iloc[0]])
            for arm, runs in frame.groupby("arm", sort=False)["run"]]
    for x in ("step", "lm_tokens", "flops"):
        figures.save(figures.phase(arms, x), f"{folder}/{x}.png")
    if "difference" in rows:
        figures.save(figures.forest(rows, METRICS, TESTED, baseline), f"{folder}/differences.png")
    print(f"written {folder}/table.md, .csv, .json, runs.csv and figures")

# --------------------------------------------------------------------------------------------------
# The command line

def read_study(path, grid, config):
    """A study's file, or a configuration: {run folder: words of train.py}, the baseline, evaluations.

    The words of the grid, --key=value,value, make each arm one for each combination of values.
    """
    if wrong := [word for word in grid if not re.match(r"--(?!seed=|out_dir=)\w+=", word)]:
        fail(f"{wrong[0]}: settings to vary are written --key=value,value; for seeds --seeds=3")
    study, arms = runpy.run_path(path), {}
    axes = []
    for word in grid:
        key, _, values = word.partition("=")
        axes.append([f"{key}={value}" for value in values.split(",")])
    for (arm, words), values in product(study.get("arms", {"": ""}).items(), product(*axes)):
        name = " ".join([arm, *values]).replace("--", "").replace("/", "_").strip() or "all"
        if name in arms or not name.strip(".") or re.search(r"[|\n]", name):
            raise ValueError(f"names of arms must differ, and hold no | or line break, unlike {name!r}")
        arms[name] = f"{words} {shlex.join(values)}"
    baseline = config.baseline or next(iter(arms))
    if baseline not in arms:
        fail(f"no arm {baseline}; the arms are {'; '.join(arms)}")
    seeds = study.get("seeds", [0])
    if config.seeds:
        seeds = [int(seed) for seed in config.seeds.split(",") if seed]
        seeds = range(seeds[0]) if config.seeds.isdecimal() else seeds
    base, commands = study.get("base", shlex.quote(path)), {}
    for seed, arm in product(seeds, arms):  # first all arms of a seed
        run = Path(config.out, Path(path).stem, arm, f"seed{seed}")
        commands[run] = shlex.split(f"{base} {arms[arm]} --seed={seed}") + [f"--out_dir={run}"]
    return commands, baseline, study.get("evaluate", [])

def main():
    own = {"-h", "--help", *(f"--{field.name}" for field in fields(Config))}
    words = [word for word in sys.argv[1:] if word.split("=")[0] in own]
    others = [word for word in sys.argv[1:] if word not in words]
    config, _ = load(Config, __doc__, RULES, words)
    path, *grid = sorted(others, key=lambda word: word.startswith("-")) or [""]
    if not os.path.isfile(path):
        fail("name one file: a study, studies/<name>.py, or a configuration (see --help)")
    with attempt(f"read {path}", "a study has base, arms and seeds: see --help"):
        commands, baseline, evaluate = read_study(path, grid, config)
    for words in [] if config.report else commands.values():
        settings_of(words)  # a mistake in them ends the program
    if config.list:
        return print(*(shlex.join(["python", "train.py", *words]) for words in commands.values()), sep="\n")
    readable = {run: words for run, words in commands.items() if not damaged(run)}
    all_well = config.report or run_all(config.jobs, readable, evaluate)
    if not stopped.is_set():
        report(Path(config.out, Path(path).stem), readable, baseline)
    sys.exit(not (all_well and readable == commands))

if __name__ == "__main__":
    main()
