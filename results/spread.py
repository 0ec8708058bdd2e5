"""spread.py: mean and spread over run folders that differ in their seed alone, one row for each kind of run.

    python results/spread.py runs/erm-gta5-seed* runs/ppar-gta5-seed*
    python results/spread.py runs/*-seed* --file results-height-1536.json          another protocol of evaluate.py
    python results/spread.py runs/erm-gta5-seed* runs/ppar-gta5-seed* --classes    the mean over the unseen targets, class by class

Folders whose names are equal but for what follows `-seed` are one row: mIoU of each target in per cent, mean and standard
deviation, n runs; then, at equal seeds, how far each row is from the first. Scores that were taken in another way than
those of the first folder are refused.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

TAKEN = ("evaluation_size", "mapillary", "precision", "checkpoint")


def by_class(results):
    """{class: mean IoU over the targets that are no source, where it occurs}."""
    unseen = [target["iou"] for name, target in results["targets"].items() if name not in results["source"]]
    found = {name: [iou[name] for iou in unseen if iou[name] is not None] for name in unseen[0]}
    return {name: statistics.mean(values) for name, values in found.items() if values}


def read(folders, file, classes=False):
    """{kind: {seed: {target: mIoU, ..., "mean": ...}}}, or a class in the place of a target, and how all of them were taken."""
    kinds, taken = {}, None
    for folder in map(Path, folders):
        try:
            results = json.loads((folder / file).read_text())
            row = {name: target["miou"] for name, target in results["targets"].items()} | dict(mean=results["mean"])
            if results.get("not_scored"):
                raise ValueError("a mean over fewer targets than the others have")
            row = by_class(results) if classes else row
            how = {name: results[name] for name in TAKEN} | dict(images={n: t["images"] for n, t in results["targets"].items()})
        except (OSError, ValueError, KeyError, TypeError):
            sys.exit(f"error: {folder} has no {file} of evaluate.py: wait for its end, or run `python evaluate.py {folder}`.")
        taken = taken or how
        if how != taken:
            sys.exit(f"error: {folder}/{file} was taken in another way than {folders[0]}'s ({how}, not {taken}).")
        kind, _, seed = folder.resolve().name.partition("-seed")
        kinds.setdefault(kind, {})[seed] = row
    return kinds, taken


def spread(values, form=".1f"):
    """Mean and standard deviation in words; without the latter where there is one value, `-` where there is none."""
    values = [value for value in values if value is not None]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}" if values else "-"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--file", default="results.json", help="which of evaluate.py's files (default: results.json)")
    parser.add_argument("--classes", action="store_true", help="a line a class")
    given = parser.parse_args(arguments)
    kinds, taken = read(given.runs, given.file, given.classes)
    (first, base), *others = kinds.items()
    columns = [c for c in next(iter(base.values())) if all(c in row for rows in kinds.values() for row in rows.values())]
    lines = [["run", "n", *columns]]
    lines += [[kind, str(len(rows)), *(spread([row[c] for row in rows.values()]) for c in columns)] for kind, rows in kinds.items()]
    for kind, rows in others:
        pairs = [(rows[seed], base[seed]) for seed in rows if seed in base]
        differences = ([a[c] - b[c] for a, b in pairs if None not in (a[c], b[c])] for c in columns)
        lines.append([f"{kind} - {first}", str(len(pairs)), *(spread(values, "+.1f") for values in differences)])
    lines = [*zip(*lines)] if given.classes else lines
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print(", ".join(f"{name}: {taken[name]}" for name in TAKEN))


if __name__ == "__main__":
    main()
