"""bound_table.py: the theorem's terms over the ablation's runs, written into results/README.md between its "measured" marks.

    python results/bound_table.py            measure every run under runs/ablation that has no bound.json yet, then write
    python results/bound_table.py --table    only write, from the bound.json files that are there

results/ablate.py makes the runs. Its row `clip`, in which nothing is trained, is a column and no part of the correlations.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from ablate import ROWS, put  # noqa: E402

RUNS = HERE.parent / "runs" / "ablation"
STORE = HERE / "bound.json"
TERMS = (("left", "risk $`R_T`$ (left side)"), ("right", "right side of Eq. 12"), ("right_direct", "right side of Eq. 13"),
         ("right_local", "middle of Eq. 25"),
         ("radius_otp", "radius $`A^O`$"), ("radius_vtp", "radius $`A^V`$"), ("gap", "gap $`G`$"), ("slope", "slope $`g`$"),
         ("lipschitz", "Lipschitz constant $`L`$"), ("tv", "class shares, TV"), ("osc", "osc(h)"),
         ("error", "text score, share of wrong pixels"))

SIDES = ("right", "right_direct", "right_local")  # what is held against the target risk


def measure(folder):
    """One run through bound.py; its bound.json as a dict."""
    file = folder / "bound.json"
    if not file.exists():
        subprocess.run([sys.executable, "-W", "ignore", "bound.py", str(folder)], cwd=HERE.parent, check=True,
                       capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    return json.loads(file.read_text())


def shorten(report):
    """What the table needs of a run: the source's terms, and each term's mean over the unseen targets."""
    domains = report["domains"]
    unseen = [row for name, row in domains.items() if not name.startswith("source") and name not in report["source"]]

    def mean(key):
        values = [row[key] for row in unseen if row.get(key) is not None]
        return statistics.mean(values) if values else None

    keys = [key for key, _ in TERMS]
    return dict(unseen={key: mean(key) for key in keys}, source={key: domains["source"].get(key) for key in keys},
                n_eff=domains["source"]["n_eff"], pixels=domains["source"]["pixels"],
                targets=[[row[key] for key in (*SIDES, "left")] for row in unseen],
                holds=all(row["holds"] for row in domains.values()))


def cell(values):
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.3g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def ranks(store):
    """The lines of a table: does a right side order runs, or domains, by the risk on the targets?

    Beside the right sides stand two numbers that need no theorem: over runs, the risk on the source; over the targets of a
    run, the risk of the untrained CLIP there. A right side is of use as an order only where it beats them.
    """
    from bound import rank_correlation

    trained = {key: run for key, run in store.items() if not key.startswith("clip-seed")}
    aligned = {key: run for key, run in trained.items()
               if key.rsplit("-seed", 1)[0] not in ("erm", "vote", "only-reweight", "shuffled")}
    untrained = next(run for key, run in store.items() if key.startswith("clip-seed"))
    own_risk = [target[-1] for target in untrained["targets"]]

    def over_runs(runs):
        risks = [run["unseen"]["left"] for run in runs]
        sides = [[run["unseen"][key] for run in runs] for key in SIDES] + [[run["source"]["left"] for run in runs]]
        return [f"{rank_correlation(side, risks):+.2f}" for side in sides]

    def within(runs):
        rows = []
        for run in runs:
            risks = [target[-1] for target in run["targets"]]
            sides = [[target[k] for target in run["targets"]] for k in range(len(SIDES))] + [own_risk]
            rows.append([rank_correlation(side, risks) for side in sides])
        return [f"{statistics.mean(column):+.2f}" for column in zip(*rows)]

    return ["Spearman's rank correlation with the risk of the text score on the unseen targets:", "",
            "| over | n | Eq. 12 | Eq. 13 | middle of Eq. 25 | risk on the source | risk of the untrained CLIP |", "|---" * 7 + "|",
            f"| all trained runs | {len(trained)} | {' | '.join(over_runs([*trained.values()]))} | |",
            f"| the aligned runs, without the shuffled names | {len(aligned)} | {' | '.join(over_runs([*aligned.values()]))} | |",
            "| the six targets within a run, mean over all trained runs | 6 | {} | {} | {} | | {} |".format(*within(trained.values()))]


def text(store):
    columns = {"clip": "CLIP before training", "erm": "baseline", "full": "full"}
    groups = {row: [store[key] for key in sorted(store) if key.rsplit("-seed", 1)[0] == row] for row in columns}
    runs = [store[key] for key in store if not key.startswith("clip-seed")]
    lines = [f"Made by `python results/bound_table.py` from {len(runs)} trained runs of the ablation. Mean and standard deviation over "
             f"{len(groups['erm'])} seeds (baseline) and {len(groups['full'])} (full method); targets: mean over the six unseen ones.", "",
             f"| term | {' | '.join(f'{where}, {name}' for where in ('source', 'unseen') for name in columns.values())} |",
             "|---" * 7 + "|"]
    for key, name in TERMS:
        cells = [cell([r[where][key] for r in groups[row]]) for where in ("source", "unseen") for row in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [cell([r["n_eff"] / r["pixels"] for r in groups[row]]) for row in columns]
    lines.append(f"| $`n_{{\\mathrm{{eff}}}}`$ as a share of the labelled cells | {' | '.join(cells)} | | | |")
    held = sum(r["holds"] for r in runs)
    lines += ["", f"Every inequality held on the data of {held} of {len(runs)} of them.", "", *ranks(store)]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--rows", nargs="+", help="only the runs of these rows")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    rows = set(args.rows or ROWS)
    folders = [f for f in sorted(RUNS.glob("*-seed*")) if f.name.rsplit("-seed", 1)[0] in rows and (f / "results.json").exists()]
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            for folder, report in zip(folders, pool.map(measure, folders)):
                store[folder.name] = shorten(report)
                STORE.write_text(json.dumps(store, indent=0, sort_keys=True) + "\n")
                print(folder.name, flush=True)
    put(HERE / "README.md", "measured", text(store))


if __name__ == "__main__":
    main()
