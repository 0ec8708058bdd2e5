"""ablate.py: the evidence of the drawn world. Rows of flags of train.py, each trained with several seeds.

    python results/ablate.py                 train what results/toy.csv does not hold yet, two runs at a time; then write toy.md
    python results/ablate.py --rows erm full --seeds 0 1
    python results/ablate.py --table         train nothing, write results/toy.md and the README's table

A line is appended to the csv when its run has finished, so the command goes on where it was cut off. A run is one
`python train.py` on one thread; its folder stays under runs/ablation, for figures and for the bound.

Scores are means over the 18 classes that are drawn (there is no train), then over the targets.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGETS = ("toy-cityscapes", "toy-bdd", "toy-mapillary", "toy-night", "toy-fog", "toy-snow")
SEEDS = (0, 1, 2, 3, 4)
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student's t, two-sided

# name: (what it is, flags), in the order in which they are run.
ROWS = {
    "erm": ("baseline: cross-entropy alone", "--method erm"),
    "vote": ("baseline that votes with CLIP's text score", "--align none --no-reweight"),
    "otp": ("+ alignment to the OTP", "--align otp --no-reweight"),
    "no-reweight": ("+ alignment to the OTP, then the VTP", "--no-reweight"),
    "full": ("the full method: alignment and weights", ""),
    "full-otp": ("full, OTP to the last step", "--align otp"),
    "vtp": ("full, VTP from the first step", "--align vtp"),
    "reversed": ("full, VTP first, OTP last", "--align vtp-to-otp"),
    "only-reweight": ("weights without alignment", "--align none"),
    "no-reweight-harm30": ("without weights, 30 % harmful scenes", "--no-reweight --harmful 0.3"),
    "full-harm30": ("full, 30 % harmful scenes", "--harmful 0.3"),
    "shuffled": ("full, text prototypes under each other's names", "--prototypes shuffled"),
    "clip": ("CLIP's text score, nothing trained", "--align none --no-reweight --text-weight 1 --steps 1 --lr 1e-12"),
}
CLAIMS = (  # (sentence, row, the row that it is compared with)
    ("The full method beats the baseline that votes", "full", "vote"),
    ("The full method beats the baseline", "full", "erm"),
    ("Voting with the text score helps the baseline", "vote", "erm"),
    ("Alignment to the OTP helps", "otp", "vote"),
    ("Alignment helps beside weights", "full", "only-reweight"),
    ("Going on to the VTP helps beside weights", "full", "full-otp"),
    ("Going on to the VTP helps without weights", "no-reweight", "otp"),
    ("Easy to difficult beats the VTP at once", "full", "vtp"),
    ("Easy to difficult beats difficult to easy", "full", "reversed"),
    ("Weights help with 10 % harmful scenes", "full", "no-reweight"),
    ("Weights help with 30 % harmful scenes", "full-harm30", "no-reweight-harm30"),
    ("Prototypes need their own names", "full", "shuffled"),
)

def run(name, seed, flags, targets, folder, script="train.py"):
    """Train one row with one seed, in a folder under runs/ -> its line of the csv."""
    root, folder = HERE.parent, Path("runs") / folder / f"{name}-seed{seed}"
    command = [script, *flags.split(), "--targets", "toy-gta5", *targets, "--seed", str(seed), "--out", str(folder),
               "--workers", "0", "--no-figures"]
    shutil.rmtree(root / folder, ignore_errors=True)  # of a run that was cut off, or of other code: a minute, made again
    began = time.time()
    done = subprocess.run([sys.executable, "-W", "ignore", *command], cwd=root, capture_output=True, text=True, check=False,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    if done.returncode:
        raise RuntimeError(f"python {' '.join(command)}\n{done.stderr[-2000:]}")
    results, config = (json.loads((root / folder / file).read_text()) for file in ("results.json", "run.json"))
    score = {target: statistics.mean(v for c, v in row["iou"].items() if c != "train" and v is not None)
             for target, row in results["targets"].items()}
    line = dict(row=name, seed=seed, unseen=statistics.mean(score[target] for target in targets), **score)
    return dict({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in line.items()}, seconds=round(time.time() - began),
                commit=(config["commit"] or "")[:10] + "+" * bool(config["changed_since_commit"]), torch=config["versions"]["torch"])


def train(jobs, file, targets, at_a_time, folder, script="train.py"):
    """Run [(row, seed, flags)] that the csv does not hold yet -> how many failed."""
    done, failed = {(line["row"], int(line["seed"])) for line in read(file)}, 0
    with ThreadPoolExecutor(at_a_time) as pool:
        todo = [pool.submit(run, name, seed, flags, targets, folder, script) for name, seed, flags in jobs if (name, seed) not in done]
        try:
            for future in as_completed(todo):
                if future.exception():
                    failed += 1
                    print(future.exception(), flush=True)
                    continue
                line = future.result()
                with open(file, "a", newline="", encoding="utf-8") as table:
                    writer = csv.DictWriter(table, line, lineterminator="\n")
                    if table.tell() == 0:
                        writer.writeheader()
                    writer.writerow(line)
                print(f"{line['row']:20s} seed {line['seed']}   unseen {line['unseen']}   {line['seconds']} s", flush=True)
        finally:  # Ctrl-C: the runs that have begun end, no other begins
            pool.shutdown(cancel_futures=True)
    return failed


def read(file):
    """The lines of a csv as dicts."""
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def column(lines, name, key="unseen"):
    """{seed: value} of one row."""
    return {int(line["seed"]): float(line[key]) for line in lines if line["row"] == name}


def spread(values):
    """'mean ± standard deviation' of a list; the deviation over seeds needs two of them."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def paired(a, b):
    """Paired difference over the seeds that both have -> (n, mean, half width of the 95 % interval, smallest), or None."""
    d = [a[seed] - b[seed] for seed in sorted(set(a) & set(b))]
    if len(d) < 2:
        return None
    return len(d), statistics.mean(d), T_95[len(d) - 1] * statistics.stdev(d) / math.sqrt(len(d)), min(d)


def rows_table(lines, names, targets=TARGETS):
    """Markdown: one line a row."""
    head = ["row", "flags beside the defaults", "n", "unseen", "held-out source", *(target[4:] for target in targets)]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in names:
        if seeds := column(lines, name):
            cells = [spread(list(column(lines, name, key).values())) for key in ("unseen", "toy-gta5", *targets)]
            table.append(f"| {ROWS[name][0]} | {f'`{ROWS[name][1]}`' if ROWS[name][1] else ''} | {len(seeds)} | {' | '.join(cells)} |")
    return table


def claims_table(lines, claims):
    """Markdown: one line a claim, by paired differences of the unseen mean at equal seed."""
    table = ["| claim | difference | 95 % interval | least over seeds | n | verdict |", "|---|---|---|---|---|---|"]
    for sentence, a, b in claims:
        if found := paired(column(lines, a), column(lines, b)):
            n, mean, half, least = found
            verdict = "not decided" if n < len(SEEDS) or abs(mean) <= half else "held" if mean > 0 else "not held"
            table.append(f"| {sentence} | {mean:+.2f} | {mean - half:+.2f} to {mean + half:+.2f} | {least:+.2f} | {n} | {verdict} |")
    return table


def report(lines):
    """results/toy.md as text."""
    commits, torches = (", ".join(sorted({line[key] for line in lines})) for key in ("commit", "torch"))
    return "\n".join([
        "# The drawn world: what each idea is worth", "",
        "Made by `python results/ablate.py` from the runs in `results/toy.csv`; do not edit by hand. Mean IoU of the 18 drawn classes in",
        "per cent, mean ± standard deviation over seeds; *unseen* is the mean over the six targets that training never saw. The last",
        "checkpoint counts. Every row has the same recipe (train.py's defaults), which was chosen on development looks and not on targets.",
        f"Commit {commits}, torch {torches}, one thread a run.",
        "", *rows_table(lines, ROWS), "", "## The claims", "",
        "Paired differences of the unseen mean at equal seed, with their 95 % interval (Student's t, not adjusted for their number).",
        "*Held*: all five seeds were run, and the interval lies above 0; *not held*: below 0; *not decided*: neither. Exploratory: these",
        "seeds and targets were seen while the project grew, and all rows have one recipe. The fair fight: `results/README.md`.",
        "", *claims_table(lines, CLAIMS)]) + "\n"


def put(file, mark, content):
    """Replace what stands between <!-- mark:begin --> and <!-- mark:end --> of a document."""
    head, rest = file.read_text(encoding="utf-8").split(f"<!-- {mark}:begin -->")
    tail = rest.split(f"<!-- {mark}:end -->")[1]
    file.write_text(f"{head}<!-- {mark}:begin -->\n{content}\n<!-- {mark}:end -->{tail}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    failed = 0
    if not args.table:
        jobs = [(name, seed, ROWS[name][1]) for seed in args.seeds for name in args.rows]
        failed = train(jobs, HERE / "toy.csv", TARGETS, args.jobs, "ablation")
    lines = read(HERE / "toy.csv")
    (HERE / "toy.md").write_text(report(lines), encoding="utf-8")
    short = rows_table(lines, ("clip", "erm", "vote", "full"), targets=())
    by = "Printed by `python results/ablate.py --table`; all rows: `results/toy.md`."
    put(HERE.parent / "README.md", "toy", "\n".join([*short, "", by]))
    if failed:
        sys.exit(f"{failed} runs failed; what they said stands above. The same command tries them again.")


if __name__ == "__main__":
    main()
