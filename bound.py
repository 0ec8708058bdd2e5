"""bound.py: every term of the theorem as a number, for any finished run.

theory.md proves that the risk of the text score on a domain that was never seen is held down by a handful of
quantities: how far pixels stand from the prototype of their class (A), how steep the loss can be (L), how differently
the classes are shared out (TV). Here each of them is computed on the source and on every target of a run, and the
inequalities are checked on the data.

    Eq. 8   l(z, y) = log sum_c exp(<z, p_c - p_y> / tau)          risk R = mean of l over labelled pixels
    Eq. 9   L_y = max_c |p_c - p_y| / tau,  L = max_y L_y          no steeper anywhere; exact
    Eq. 10  -g_y |z - p_y| <= l(z, y) - h_y <= L_y |z - p_y|       h_y = l(p_y, y), g_y = |grad l(p_y, y)|
    Eq. 12  R_T <= R_S + g A_S + L A_T + osc(h) TV(pi_S, pi_T)     the hub: both domains meet at the prototypes
    Eq. 13  R_T <= sum_y pi_T(y) (h_y + L_y A~_T(y))               never larger, but does not mention the source
    Eq. 25  R_T <= H_T + E[|grad l(z, y)| |z - p_y|~]              the same with the slope where each pixel stands
    Eq. 16  A^O <= A^V + G                                         two legs: pixel to VTP, VTP to OTP
    Eq. 18  A_{S_w} - A_S = covariance of w and |z - p_y| within the classes     what the learning weights gain
    Eq. 22  n_eff = (sum w)^2 / sum w^2                                          and what they cost

Eq. 12 and 13 hold for any two finite sets of pixels: a `no` in the column `holds` is a bug and not a discovery. What the
numbers tell is which term is large, which one a method moves, and how much is slack. Targets are read here for analysis
only: nothing that is measured here flows back into training or selection.

Shapes
    emb (N, D) unit rows     label (N,) 0 .. K-1     prototypes (K, D) unit rows     hub, L_y, shares (K,)

Not here: the proofs (theory.md), the losses that move the terms (align.py, reweight.py), mIoU (evaluate.py).
`python bound.py RUN` measures a finished run. Run `python bound.py` for a demonstration in seconds.
"""

import sys

import checkpoint


def parse(arguments):
    """The command line."""
    return checkpoint.run_flags("Measure every term of the theorem for a finished run.").parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a misspelt flag answer at once
    ARGS = parse(sys.argv[1:])

import torch
import torch.nn.functional as F

import data
import ppar
from data import VOID, UserError
from evaluate import find_targets

IMAGES = 200  # images read of each domain, evenly spaced: the theorem is then about these


# ----------------------------------------------------------------------------------- the loss and its three constants


def score_loss(emb, label, prototypes, tau):
    """Eq. 8: cross-entropy of <z, p_c> / tau over the prototypes, (N,), 0 on void: Eq. 3, for any z of the space."""
    return F.cross_entropy(emb @ prototypes.T / tau, label, ignore_index=VOID, reduction="none")


def lipschitz_per_class(prototypes, tau):
    """Eq. 9: L_y = max_c |p_c - p_y| / tau, (K,).

    The gradient of l in z is (sum_c q_c p_c - p_y) / tau with q a softmax: a point of the simplex spanned by the
    differences p_c - p_y, and a norm is largest at a corner.
    """
    return torch.cdist(prototypes, prototypes, compute_mode="donot_use_mm_for_euclid_dist").amax(dim=1) / tau


def hub_loss(prototypes, tau):
    """Eq. 10: h_y = l(p_y, y), (K,), in (0, log K]: the loss that is left when a pixel has arrived at its prototype."""
    return score_loss(prototypes, torch.arange(len(prototypes), device=prototypes.device), prototypes, tau)


def hub_slope(prototypes, tau):
    """Eq. 10: g_y = |sum_c q_c p_c - p_y| / tau at z = p_y, (K,); at most L_y, and how much less depends on tau."""
    prob = (prototypes @ prototypes.T / tau).softmax(dim=1)  # row y: the softmax at z = p_y
    return (prob @ prototypes - prototypes).norm(dim=1) / tau


def local_slope(emb, label, prototypes, tau):
    """Eq. 25: |grad l(z, y)| at every pixel, (N,), for labels without void; at most (1 - omega) L_y (Eq. 9)."""
    prob = (emb @ prototypes.T / tau).softmax(dim=1)
    return (prob @ prototypes - prototypes[label]).norm(dim=1) / tau


def loss_ceiling(prototypes, tau):
    """The largest loss that a unit vector can have, at most: max_y log sum_c exp(|p_c - p_y| / tau).

    A right side above it says nothing that was not known before: the bound is then called vacuous.
    """
    apart = torch.cdist(prototypes, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    return (apart / tau).logsumexp(dim=1).max().item()


def span_basis(prototypes):
    """Eq. 11: an orthonormal basis (D, r), r < K, of the directions between prototypes: all that the loss can see of z.

    What pixels have in common with no difference of two prototypes (CLIP's gap between images and text is mostly of
    that kind) lengthens |z - p_y| and leaves every loss as it is.
    """
    difference = (prototypes - prototypes[:1])[1:].double()  # in double: small directions count, and rounding must not
    _, size, rows = torch.linalg.svd(difference, full_matrices=False)
    return rows[size > 1e-6 * size.max()].T.to(prototypes.dtype)


# ------------------------------------------------------------------------------------------ two domains, one bound


def total_variation(share_s, share_t):
    """TV(pi_S, pi_T) = half the sum of |pi_S(y) - pi_T(y)|, a float in [0, 1]."""
    return 0.5 * (share_s - share_t).abs().sum().item()


def oscillation(hub, share_s, share_t):
    """Eq. 12: osc(h), largest minus smallest h_y among the classes that occur in either domain; a float below log K."""
    present = hub[(share_s + share_t) > 0]
    return (present.max() - present.min()).item()


def hub_bound(risk_s, radius_s, radius_t, slope, lipschitz, osc, tv):
    """Eq. 12: R_S + g A_S + L A_T + osc(h) TV(pi_S, pi_T)."""
    return risk_s + slope * radius_s + lipschitz * radius_t + osc * tv


def direct_bound(share_t, hub, lipschitz, radius_t):
    """Eq. 13: sum over the classes of T of pi_T(y) (h_y + L_y A~_T(y)); all arguments (K,), radius_t along the span."""
    present = share_t > 0  # the radius of a class that does not occur is nan, and takes no part
    return (share_t * (hub + lipschitz * radius_t))[present].sum().item()


def holds(left, right):
    """left <= right, up to the rounding of float32 sums."""
    return left <= right + 1e-5 * max(1.0, abs(right))


def rank_correlation(a, b):
    """Spearman's rank correlation of two lists (ties share their mean rank): does the bound order the risks?"""

    def ranks(values):
        values = torch.as_tensor(values, dtype=torch.float64)
        return (values[:, None] > values).sum(1).double() + ((values[:, None] == values).sum(1) - 1) / 2

    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm())).item()


# ------------------------------------------------------------------------------------------- the pixels of a domain


@torch.no_grad()
def measure(run, items, limit=IMAGES, weights=False):
    """The labelled pixels (cells) of a domain -> {name: (N,) float64}, N pixels of `limit` images, evenly spaced (0: all).

    mass     what each pixel counts: 1, until domains are mixed
    weight   learning weight of Eq. 6 with the ramp at 1, in batches of the run's own size; 1 without `weights`
    """
    config, module = run.config, run.ppar
    otp, basis = module.otp, span_basis(module.otp.cpu()).to(module.otp.device)
    rows, batch = [], []
    for item in data.evenly(items, limit or len(items)):
        image, label = data.load_pair(item, config.mapillary)
        out, _, grid = ppar.look(module, data.to_tensor(image).to(otp.device), torch.from_numpy(label).to(otp.device))
        valid = grid[0] != VOID
        z, y = out.emb[0].permute(1, 2, 0)[valid].float(), grid[0][valid]  # (N, D), (N,)
        row = dict(pixel_terms(z, y, otp, config.tau, basis), label=y, mass=torch.ones_like(y), weight=torch.ones_like(y))
        if out.vtp is not None:
            own = dict(radius_vtp=ppar.distance(out.emb, grid, out.vtp)[0][valid], gap=(out.vtp[0] - otp).norm(dim=1)[y])
            row.update(own)
        rows.append({name: value.double().cpu() for name, value in row.items()})
        batch.append((ppar.reliability(out, otp, grid, config.tau)[0][valid], y))
        if weights and (len(batch) == config.batch or len(rows) == min(limit or len(items), len(items))):
            for row, weight in zip(rows[-len(batch):], _batch_weights(batch, config)):
                row["weight"] = weight.double().cpu()
            batch = []
    domain = {name: torch.cat([row[name] for row in rows]) for name in rows[0]} | dict(images=sum(len(row["label"]) > 0 for row in rows))
    if not len(domain["label"]):
        raise UserError(f"{items[0].dataset}: none of the {len(rows)} images read has a labelled pixel; check the labels.")
    domain["label"] = domain["label"].long()
    return domain


def pixel_terms(z, y, otp, tau, basis):
    """What the theorem asks of each pixel: z (N, D), y (N,) without void -> {name: (N,)}."""
    along = ((z - otp[y]) @ basis).norm(dim=1)  # the part of |z - p_y| that the loss can see
    return dict(risk=score_loss(z, y, otp, tau), radius_otp=(z - otp[y]).norm(dim=1), radius_span=along,
                climb=local_slope(z, y, otp, tau) * along, error=((z @ otp.T).argmax(dim=1) != y).float())


def _batch_weights(batch, config):
    """Eq. 6 over a batch of [(omega (N,), label (N,))] -> its weights; images with fewer pixels are padded with void."""
    longest = max(len(y) for _, y in batch)
    omega = torch.stack([F.pad(omega, (0, longest - len(y))) for omega, y in batch])[:, None]  # (B, 1, longest)
    label = torch.stack([F.pad(y, (0, longest - len(y)), value=VOID) for _, y in batch])[:, None]
    weight = ppar.weights_of(omega, label, config, ramp=1.0)[:, 0]
    return [w[:len(y)] for w, (_, y) in zip(weight, batch)]


def mixture(domains):
    """Several sources as training sees them: every source has the same say, whatever its number of pixels."""
    total = sum(len(d["label"]) for d in domains)
    for d in domains:
        d["mass"] = d["mass"] * total / (len(domains) * len(d["label"]))
    return {name: sum(d[name] for d in domains) if name == "images" else torch.cat([d[name] for d in domains])
            for name in domains[0]}


def mean(domain, name, weighted=False):
    """E[name] over the labelled pixels of a domain, or of its weighted version S_w."""
    mass = domain["mass"] * (domain["weight"] if weighted else 1)
    return ((mass * domain[name]).sum() / mass.sum()).item()


def by_class(domain, values, num_classes):
    """Sum of values (N,) within each class, (K,)."""
    return torch.zeros(num_classes, dtype=torch.float64).index_add_(0, domain["label"], values)


def shares(domain, num_classes, weighted=False):
    """pi(y), (K,), sum 1: the share of each class among the labelled pixels."""
    total = by_class(domain, domain["mass"] * (domain["weight"] if weighted else 1), num_classes)
    return total / total.sum()


# -------------------------------------------------------------------------------------- the theorem for every domain


def describe(source, domain, otp, tau):
    """One row of bound.json: the terms of `domain` and the right sides, with `source` as the S of Eq. 12.

    slope_measured is what Eq. 10's L would have to be for this domain, on average: L over it is the looseness.
    """
    hub, lipschitz, K = hub_loss(otp, tau).double(), lipschitz_per_class(otp, tau).double(), len(otp)
    share_s, share_t = shares(source, K), shares(domain, K)
    radius = by_class(domain, domain["mass"] * domain["radius_span"], K) / by_class(domain, domain["mass"], K)
    constants = hub_slope(otp, tau).max().item(), lipschitz.max().item()
    arrived = (share_t * hub).sum().item()  # H_T: the risk if every pixel stood on its prototype
    names = ("risk", "error", "radius_otp", "radius_vtp", "gap", "radius_span")
    row = dict(images=domain["images"], pixels=len(domain["label"]),
               **{name: mean(domain, name) if name in domain else None for name in names},
               slope=constants[0], lipschitz=constants[1], osc=oscillation(hub, share_s, share_t),
               tv=total_variation(share_s, share_t), ceiling=loss_ceiling(otp, tau))
    mass = domain["mass"] * domain["weight"]
    row["n_eff"] = (mass.sum() ** 2 / (mass ** 2).sum()).item()
    row["left"] = row["risk"]
    row["right"] = hub_bound(mean(source, "risk"), mean(source, "radius_otp"), row["radius_otp"], *constants, row["osc"], row["tv"])
    row["right_direct"] = direct_bound(share_t, hub, lipschitz, radius)
    row["right_local"] = arrived + mean(domain, "climb")
    row["vacuous"] = row["right"] > row["ceiling"]
    row["slope_measured"] = (row["risk"] - arrived) / max(row["radius_otp"], 1e-12)
    checks = {"eq_12": holds(row["left"], row["right"]), "eq_13": holds(row["left"], row["right_direct"]),
              "eq_13_below_12": holds(row["right_direct"], row["right"]),
              "eq_25": holds(row["left"], row["right_local"]) and holds(row["right_local"], row["right_direct"])}
    if (source["weight"] != 1).any():  # the weighted source is one more distribution, hence one more valid right side
        share_w = shares(source, K, weighted=True)
        row["right_weighted"] = hub_bound(mean(source, "risk", True), mean(source, "radius_otp", True), row["radius_otp"], *constants,
                                          oscillation(hub, share_w, share_t), total_variation(share_w, share_t))
        checks["eq_12_weighted"] = holds(row["left"], row["right_weighted"])
    if (domain["weight"] != 1).any():
        row.update(risk_weighted=mean(domain, "risk", True), radius_weighted=mean(domain, "radius_otp", True),
                   share_shift=total_variation(share_t, shares(domain, K, weighted=True)))  # 0 with means per class
    if row["gap"] is not None:
        checks["eq_16"] = holds(row["radius_otp"], row["radius_vtp"] + row["gap"])
    return dict(row, holds=all(checks.values()), checks=checks)


def measure_run(run, limit=IMAGES):
    """Measure a checkpoint.Run on its source and on every target; print, draw and store the terms -> the report (a dict).

    The source S is the training split as it lies on the disk, wrong labels included: whole images, no augmentation.
    Where the source has a held-out split it gets a row of its own, which shows what no transport between domains
    explains: the difference between images that were learnt and images that were not.
    """
    config, notes = run.config, []

    def sources(split, harmful):
        lists = [data.list_items(name, config.data_root, split, config.holdout, harmful) for name in config.source]
        return mixture([measure(run, items, limit, split == "train" and config.reweight != "none") for items in lists])

    print(f"Measuring the bound of {run.path}; targets are read here for analysis only, after training.")
    domains = {"source": sources("train", config.harmful)}
    try:
        domains["source held out"] = sources("val", 0.0)
    except UserError as error:
        notes.append(f"no held-out source row: {error}")
    for name, items in find_targets(config).items():
        domains[name] = measure(run, items, limit)
    otp, tau = run.ppar.otp.cpu().float(), config.tau
    rows = {name: describe(domains["source"], domain, otp, tau) for name, domain in domains.items()}
    report = dict(about="terms of theory.md; targets read for analysis only", run=str(run.path), step=run.step,
                  source=list(config.source), method=config.method, seed=config.seed, tau=tau, limit=limit, notes=notes, domains=rows)
    checkpoint.write_json(run.path / "bound.json", report)
    print_bound(report)
    draw_bound(report, run.path / "bound.png")
    print(f"Written: {run.path / 'bound.json'} and {run.path / 'bound.png'}")
    return report


def print_bound(report):
    """The report as a table for the terminal."""
    rows = report["domains"]
    first = next(iter(rows.values()))
    print(f"\ntau {report['tau']}   slope anywhere L {first['lipschitz']:.2f}   "
          f"slope at the prototypes g {first['slope']:.2f}   largest loss possible {first['ceiling']:.2f}")
    print(f"{'domain':17s} images left=R error   A^O   A^V     G   osc    TV n_eff/n  local direct  right  holds")
    for name, r in rows.items():
        verdict = ("yes" if r["holds"] else "NO: a bug") + (", vacuous" if r["vacuous"] else "")
        near, gap = (f"{r[key]:5.3f}" if r[key] is not None else f"{'-':>5s}" for key in ("radius_vtp", "gap"))
        print(f"{name:17s} {r['images']:6d} {r['risk']:6.3f} {r['error']:5.3f} {r['radius_otp']:5.3f} {near} {gap} "
              f"{r['osc']:5.2f} {r['tv']:5.3f} {r['n_eff'] / r['pixels']:7.3f} {r['right_local']:6.2f} {r['right_direct']:6.2f} "
              f"{r['right']:6.2f}  {verdict}")
    print("right = R_S + g A_S + L A^O + osc TV (Eq. 12), direct: Eq. 13, local: Eq. 25; "
          "vacuous: right is above the largest loss possible")
    source = rows["source"]
    if "radius_weighted" in source:
        print(f"learning weights (Eq. 18): radius {source['radius_otp']:.3f} -> {source['radius_weighted']:.3f}, "
              f"risk {source['risk']:.3f} -> {source['risk_weighted']:.3f}, "
              f"class shares moved by {source['share_shift']:.4f}")
    targets = [r for name, r in rows.items() if not name.startswith("source") and name not in report["source"]]
    if len(targets) > 2:
        for key in ("right", "right_direct"):
            rho = rank_correlation([r[key] for r in targets], [r["left"] for r in targets])
            print(f"rank correlation of {key} with the risk over the {len(targets)} targets: {rho:+.2f}")
    for note in report["notes"]:
        print(note)


def draw_bound(report, file):
    """Left: what the right side is made of, beside the risk that it holds down. Right: the two legs of Eq. 16."""
    from matplotlib.figure import Figure  # here: a second of import; no pyplot, hence no window and no global state

    rows, source = report["domains"], report["domains"]["source"]
    names = list(rows)
    place = range(len(names))
    figure = Figure(figsize=(13, 2.2 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    start = [0.0] * len(names)
    pieces = [("risk of the source", lambda r: source["risk"]),
              ("slope g x radius of the source", lambda r: r["slope"] * source["radius_otp"]),
              ("slope L x radius of this domain", lambda r: r["lipschitz"] * r["radius_otp"]),
              ("class shares: osc x TV", lambda r: r["osc"] * r["tv"])]
    for (title, piece), color in zip(pieces, ("#4477aa", "#66ccee", "#ccbb44", "#aa3377")):
        size = [piece(rows[name]) for name in names]
        left.barh(place, size, left=start, label=title, color=color)
        start = [a + b for a, b in zip(start, size)]
    left.plot([rows[n]["left"] for n in names], place, "k|", markersize=18, markeredgewidth=3, label="risk (left side)")
    left.plot([rows[n]["right_direct"] for n in names], place, "kx", label="direct bound (Eq. 13)")
    left.plot([rows[n]["right_local"] for n in names], place, "k.", label="with local slopes (Eq. 25)")
    left.axvline(source["ceiling"], color="grey", linestyle=":", label="largest loss possible")
    left.set(yticks=place, yticklabels=names, xlabel="nats", title="Eq. 12: what the right side is made of")
    left.invert_yaxis()
    if source["gap"] is not None:
        near = [rows[n]["radius_vtp"] for n in names]
        right.barh(place, near, label="pixel to VTP", color="#228833")
        right.barh(place, [rows[n]["gap"] for n in names], left=near, label="VTP to OTP", color="#bbcc33")
    far = [rows[n]["radius_otp"] for n in names]
    right.plot(far, place, "k|", markersize=18, markeredgewidth=3, label="pixel to OTP")
    right.plot([rows[n]["radius_span"] for n in names], place, "kx", label="the part of it that the loss sees (Eq. 11)")
    right.set(xlabel="distance", title="Eq. 16: two legs, and the straight way")
    for axis in (left, right):
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2, frameon=False, markerscale=0.5)
    checkpoint.write_atomically(file, lambda part: figure.savefig(part, dpi=110, format="png"))


def _demo():
    """Drawn domains around the same prototypes; the last class occurs in the targets alone."""
    generator = torch.Generator().manual_seed(0)
    otp, tau = F.normalize(torch.randn(6, 32, generator=generator), dim=1), 0.2

    def draw(noise, classes, n=2000):
        label = torch.randint(0, classes, (n,), generator=generator)
        emb = F.normalize(otp[label] + noise * torch.randn(n, 32, generator=generator), dim=1)
        terms = {name: value.double() for name, value in pixel_terms(emb, label, otp, tau, span_basis(otp)).items()}
        return dict(terms, label=label, mass=torch.ones(n).double(), weight=torch.ones(n).double(), images=1)

    source = draw(0.1, 5)
    for noise in (0.1, 0.2, 0.4):
        row = describe(source, draw(noise, 6), otp, tau)
        print(f"target noise {noise:.1f}   risk {row['left']:6.3f}   local slopes {row['right_local']:6.2f}   "
              f"direct bound {row['right_direct']:6.2f}   hub bound {row['right']:6.2f}")
        assert row["holds"], "the inequalities hold for any two sets of pixels"


def main(args):
    """Measure a finished run; without arguments, the demonstration."""
    if args == parse([]):
        return _demo()
    with checkpoint.one_sentence(args.run):
        measure_run(checkpoint.open_run(args))


if __name__ == "__main__":
    main(ARGS)
