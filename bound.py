"""bound.py: every term of the theorem as a number, for any finished run.

theory.md holds the risk of the text score on an unseen domain down by a few quantities: how far pixels stand from the
prototype of their class (A), how steep the loss can be (L), how differently the classes are shared out (TV). Each is
computed here on the source and on every target, and the inequalities are checked.

    Eq. 8    l(z, y) = log sum_c exp(<z, p_c - p_y> / tau)          risk R = mean of l over labelled pixels
    Eq. 9    L_y = max_c |p_c - p_y| / tau,  L = max_y L_y          no steeper anywhere
    Eq. 10   -g_y |z - p_y| <= l(z, y) - h_y <= L_y |z - p_y|       h_y = l(p_y, y), g_y = |grad l(p_y, y)|
    Eq. 12   R_T <= R_S + g A_S + L A_T + osc(h) TV(pi_S, pi_T)     the hub: both domains meet at the prototypes
    Eq. 13   R_T <= E[h_y + L_y |z - p_y|~]                         never larger, but does not mention the source
    Eq. 25   R_T <= E[h_y + |grad l(z, y)| |z - p_y|~]              the same with the slope where each pixel stands
    Eq. 16   A^O <= A^V + G                                         the debt of a goal, here that of the VTP

They hold for any two finite sets of pixels: a broken one is a bug. Targets are read for analysis only, after training.

Shapes    emb (N, D) unit rows     label (N,) 0 .. K-1     prototypes (K, D) unit rows     h_y, g_y, L_y, shares (K,)

Not here: the proofs (theory.md), the losses that move the terms (align.py, reweight.py), mIoU (evaluate.py).
`python bound.py RUN` measures a finished run; `python bound.py` prints
    noise 0.1   left 0.06   right_local 0.10   right_direct 1.70   right 4.24
    noise 0.4   left 0.65   right_local 1.85   right_direct 5.21   right 8.98
    Notice: no right side is ever below the left one, and the ones that look where pixels stand are the tightest.
"""

import sys

import checkpoint
import machine

LIMIT = 200  # pictures of each data set, unless told otherwise: a class's mean over 200 pictures moves little


def parse(arguments):
    """The command line."""
    p = checkpoint.run_flags("Measure every term of the theorem for a finished run.")
    p.add_argument("--limit", type=int, default=LIMIT, metavar="N",
                   help=f"read N pictures of each data set, evenly spaced; 0: all of them (default: {LIMIT})")
    return p.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a misspelt flag answer at once
    ARGS = parse(sys.argv[1:])

import torch
import torch.nn.functional as F
from tqdm import tqdm

import align
import data
import ppar
from evaluate import find_targets, make_look


def score_loss(emb, label, prototypes, tau):
    """Eq. 8: cross-entropy of <z, p_c> / tau over the prototypes, (N,), 0 on void: Eq. 3, for any z of the space."""
    return F.cross_entropy(emb @ prototypes.T / tau, label, ignore_index=data.VOID, reduction="none")


def local_slope(emb, label, prototypes, tau):
    """Eq. 25: |grad l(z, y)| = |sum_c q_c p_c - p_y| / tau with q the softmax, (N,), for labels without void."""
    prob = (emb @ prototypes.T / tau).softmax(dim=1)
    return (prob @ prototypes - prototypes[label]).norm(dim=1) / tau


def hub_terms(prototypes, tau):
    """Eq. 10: h_y and g_y, (K,) each: loss and slope of a pixel that has arrived at its prototype; 0 < h_y <= log K."""
    own = torch.arange(len(prototypes), device=prototypes.device)
    return score_loss(prototypes, own, prototypes, tau), local_slope(prototypes, own, prototypes, tau)


def lipschitz_per_class(prototypes, tau):
    """Eq. 9: L_y, (K,). A gradient is a mean of the (p_c - p_y) / tau over c, and no longer than the longest of them."""
    return (prototypes[:, None] - prototypes).norm(dim=2).amax(dim=1) / tau


def loss_ceiling(prototypes, tau):
    """M = max_y log sum_c exp(|p_c - p_y| / tau), which no unit vector's loss exceeds: a bound above it is vacuous."""
    return ((prototypes[:, None] - prototypes).norm(dim=2) / tau).logsumexp(dim=1).max().item()


def span_basis(prototypes):
    """Eq. 11: an orthonormal basis (D, r), r < K, of the directions between prototypes: all that the loss can see of z.

    All else in a pixel (CLIP's gap between images and text, mostly) lengthens |z - p_y| and leaves every loss as it is.
    """
    difference = (prototypes - prototypes[:1])[1:].double()  # in double: small directions count, and rounding must not
    _, size, rows = torch.linalg.svd(difference, full_matrices=False)
    return rows[size > 1e-6 * size.max()].T.to(prototypes.dtype)


def total_variation(share_s, share_t):
    """TV(pi_S, pi_T) = half the sum of |pi_S(y) - pi_T(y)|, a float in [0, 1]."""
    return 0.5 * (share_s - share_t).abs().sum().item()


def hub_bound(risk_s, radius_s, radius_t, slope, lipschitz, osc, tv):
    """Eq. 12: R_S + g A_S + L A_T + osc(h) TV(pi_S, pi_T)."""
    return risk_s + slope * radius_s + lipschitz * radius_t + osc * tv


def rank_correlation(a, b):
    """Spearman's rank correlation of two lists (ties share a rank): does the bound order the risks?"""
    a, b = ((x[:, None] - x).sign().sum(dim=1) for x in torch.tensor([a, b]).double())  # twice the rank, from the mean rank
    return (a @ b / (a.norm() * b.norm())).item()


def pixel_terms(z, y, otp, tau):
    """What the theorem asks of each pixel: z (N, D), y (N,) without void -> {name: (N,)}.

    left <= right_local <= right_direct pixel by pixel, so their means are Eq. 25 and 13. mass is what a pixel counts: 1,
    until domains are mixed, and in double, as all means are. weight is its learning weight.
    """
    hub, steep = hub_terms(otp, tau)[0].double()[y], lipschitz_per_class(otp, tau).double()[y]
    along = ((z - otp[y]) @ span_basis(otp)).norm(dim=1)  # Eq. 11, |z - p_y|~: the part of |z - p_y| that the loss can see
    return dict(label=y, mass=torch.ones_like(hub), weight=torch.ones_like(hub), images=y[:1],  # one entry for each image
                left=score_loss(z, y, otp, tau), hub=hub, right_direct=hub + steep * along,
                right_local=hub + local_slope(z, y, otp, tau) * along, radius_otp=(z - otp[y]).norm(dim=1), radius_span=along,
                error=((z @ otp.T).argmax(dim=1) != y).float())


@torch.no_grad()
def measure(run, items, limit, weights=False, title=None):
    """The labelled pixels (cells) of `limit` images of a domain, evenly spaced (0: all) -> {name: (N,)} as in pixel_terms.

    weights  whether the learning weights of Eq. 6 are among them    title  of a progress bar; None: no bar
    """
    config, otp, images = run.config, run.ppar.otp, []
    look = make_look(run.ppar, config)
    for item in tqdm(data.evenly(items, limit or len(items)), title, unit="image", disable=not title):
        image, label = data.load_pair(item, config.mapillary)
        out, full, grid = look(data.to_tensor(image), label)
        valid = grid[0] != data.VOID
        terms = pixel_terms(out.emb[0].permute(1, 2, 0)[valid].float(), grid[0][valid], otp, config.tau)
        if weights:  # Eq. 6 at the end of the ramp, which stays at 0 in a run without weights
            weight = ppar.learning_weights(out, otp, full, tau=config.tau, judge_text=config.judge_text,
                                           ramp=1.0 if config.reweight else 0.0)
            terms["weight"] = align.labels_on_grid(weight, out.emb)[0][valid]
        if out.vtp is not None:
            terms["radius_vtp"] = align.distance(out.emb, grid, out.vtp)[0][valid]
            terms["gap"] = (out.vtp[0] - otp).norm(dim=1)[terms["label"]]
        images.append({name: value.cpu() for name, value in terms.items()})
    domain = {name: torch.cat([terms[name] for terms in images]) for name in images[0]}
    data.require(len(domain["label"]), f"{items[0].dataset}: none of the {len(images)} images read has a labelled pixel; check the labels.")
    return domain


def mixture(domains):
    """Several sources as training sees them: every source has the same say, whatever its number of pixels."""
    domains = [dict(d, mass=d["mass"] / d["mass"].sum()) for d in domains]
    return {name: torch.cat([d[name] for d in domains]) for name in domains[0]}


def mean(domain, name):
    """E[name] over the labelled pixels of a domain."""
    return ((domain["mass"] * domain[name]).sum() / domain["mass"].sum()).item()


def shares(domain, num_classes):
    """pi(y), (K,), sum 1: the share of each class among the labelled pixels."""
    return torch.bincount(domain["label"], domain["mass"], num_classes) / domain["mass"].sum()


def describe(source, domain, otp, tau):
    """One row of bound.json: the terms of `domain` and the right sides, with `source` as the S of Eq. 12."""
    share_s, share_t, (hub, slope) = shares(source, len(otp)), shares(domain, len(otp)), hub_terms(otp, tau)
    weighted = dict(domain, mass=domain["mass"] * domain["weight"])  # S_w, a domain like any other
    present = hub.double()[(share_s + share_t) > 0]  # osc(h) is over the classes that occur in either domain
    terms = ("left", "right_local", "right_direct", "error", "radius_otp", "radius_vtp", "gap", "radius_span")
    row = {name: mean(domain, name) for name in terms if name in domain}
    row.update(slope=slope.max().item(), lipschitz=lipschitz_per_class(otp, tau).max().item(),
               osc=(present.max() - present.min()).item(), tv=total_variation(share_s, share_t),
               ceiling=loss_ceiling(otp, tau), images=len(domain["images"]), pixels=len(domain["label"]),
               n_eff=(weighted["mass"].sum() ** 2 / (weighted["mass"] ** 2).sum()).item())  # Eq. 22
    terms = (row[name] for name in ("radius_otp", "slope", "lipschitz", "osc", "tv"))
    row["right"] = hub_bound(mean(source, "left"), mean(source, "radius_otp"), *terms)
    row["vacuous"] = row["right"] > row["ceiling"]
    row["slope_measured"] = (row["left"] - mean(domain, "hub")) / max(row["radius_otp"], 1e-12)  # an L that would have done
    if (domain["weight"] != 1).any():  # Eq. 18: what the weights change; Eq. 21: how far they move the shares
        row.update(risk_weighted=mean(weighted, "left"), radius_weighted=mean(weighted, "radius_otp"),
                   share_shift=total_variation(share_t, shares(weighted, len(otp))))
    chain = [row[name] for name in ("left", "right_local", "right_direct", "right")]  # Eq. 25 and 13, and with them 12
    legs = [row["radius_otp"], row["radius_vtp"] + row["gap"]] if "gap" in row else []  # Eq. 16
    claims = (*zip(chain, chain[1:]), *zip(legs, legs[1:]))
    return dict(row, holds=all(a <= b + 1e-5 * max(1.0, b) for a, b in claims))  # up to the rounding of float32


def measure_run(run, limit=LIMIT):
    """Measure a checkpoint.Run on its source and on every target; print and store the terms -> the report (a dict).

    limit  images of each data set, evenly spaced; 0: all

    The source S is the training split as it lies on the disk, wrong labels included: whole images, no augmentation.
    Its held-out split is a target without domain shift: what is left is having learnt the one and not the other.
    """
    data.require(limit >= 0, f"--limit {limit} cannot be negative: 0 reads all pictures.")
    config, file, otp = run.config, run.path / "bound.json", run.ppar.otp.cpu().float()
    print(f"Measuring {file}; targets are read here for analysis only, after training.")
    again = f"{file} has not been changed; measure anew with `python bound.py {run.path}`, or fewer pictures with --limit N."
    with machine.stop_with(lambda: again), machine.say_why(f"measure fewer pictures with `python bound.py {run.path} --limit N`"):
        trained = [(name, data.list_items(name, config.data_root, "train", config.holdout, config.harmful, run.withheld.get(name)))
                   for name in config.source]
        domains = {"source": mixture([measure(run, items, limit, weights=True, title=name) for name, items in trained])}
        try:
            withheld = [(name, data.list_items(name, config.data_root, "val", config.holdout, withheld=run.withheld.get(name)))
                        for name in config.source]
            domains["source held out"] = mixture([measure(run, items, limit, title=f"{name} held out") for name, items in withheld])
        except data.UserError as error:
            print(f"no held-out source row: {error}")
        for name, items in find_targets(run).items():
            domains[name] = measure(run, items, limit, title=name)
    rows = {name: describe(domains["source"], domain, otp, config.tau) for name, domain in domains.items()}
    report = dict(run=str(run.path), step=run.step, method=config.method, source=list(config.source), seed=config.seed,
                  tau=config.tau, domains=rows)
    checkpoint.write_json(file, report)
    print_bound(report)
    return report


def print_bound(report):
    """The rows of bound.json side by side, each term under the name that theory.md gives its column."""
    rows = [dict(domain=name, **row) for name, row in report["domains"].items()]
    for key in rows[0]:
        cells = [f"{row[key]:.3f}" if isinstance(row.get(key), float) else str(row.get(key, "-")) for row in rows]
        print(f"{key:15s}", *(cell.rjust(max(8, len(row["domain"]))) for cell, row in zip(cells, rows)))
    print("right: Eq. 12, right_direct: Eq. 13, right_local: Eq. 25; vacuous: right is above ceiling, which no loss is")
    print("every inequality holds:", "yes" if all(row["holds"] for row in rows) else "NO: a bug")
    targets = [row for row in rows if not row["domain"].startswith("source") and row["domain"] not in report["source"]]
    for key in ("right", "right_direct") if len(targets) > 2 else ():
        rho = rank_correlation([row[key] for row in targets], [row["left"] for row in targets])
        print(f"rank correlation of {key} with the risk over the {len(targets)} targets: {rho:+.2f}")


def _demo():
    generator, domains = torch.Generator().manual_seed(0), []
    otp, tau = F.normalize(torch.randn(6, 32, generator=generator), dim=1), 0.2
    for noise, classes in ((0.1, 5), (0.1, 6), (0.2, 6), (0.4, 6)):
        label = torch.randint(0, classes, (2000,), generator=generator)
        emb = F.normalize(otp[label] + noise * torch.randn(2000, 32, generator=generator), dim=1)
        domains.append(pixel_terms(emb, label, otp, tau))
    for noise, domain in ((0.1, domains[1]), (0.4, domains[3])):
        row = describe(domains[0], domain, otp, tau)
        print(f"noise {noise}", *(f"  {key} {row[key]:.2f}" for key in ("left", "right_local", "right_direct", "right")))
        assert row["holds"], "the inequalities hold for any two sets of pixels"
    print("Notice: no right side is ever below the left one, and the ones that look where pixels stand are the tightest.")


if __name__ == "__main__":
    if ARGS == parse([]):
        _demo()
    else:
        with checkpoint.one_sentence(ARGS.run):
            measure_run(checkpoint.open_run(ARGS), ARGS.limit)
