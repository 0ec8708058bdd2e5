"""pictures.py: the committed pictures: of two finished runs, and two that need none.

    python train.py --out runs/full && python train.py --method erm --out runs/erm
    python results/pictures.py runs/full runs/erm
    python results/pictures.py

task.png     what the task is: a source scene with its label, and scenes of three domains that training never sees
diagram.png  from one batch of images to the loss of Eq. 7, with the shapes of the default run
gallery.png  the drawn domains, three scenes of each beside their labels
noise.png    what a seed does to a score, from results/toy.csv; its sentence goes into results/README.md
strip.png    one scene of an unseen domain: image, truth, the baseline's prediction, the method's
walk_*.png   figures of the first run, drawn again beside the second, for the walk in results/README.md
"""

import shutil
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import ablate  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import figures  # noqa: E402
import toy  # noqa: E402
from evaluate import make_scorer, predict  # noqa: E402

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402, after figures.py, which imports matplotlib whatever MPLBACKEND says


def task(path):
    """One line of panels: what training sees, and what the network is asked afterwards."""
    image, label, _ = toy.draw("toy-gta5", "train", 0)
    row = {"training sees:\nan image of the source domain": image, "training sees:\nits label, one class a pixel": label}
    for domain, index in (("snow", 5), ("fog", 2), ("night", 0)):
        row[f"asked later, never seen:\nthe domain {domain}"] = toy.draw(f"toy-{domain}", "val", index)[0]
    return figures.figure_predictions(path, [row], inches=3)


# The diagram: (name, text, x, y) of each box, and the arrows between boxes. x in 0 .. 12, y in 0 .. 6.
BOXES = (
    ("names", "19 class names", 1.3, 5.3, "input"),
    ("image", "batch of images\n(8, 3, 96, 96)", 1.3, 3.2, "input"),
    ("label", "labels\n(8, 96, 96)", 1.3, 0.7, "input"),
    ("text", "CLIP text encoder\nfrozen", 4.0, 5.3, "frozen"),
    ("frozen", "CLIP image encoder\nfrozen copy", 4.0, 4.0, "frozen"),
    ("net", "CLIP image encoder\ntrained", 4.0, 2.4, "trained"),
    ("otp", "OTP, Eq. 1\n(19, 64)", 6.8, 5.3, "value"),
    ("vtp", "VTP, Eq. 2\n(8, 19, 64)", 6.8, 4.0, "value"),
    ("z", "pixel embeddings z\n(8, 64, 12, 12)", 6.8, 2.4, "value"),
    ("decoder", "decoder, trained\nlogits (8, 19, 24, 24)", 6.8, 1.1, "trained"),
    ("goal", "alignment target, Eq. 4\nbetween OTP and VTP", 9.4, 4.65, "value"),
    ("weight", "weights w, Eq. 5 and 6\nby decoder and frozen CLIP\n(8, 96, 96)", 9.4, 0.05, "value"),
    ("align", "alignment loss\nEq. 3", 11.6, 3.2, "loss"),
    ("seg", "segmentation loss\ncross-entropy", 11.6, 1.3, "loss"),
)
ARROWS = (("names", "text"), ("image", "frozen"), ("image", "net"), ("text", "otp"), ("frozen", "vtp"), ("otp", "vtp"), ("net", "z"),
          ("z", "decoder"), ("otp", "goal"), ("vtp", "goal"), ("goal", "align"), ("z", "align"), ("decoder", "seg"),
          ("label", "weight"), ("decoder", "weight"), ("weight", "seg"), ("weight", "align"))
FILL = dict(input="white", frozen="lightsteelblue", trained="navajowhite", value="whitesmoke", loss="mistyrose")


def diagram(path):
    """Boxes are arrays and parts of the network, arrows say what is computed from what."""
    fig = Figure((13, 6.2), layout="constrained", dpi=110)
    ax = fig.subplots()
    boxes = {}
    for name, text, x, y, kind in BOXES:
        frame = dict(boxstyle="round,pad=0.5", fc=FILL[kind], ec="0.4")
        boxes[name] = ax.text(x, y, text, ha="center", va="center", fontsize=10, zorder=3, bbox=frame)
    for kind, said in (("frozen", "never trained"), ("trained", "trained"), ("value", "computed"), ("loss", "loss")):
        ax.plot([], [], "s", color=FILL[kind], markeredgecolor="0.4", markersize=12, label=said)
    ax.legend(loc="upper right", ncols=2, frameon=False, fontsize=10)
    ax.set(xlim=(0, 12.7), ylim=(-0.6, 6))
    ax.set_axis_off()
    FigureCanvasAgg(fig).draw()  # now the boxes have their sizes, and arrows can end at their borders
    for start, end in ARROWS:
        a, b = boxes[start], boxes[end]
        ends = dict(patchA=a.get_bbox_patch(), patchB=b.get_bbox_patch(), shrinkA=3, shrinkB=3)
        ax.annotate("", b.get_position(), a.get_position(), zorder=1, arrowprops=dict(arrowstyle="-|>", color="0.4", **ends))
    checkpoint.write_atomically(path, lambda file: fig.savefig(file, format="png"))
    print("figure:", path)


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


def main(*runs):
    if not runs:
        lines = ablate.read(ROOT / "results" / "toy.csv")
        noise(ROOT / "results" / "noise.png", lines)
        ablate.put(ROOT / "results" / "README.md", "noise", noise_sentence(lines))
        task(ROOT / "results" / "task.png")
        diagram(ROOT / "results" / "diagram.png")
        return gallery(ROOT / "results" / "gallery.png")
    with torch.no_grad():
        full, baseline = map(checkpoint.load_run, runs)
        strip(ROOT / "results" / "strip.png", full, baseline)
        figures.draw_figures(full, baseline)
    for name in ("curves", "embedding", "reliability", "predictions_toy-night"):
        print("figure:", shutil.copy(full.path / f"{name}.png", ROOT / "results" / f"walk_{name}.png"))


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit("give two run folders, of the full method and of the baseline, or none: see the head of this file.")
    main(*sys.argv[1:])
