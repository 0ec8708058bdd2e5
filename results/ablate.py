"""ablate.py: the evidence. Every row of results/toy.md is a set of flags of train.py, run with five seeds.

    python results/ablate.py                 train what is missing in results/toy.csv, two runs at a time, then write toy.md
    python results/ablate.py --rows erm full --seeds 0 1
    python results/ablate.py --table         only write results/toy.md from results/toy.csv

A row of the csv is appended when its run has finished, so the command goes on where it was cut off. A run is one
`python train.py` with one thread; its folder stays under runs/ablation for the figures and the bound.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE / "toy.csv"
UNSEEN = ("toy-cityscapes", "toy-bdd", "toy-mapillary", "toy-night", "toy-fog", "toy-snow")
SEEDS = (0, 1, 2, 3, 4)

# name: (what it answers, flags). In the order in which they are run: what the claims need first.
ROWS = {
    "erm": ("baseline", "--method erm"),
    "full": ("full method", ""),
    "no-reweight": ("full method without weights", "--reweight none"),
    "otp": ("schedule: far goal from the first step", "--align otp"),
    "random": ("control: random prototypes", "--prototypes random"),
    "source": ("source-mean prototypes", "--prototypes source"),
    "reversed": ("schedule: difficult to easy", "--align reversed"),
    "both": ("schedule: both goals at once", "--align both"),
    "vtp": ("schedule: near goal to the last step", "--align vtp"),
    "only-otp": ("idea alone: alignment to OTP", "--align otp --w-vtp 0 --reweight none"),
    "only-reweight": ("idea alone: weights (= full without alignment)", "--align none --w-vtp 0"),
    "erm-harm0": ("baseline, no harmful scenes", "--method erm --harmful 0"),
    "full-harm0": ("full method, no harmful scenes", "--harmful 0"),
    "no-reweight-harm0": ("without weights, no harmful scenes", "--reweight none --harmful 0"),
    "erm-harm30": ("baseline, 30 % harmful scenes", "--method erm --harmful 0.3"),
    "full-harm30": ("full method, 30 % harmful scenes", "--harmful 0.3"),
    "no-reweight-harm30": ("without weights, 30 % harmful scenes", "--reweight none --harmful 0.3"),
    "per-batch": ("weights with one mean per batch", "--no-reweight-per-class"),
    "image": ("weights per image", "--reweight image"),
} | {f"oracle-{name[4:]}": (f"baseline trained on {name} itself", f"--method erm --source {name} --harmful 0")
     for name in UNSEEN}


def run(name, seed, extra):
    """Train one row with one seed; its csv row as a dict."""
    folder = Path("runs") / "ablation" / f"{name}-seed{seed}"
    targets = [ROWS[name][1].split()[3]] if name.startswith("oracle") else ["toy-gta5", *UNSEEN]
    command = [sys.executable, "train.py", *ROWS[name][1].split(), "--targets", *targets, "--seed", str(seed),
               "--out", str(folder), "--workers", "1", *extra]
    began = time.time()
    if (HERE.parent / folder / "last.pt").exists():  # cut off in the middle
        command = [sys.executable, "train.py", "--resume", str(folder)]
    elif (HERE.parent / folder).exists():
        for file in (HERE.parent / folder).iterdir():
            file.unlink()
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    results = json.loads((HERE.parent / folder / "results.json").read_text())
    commit = json.loads((HERE.parent / folder / "run.json").read_text())["commit"]
    row = dict(row=name, seed=seed, unseen=results["mean"],
               **{t: results["targets"].get(t, {}).get("miou") for t in ("toy-gta5", *UNSEEN)},
               seconds=round(time.time() - began), commit=(commit or "")[:10])
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further flags for every run")
    args = parser.parse_args()
    done = read()
    todo = [(name, seed) for seed in args.seeds for name in args.rows if (name, seed) not in done]
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            for row in pool.map(lambda job: run(*job, args.extra), todo):
                new = not TABLE.exists()
                with open(TABLE, "a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, row, lineterminator="\n")
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(row["row"], "seed", row["seed"], f"unseen {row['unseen']}", f"{row['seconds']} s", flush=True)


def read():
    """The csv as {(row, seed): dict}."""
    if not TABLE.exists():
        return {}
    with open(TABLE, newline="", encoding="utf-8") as file:
        return {(r["row"], int(r["seed"])): r for r in csv.DictReader(file)}


if __name__ == "__main__":
    main()
