"""curves.py: what the method is for. Unseen mIoU of every method over four things that a user may have more or less of.

    python results/curves.py             train what results/curves.csv does not hold yet, then draw results/curve-*.png
    python results/curves.py --draw      draw them alone
    python results/curves.py train [--scenes N] [--oracle] FLAGS OF train.py      one run, for instance with 50 scenes

steps      length of the run: who forgets what CLIP knew?
harmful    share of source scenes with wrong labels: who is hurt? The oracle is the full method without weights, whose wrong
           labels are void: no weights can do better
lr-clip    factor on CLIP's learning rate: who depends on it?
scenes     source scenes to train on: who needs many?

All else is train.py's recipe. Shown: mean over seeds, and the range from the lowest to the highest.
"""

import argparse
import itertools
import statistics
import sys

from matplotlib.figure import Figure

import ablate
from ablate import HERE, ROWS, TARGETS
from fight import METHODS

sys.path.insert(0, str(HERE.parent))

import checkpoint  # noqa: E402

CURVES = {"steps": (50, 100, 200, 400, 800), "harmful": (0, 0.1, 0.3, 0.5), "lr-clip": (0.01, 0.03, 0.1, 0.3),
          "scenes": (50, 100, 200, 400)}
RECIPE = {"steps": 400, "harmful": 0.1, "lr-clip": 0.03, "scenes": 400}  # train.py's: those runs are in results/toy.csv
SEEDS = (0, 1)
ORACLE = "oracle"


def jobs():
    """(row, seed, flags), a curve after the other. What has train.py's recipe is in results/toy.csv."""
    found = []
    for axis, values in CURVES.items():
        methods = {**METHODS, **({ORACLE: f"--oracle {METHODS['no-reweight']}"} if axis == "harmful" else {})}
        for value, seed in itertools.product(values, SEEDS):
            found += [(row(method, axis, value), seed, f"train {flags} --{axis} {value}") for method, flags in methods.items()
                      if method == ORACLE and value or method != ORACLE and value != RECIPE[axis]]
    return found


def row(method, axis, value):
    """The row of the csv that holds a method's point of a curve."""
    return method if value == RECIPE[axis] and method != ORACLE else f"{method}-{axis}-{value}"


def draw(lines):
    """One figure a curve: a line and a band a method."""
    for axis, values in CURVES.items():
        fig = Figure((7, 4.5), layout="constrained")
        ax = fig.subplots()
        for method in (*METHODS, ORACLE):
            points = [(k, list(ablate.column(lines, row(method, axis, value)).values())) for k, value in enumerate(values)]
            points = [(k, scores) for k, scores in points if scores]
            if not points:
                continue
            at, scores = zip(*points)
            name = "wrong labels void (oracle)" if method == ORACLE else ROWS[method][0]
            line, = ax.plot(at, [statistics.mean(s) for s in scores], "o-", label=name, linewidth=3 if method == "full" else 1.5)
            ax.fill_between(at, [min(s) for s in scores], [max(s) for s in scores], color=line.get_color(), alpha=0.15, linewidth=0)
        ax.set(xticks=range(len(values)), xticklabels=values, xlabel=axis, ylabel="unseen mIoU in %")
        ax.legend(frameon=False, fontsize=8)
        checkpoint.write_atomically(HERE / f"curve-{axis}.png", lambda file, fig=fig: fig.savefig(file, dpi=110, format="png"))


def train_one(argv):
    """train.py in a world with fewer scenes, or with the wrong labels made void."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--scenes", type=int, default=RECIPE["scenes"], choices=CURVES["scenes"])
    parser.add_argument("--oracle", action="store_true")
    own, flags = parser.parse_known_args(argv)
    import data  # noqa: PLC0415: train.py answers --help before its heavy imports, and sets what has to be set before them
    import toy  # noqa: PLC0415
    import train  # noqa: PLC0415

    data.TOY_SCENES["train"] = own.scenes
    if own.oracle:
        drawn = toy.draw

        def without_wrong(*args, **kwargs):
            image, label, wrong = drawn(*args, **kwargs)
            label[wrong] = data.VOID
            return image, label, wrong
        toy.draw = without_wrong
    train.main(train.parse(flags))


def main():
    if sys.argv[1:2] == ["train"]:
        return train_one(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    failed = 0 if args.draw else ablate.train(jobs(), HERE / "curves.csv", TARGETS, args.jobs, "curves", "results/curves.py")
    draw(ablate.read(HERE / "curves.csv") + ablate.read(HERE / "toy.csv"))
    if failed:
        sys.exit(f"{failed} runs failed; what they said stands above. The same command tries them again.")


if __name__ == "__main__":
    main()
