"""bound_figure.py: the theorem's terms of one run as bars: python results/bound_figure.py RUN, after python bound.py RUN.

RUN/bound.png. Left: what the right side of Eq. 12 is made of, beside the risk that it holds down. Right: the two legs of Eq. 16.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint  # noqa: E402
import machine  # noqa: E402

machine.import_matplotlib()
from matplotlib.figure import Figure  # noqa: E402


def draw(report, file):
    """report: what bound.json holds."""
    names, source = list(report["domains"]), report["domains"]["source"]
    rows = [{"left of the source": source["left"], "slope x radius_otp of the source": row["slope"] * source["radius_otp"],
             "lipschitz x radius_otp": row["lipschitz"] * row["radius_otp"], "osc x tv": row["osc"] * row["tv"], **row}
            for row in report["domains"].values()]
    figure = Figure((13, 2.2 + 0.5 * len(names)), layout="constrained")
    for axis, (title, bars, marks) in zip(figure.subplots(1, 2, sharey=True), (
            ("Eq. 12: what the right side is made of", list(rows[0])[:4], ("left", "right_direct", "right_local", "ceiling")),
            ("Eq. 16: two legs, and the straight way", ("radius_vtp", "gap"), ("radius_otp", "radius_span")))):
        start = [0.0] * len(names)
        for key in (key for key in bars if key in rows[0]):  # no VTP, no legs
            length = [row[key] for row in rows]
            axis.barh(names, length, left=start, label=key, alpha=0.7)
            start = [a + b for a, b in zip(start, length)]
        for key, marker in zip(marks, ("k|", "kx", "k.", "k:")):
            axis.plot([row[key] for row in rows], names, marker, label=key, markersize=12, markeredgewidth=2)
        axis.legend(title=title, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, markerscale=0.5)
    axis.invert_yaxis()
    checkpoint.write_atomically(file, lambda part: figure.savefig(part, dpi=110, format="png"))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "bound.json").is_file():
        sys.exit("give the folder of a run that python bound.py has measured: it holds a bound.json.")
    draw(json.loads((Path(sys.argv[1]) / "bound.json").read_text()), Path(sys.argv[1]) / "bound.png")
