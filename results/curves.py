"""curves.py: what the method is for. Unseen mIoU of every method over five things that a user may have more or less of.

    python results/curves.py             train what results/curves.csv does not hold yet, then draw results/curve-*.png
    python results/curves.py --draw      draw them alone, and write the tables into results/README.md
    python results/curves.py train [--scenes N] [--oracle] [--pixelwise] [--centred] FLAGS OF train.py      one run

steps      length of the run: who forgets what CLIP knew?
harmful    share of source scenes with wrong labels: who is hurt? The oracle is the full method without weights, whose wrong
           labels are void from the first step: what weights would bring that find exactly these
lr-clip    factor on CLIP's learning rate: who depends on it?
scenes     source scenes to train on: who needs many?
balance    exponent of the class balance in L_seg: who needs it? Weights that merely balanced classes would add nothing at 1

All else is train.py's recipe. Shown: mean over two seeds, and the range between them. Two trials, which are in no other file,
have five seeds and a table alone:

pixelwise  Eq. 4 with a turn for each cell: it starts at half its rank by the loss that CLIP, as it came, has to its label
centred    norm(otp - mean over classes). A softmax does not see the mean; what changes is the length by which each class is
           divided, so the differences between classes grow, as at a lower temperature
"""

import argparse
import itertools
import statistics
import sys

import torch
import torch.nn.functional as F

import ablate
from ablate import HERE, ROWS, TARGETS
from fight import METHODS

sys.path.insert(0, str(HERE.parent))

import align  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import ppar  # noqa: E402
import prototypes  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402

from matplotlib.figure import Figure  # noqa: E402, after train.py, which imports matplotlib whatever MPLBACKEND says

CURVES = {"harmful": (0, 0.1, 0.3, 0.5), "steps": (50, 100, 200, 400, 800), "lr-clip": (0.03, 0.1, 0.3), "scenes": (50, 100, 200, 400),
          "balance": (0, 0.5, 1)}
RECIPE = {"steps": 400, "harmful": 0.1, "lr-clip": 0.03, "scenes": 400, "balance": 0.5}  # train.py's: those runs are in results/toy.csv
NAMES = {"harmful": "share of source scenes with wrong labels", "steps": "training steps", "lr-clip": "factor on CLIP's learning rate",
         "scenes": "source scenes", "balance": "exponent of the class balance"}
SEEDS = (0, 1)
ORACLE = "oracle"
TRIALS = {"pixelwise": "full, each cell in its own turn", "centred": "full, centred prototypes"}


def shown(axis):
    """The methods of a curve."""
    return (*METHODS, ORACLE) if axis == "harmful" else tuple(METHODS)


def jobs():
    """(row, seed, flags), a curve after the other. What has train.py's recipe is in results/toy.csv."""
    found = []
    for axis, values in CURVES.items():
        methods = {**METHODS, **({ORACLE: f"--oracle {METHODS['no-reweight']}"} if axis == "harmful" else {})}
        for value, seed in itertools.product(values, SEEDS):
            found += [(row(method, axis, value), seed, f"train {flags} --{axis} {value}") for method, flags in methods.items()
                      if method == ORACLE and value or method != ORACLE and value != RECIPE[axis]]
    return found + [(trial, seed, f"train --{trial}") for trial in TRIALS for seed in ablate.SEEDS]


def row(method, axis, value):
    """The row of the csv that holds a method's point of a curve."""
    return method if value == RECIPE[axis] and method != ORACLE else f"{method}-{axis}-{value}"


def point(lines, method, axis, value, score="unseen"):
    """mIoU ("unseen", or of a domain) of a method at a point of a curve, a seed each; [] while one is missing. No harm, no oracle."""
    method = "no-reweight" if method == ORACLE and not value else method
    scores = [iou for seed, iou in ablate.column(lines, row(method, axis, value), score).items() if seed in SEEDS]
    return scores if len(scores) == len(SEEDS) else []


def name(method):
    return "wrong labels void (oracle)" if method == ORACLE else ROWS[method][0]


def draw(lines):
    """One figure a curve: a line and a band a method."""
    for axis, values in CURVES.items():
        places = values if axis in ("harmful", "balance") else range(len(values))  # the other three double, or nearly
        fig = Figure((9, 4), layout="constrained")
        ax = fig.subplots()
        for method in shown(axis):
            points = [(place, scores) for place, value in zip(places, values) if (scores := point(lines, method, axis, value))]
            if not points:
                continue
            at, scores = zip(*points)
            line, = ax.plot(at, [statistics.mean(s) for s in scores], "o-", label=name(method), linewidth=3 if method == "full" else 1.5)
            ax.fill_between(at, [min(s) for s in scores], [max(s) for s in scores], color=line.get_color(), alpha=0.15, linewidth=0)
        ax.set(xticks=places, xticklabels=values, xlabel=NAMES[axis], ylabel="unseen mIoU in %")
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        checkpoint.write_atomically(HERE / f"curve-{axis}.png", lambda file, fig=fig: fig.savefig(file, dpi=110, format="png"))


def table(lines, axis):
    """Markdown: the numbers of a curve, one line a method."""
    values = CURVES[axis]
    cells = [f"| {NAMES[axis]} | {' | '.join(map(str, values))} |", "|---" * (len(values) + 1) + "|"]
    for method in shown(axis):
        means = []
        for value in values:
            unseen, source = (point(lines, method, axis, value, score) for score in ("unseen", "toy-gta5"))
            means.append(f"{statistics.mean(unseen):.2f} ({statistics.mean(source):.1f})" if unseen else "-")
        cells.append(f"| {name(method)} | {' | '.join(means)} |")
    rows = {row(method, axis, value) for method in shown(axis) for value in values}
    commits = ", ".join(sorted({line["commit"] for line in lines if line["row"] in rows}))
    return "\n".join([*cells, "", "Made by `python results/curves.py`: unseen mIoU in % (held-out source), mean of two seeds; "
                      f"commit {commits}."])


def trials(lines):
    """Markdown: the trials against the full method, at equal seed."""
    table = ["| trial | n | unseen | held-out source | full minus it | 95 % interval |", "|---|---|---|---|---|---|"]
    for trial, said in TRIALS.items():
        own = ablate.column(lines, trial)
        if ahead := ablate.paired(ablate.column(lines, "full"), own):
            unseen, source = (ablate.spread([*scores.values()]) for scores in (own, ablate.column(lines, trial, "toy-gta5")))
            interval = f"{ahead[1] - ahead[2]:+.2f} to {ahead[1] + ahead[2]:+.2f}"
            table.append(f"| {said} | {ahead[0]} | {unseen} | {source} | {ahead[1]:+.2f} | {interval} |")
    return "\n".join([*table, "", "Made by `python results/curves.py`: the targets, pairs of equal seed."]) if table[2:] else "No run yet."


def pixelwise():
    """Eq. 4 with a lambda for each cell: the cosine to the goal is the mean of those to its ends, over the length before norm."""
    objective, alignment_map, seen = ppar.objective, align.alignment_map, {}

    def in_turn(emb, grid, goal, tau):
        if not isinstance(goal, tuple):
            return alignment_map(emb, grid, goal, tau)
        otp, vtp, lam = goal
        witness = F.interpolate(seen["clip"], size=grid.shape[1:], mode="bilinear", align_corners=False)
        loss = alignment_map(witness, grid, otp, tau).where(grid != data.VOID, torch.inf)
        rank = loss.flatten().argsort().argsort().view(grid.shape) / (grid != data.VOID).sum().clamp_min(1)  # 0 easiest .. 1 hardest
        lam = 1 - (2 * (1 - lam) - rank).clamp(0, 1)[:, None]  # (B, 1, h, w)
        length = (1 - lam * (1 - lam) * (vtp - otp).square().sum(dim=2)[:, :, None, None]).sqrt()  # (B, K, h, w)
        to_vtp, to_otp = (align.cosine_similarity_map(emb, points) for points in (vtp, otp))
        return F.cross_entropy(((1 - lam) * to_vtp + lam * to_otp) / length / tau, grid, ignore_index=data.VOID, reduction="none")

    def remembering(out, *rest, **more):
        seen["clip"] = out.clip_emb
        return objective(out, *rest, **more)
    ppar.objective, align.alignment_map, align.goal = remembering, in_turn, lambda otp, vtp, lam: (otp, vtp, lam)


def train_one(argv):
    """train.py in a world with fewer scenes, with the wrong labels made void, or with a trial's Eq. 1 or Eq. 4."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--scenes", type=int, default=RECIPE["scenes"], choices=CURVES["scenes"])
    parser.add_argument("--oracle", action="store_true")
    for trial in TRIALS:
        parser.add_argument(f"--{trial}", action="store_true")
    own, flags = parser.parse_known_args(argv)
    data.TOY_SCENES["train"] = own.scenes
    if own.oracle:
        drawn = toy.draw

        def without_wrong(*args, **kwargs):
            image, label, wrong = drawn(*args, **kwargs)
            label[wrong] = data.VOID
            return image, label, wrong
        toy.draw = without_wrong
    if own.pixelwise:
        pixelwise()
    if own.centred:
        original = prototypes.original_text_prototypes

        def centred(*args):
            otp = original(*args)
            return F.normalize(otp - otp.mean(dim=0), dim=1)
        prototypes.original_text_prototypes = centred
    train.main(train.parse(flags))


def main():
    if sys.argv[1:2] == ["train"]:
        return train_one(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    failed = 0 if args.draw else ablate.train(jobs(), HERE / "curves.csv", TARGETS, args.jobs, "curves", "results/curves.py")
    lines = ablate.read(HERE / "curves.csv") + ablate.read(HERE / "toy.csv")
    draw(lines)
    for axis in CURVES:
        ablate.put(HERE / "README.md", axis, table(lines, axis))
    ablate.put(HERE / "README.md", "trials", trials(lines))
    if failed:
        sys.exit(f"{failed} runs failed; what they said stands above. The same command tries them again.")


if __name__ == "__main__":
    main()
