"""pictures.py: the committed pictures: of two finished runs, and two that need none.

    python train.py --out runs/full && python train.py --method erm --out runs/erm
    python results/pictures.py runs/full runs/erm
    python results/pictures.py

gallery.png  the drawn domains, three scenes of each beside their labels
noise.png    what a seed does to a score, from results/toy.csv; its sentence goes into results/README.md
strip.png    one scene of an unseen domain: image, truth, the baseline's prediction, the method's
method.png   one source scene in CLIP's space: its cells (Eq. 6 as size), both prototypes of each class (Eq. 1 and 2), and
             the path of the goal from one to the other (Eq. 4), in the plane of the largest variance of all of them
walk_*.png   figures of the first run, drawn again beside the second, for the walk in results/README.md
"""

import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import ablate  # noqa: E402
import align  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import figures  # noqa: E402
import ppar  # noqa: E402
import toy  # noqa: E402
from evaluate import make_scorer, predict  # noqa: E402


def gallery(path):
    """One line a domain."""
    rows = [{f"{name} {k}": array for k in range(3) for name, array in zip(("scene", "label"), toy.draw(domain, "val", k))}
            for domain in toy.DOMAINS]
    names = " / ".join(name.removeprefix("toy-") for name in toy.DOMAINS)
    return figures.figure_predictions(path, rows, names, inches=2)


ROWS = ("erm", "vote", "no-reweight", "full", "vtp")  # of results/ablate.py


def noise_sentence(lines):
    """What one run can show, from the lines of toy.csv."""
    of = {row: ablate.column(lines, row) for row in ROWS}
    spread = sorted(statistics.stdev(scores.values()) for scores in of.values())
    paired = sorted(statistics.stdev([of["full"][s] - of[row][s] for s in of[row]]) for row in ROWS if row != "full")
    leads = {row: [of["full"][s] - of[row][t] for s in of["full"] for t in of[row] if s != t] for row in ROWS if row != "full"}
    pairs = ", ".join(f"{sum(lead > 0 for lead in lead_of)} of {len(lead_of)} against `{row}`" for row, lead_of in leads.items())
    reach = max(max(lead_of) - min(lead_of) for lead_of in leads.values()) / 2
    return (f"Over its seeds a row's unseen mean has a standard deviation of {spread[0]:.1f} to {spread[-1]:.1f} points. Of all pairs\n"
            f"of one run of `full` and one of another row with another seed, `full` is ahead in {pairs}.\n"
            f"So one run of each cannot settle a lead below about {reach:.1f} points. At equal seed, where data and initial\n"
            f"weights are the same, a difference varies by {paired[0]:.2f} to {paired[-1]:.2f}: hence the claims are made on paired seeds.")


def noise(path, lines):
    """Left: each seed of each row. Right: the lead of `full` at equal seed, and over all other pairs of seeds."""
    fig = Figure((11, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2, sharey=True)
    full = ablate.column(lines, "full")
    for height, row in enumerate(ROWS):
        own = ablate.column(lines, row)
        left.plot(own.values(), [height] * len(own), "o", color="C0", alpha=0.6)
        left.plot(statistics.mean(own.values()), height, "k|", markersize=16)
        if row != "full":
            right.plot([full[s] - own[t] for s in full for t in own if s != t], 20 * [height + 0.15], ".", color="0.6")
            right.plot([full[s] - own[s] for s in own], [height] * len(own), "o", color="C1", alpha=0.6)
    left.set(title="one dot a seed: neighbouring rows overlap", xlabel="unseen mean, IoU in %", yticks=range(len(ROWS)), yticklabels=ROWS)
    right.set(title="lead of full: orange at equal seed, grey at others", xlabel="difference in points")
    right.axvline(0, color="k", linewidth=0.8)
    checkpoint.write_atomically(path, lambda file: fig.savefig(file, dpi=110, format="png"))
    print("figure:", path)


def strip(path, run, baseline, domain="toy-snow", index=5):
    """One scene as four panels."""
    image, truth, _ = toy.draw(domain, "val", index)
    row = {"never seen: " + domain.removeprefix("toy-"): image, "truth": truth}
    for name, who in (("baseline", baseline), ("PPAR", run)):
        row[name] = predict(make_scorer(who.ppar, who.config), data.to_tensor(image), truth.shape)
    return figures.figure_predictions(path, [row])


def method(path, run, index=3, least=6):
    """Cells, prototypes and paths of the classes that at least `least` cells of a harmful source scene are labelled with."""
    image, label, _ = toy.draw("toy-gta5", "train", index, harmful=1.0)
    out, padded, grid = ppar.look(run.ppar, data.to_tensor(image), label)
    otp, vtp = run.ppar.otp, out.vtp[0]
    weight = align.labels_on_grid(ppar.learning_weights(out, otp, padded, run.config, ramp=1.0), out.emb)[0]
    present = [c for c in range(len(data.CLASSES)) if (grid == c).sum() >= least]
    chosen = torch.isin(grid[0], torch.tensor(present))
    cells, names, weight = out.emb[0].permute(1, 2, 0)[chosen], grid[0][chosen], weight[chosen]
    points = torch.cat([cells, otp[present], vtp[present]])
    centre = points.mean(dim=0)
    axes = torch.linalg.svd(points - centre, full_matrices=False).Vh[:2].T  # (D, 2): two main directions

    fig = Figure(figsize=(9, 6.5), layout="constrained")
    ax = fig.subplots()
    ax.scatter(*((cells - centre) @ axes).T, s=4 + 40 * weight, c=data.COLORS[names] / 255, alpha=0.7, linewidths=0)
    goals = torch.stack([align.goal(otp, out.vtp, lam).view(otp.shape) for lam in np.linspace(1, 0, 20)])  # (20, K, D)
    for c in present:
        line = (goals[:, c] - centre) @ axes
        colour = data.COLORS[c] / 255
        ax.plot(*line.T, color=colour, linewidth=2)
        for at, marker in ((0, "*"), (-1, "D")):
            ax.scatter(*line[at], s=260 if marker == "*" else 70, marker=marker, color=[colour], edgecolors="black", zorder=3)
        ax.annotate(data.CLASSES[c], line[0], textcoords="offset points", xytext=(8, 6), fontsize=10)
    for marker, text, size in (("*", "OTP: the class's name (Eq. 1)", 14), ("D", "VTP: after a look at the image (Eq. 2)", 7),
                               ("o", "cell whose label is believed (Eq. 6)", 7), (".", "cell whose label is not", 4)):
        ax.plot([], [], marker, color="0.6", markeredgecolor="black" if marker in "*D" else "0.6", markersize=size, label=text)
    ax.plot([], [], color="0.6", linewidth=2, label="path of the goal while training goes on (Eq. 4)")
    ax.legend(frameon=False, fontsize=9)
    ax.set(xticks=[], yticks=[])
    checkpoint.write_atomically(path, lambda file: fig.savefig(file, dpi=110, format="png"))
    return path


def main(*runs):
    if not runs:
        lines = ablate.read(ROOT / "results" / "toy.csv")
        noise(ROOT / "results" / "noise.png", lines)
        ablate.put(ROOT / "results" / "README.md", "noise", noise_sentence(lines))
        return gallery(ROOT / "results" / "gallery.png")
    with torch.no_grad():
        full, baseline = map(checkpoint.load_run, runs)
        strip(ROOT / "results" / "strip.png", full, baseline)
        print("figure:", method(ROOT / "results" / "method.png", full))
        figures.draw_figures(full, baseline)
    for name in ("curves", "embedding", "reliability", "predictions_toy-night"):
        print("figure:", shutil.copy(full.path / f"{name}.png", ROOT / "results" / f"walk_{name}.png"))


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit("give two run folders, of the full method and of the baseline, or none: see the head of this file.")
    main(*sys.argv[1:])
