"""bound.py: every term of the theorem as a number, for any finished run.

theory.md proves that the risk of the text score on a domain that was never seen is held down by a handful of
quantities: how far pixels stand from the prototype of their class (A), how steep the loss can be (L), how differently
the classes are shared out (TV). Here each of them is a pure function of plain tensors, and `measure_run` computes all
of them on the source and on every target of a run, in constant memory, and checks the inequalities on the data.

    Eq. 8   l(z, y) = log sum_c exp(<z, p_c - p_y> / tau)          risk R = mean of l over labelled pixels
    Eq. 9   L_y = max_c |p_c - p_y| / tau,  L = max_y L_y          no steeper anywhere; exact
    Eq. 10  -g_y |z - p_y| <= l(z, y) - h_y <= L_y |z - p_y|       h_y = l(p_y, y), g_y = |grad l(p_y, y)|
    Eq. 12  R_T <= R_S + g A_S + L A_T + osc(h) TV(pi_S, pi_T)     the hub: both domains meet at the prototypes
    Eq. 13  R_T <= sum_y pi_T(y) (h_y + L_y A~_T(y))               never larger, but does not mention the source
    Eq. 25  R_T <= H_T + E[|grad l(z, y)| |z - p_y|~]              the same with the slope where each pixel stands
    Eq. 16  A^O <= A^V + G                                         two legs: pixel to VTP, VTP to OTP
    Eq. 18  A_{S_w} - A_S = covariance of w and |z - p_y| within the classes     what the learning weights gain
    Eq. 22  n_eff = (sum w)^2 / sum w^2                                          and what they cost

Eq. 12 and 13 hold for any two domains, hence also for two finite sets of pixels: a `no` in the column `holds` is a bug
and not a discovery. What the numbers tell is which term is large, which one a method moves, and how much is slack.

Shapes (one image, or any list of pixels)
    emb         (N, D)   unit rows: dense embeddings
    label       (N,)     0 .. K-1, 255 = void, which takes no part in anything
    prototypes  (K, D)   unit rows: OTP, or the VTP of the image that the pixels come from
    weight      (N,)     learning weights, or None for 1

Targets are read here for analysis only: nothing that is measured here flows back into training or selection.
Not here: the proofs (theory.md), the losses that move the terms (align.py, reweight.py), mIoU (evaluate.py).
Run `python bound.py` for a demonstration in seconds; `python evaluate.py --bound RUN` measures a run.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

VOID = 255  # the label of pixels that no class is asked of, in every data set of the field
DELTA = 0.05  # the bound on a population holds with probability 1 - DELTA over the draw of the source images


# ----------------------------------------------------------------------------------- the loss and its three constants


def score_loss(emb, label, prototypes, tau):
    """Eq. 8: cross-entropy of the cosines over the prototypes, (N,), 0 on void: what Eq. 3 takes the mean of."""
    return F.cross_entropy(emb @ prototypes.T / tau, label, ignore_index=VOID, reduction="none")


def lipschitz_per_class(prototypes, tau):
    """Eq. 9: L_y = max_c |p_c - p_y| / tau, (K,).

    The gradient of l in z is (sum_c q_c p_c - p_y) / tau with q a softmax: a point of the simplex spanned by the
    differences p_c - p_y, and a norm is largest at a corner.
    """
    return torch.cdist(prototypes, prototypes, compute_mode="donot_use_mm_for_euclid_dist").amax(dim=1) / tau


def lipschitz_constant(prototypes, tau):
    """Eq. 9: the largest slope of the loss over all classes and all z, a float: the prototypes' diameter over tau."""
    return lipschitz_per_class(prototypes, tau).max().item()


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


# ------------------------------------------------------------------------------------------ terms of one set of pixels


def distance(emb, label, prototypes):
    """|z_i - p_{y_i}| at every pixel, (N,), 0 on void."""
    valid = label != VOID
    own = prototypes[label.where(valid, torch.zeros_like(label))]
    return (emb - own).norm(dim=-1) * valid


def labelled_mean(value, label, weight=None):
    """Weighted mean of value (N,) over the labelled pixels; without any, the domain has no distribution."""
    weight = (label != VOID).to(value.dtype) * (1.0 if weight is None else weight)
    total = weight.sum()
    if not total > 0:
        raise ValueError("no labelled pixel carries weight: risk and radius of such a domain are not defined")
    return ((weight * value).sum() / total).item()


def risk(emb, label, prototypes, tau, weight=None):
    """Eq. 8: R = E[l(z, y)], a float; with a weight, the risk of the weighted source S_w."""
    return labelled_mean(score_loss(emb, label, prototypes, tau), label, weight)


def alignment_radius(emb, label, prototypes, weight=None):
    """A = E|z - p_y|, a float in [0, 2]: how far pixels stand from the prototype of their own class."""
    return labelled_mean(distance(emb, label, prototypes), label, weight)


def prototype_gap(label, vtp, otp, weight=None):
    """Eq. 16: G = E|p^V_y - p^O_y|, a float: the second leg, from the image's prototype (K, D) to the text's."""
    return labelled_mean(distance(vtp[label.where(label != VOID, torch.zeros_like(label))], label, otp), label, weight)


def class_shares(label, num_classes, weight=None):
    """pi(y), (K,), sum 1: the share of each class among the labelled pixels."""
    weight = (label != VOID).double() * (1.0 if weight is None else weight)
    share = torch.zeros(num_classes, dtype=torch.float64, device=label.device)
    share.index_add_(0, label.where(label != VOID, torch.zeros_like(label)), weight)
    return share / share.sum()


def total_variation(share_s, share_t):
    """TV(pi_S, pi_T) = half the sum of |pi_S(y) - pi_T(y)|, a float in [0, 1]."""
    return 0.5 * (share_s - share_t).abs().sum().item()


def oscillation(hub, share_s, share_t):
    """Eq. 12: osc(h), largest minus smallest h_y among the classes that occur in either domain; a float below log K."""
    present = hub[(share_s + share_t) > 0]
    return (present.max() - present.min()).item()


def share_ratio(share_s, share_t):
    """Eq. 21: rho = max_y pi_T(y) / pi_S(y) over the classes of T; inf if the source lacks one of them."""
    return (share_t / share_s)[share_t > 0].max().item()


def effective_sample_size(weight):
    """Eq. 22: n_eff = (sum w)^2 / sum w^2, a float: as many equally weighted, independent draws vary as much."""
    weight = weight.double()
    return (weight.sum() ** 2 / (weight ** 2).sum()).item()


def concentration(spread, n, delta=DELTA):
    """Eq. 23: Hoeffding's term spread * sqrt(log(1 / delta) / (2 n)), a float.

    n counts images: the pixels of one image are not independent, and a million of them may know no more than one.
    """
    return spread * math.sqrt(math.log(1 / delta) / (2 * n))


# ------------------------------------------------------------------------------------------------------- right sides


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


# ----------------------------------------------------------------------------------- one domain, in constant memory


class Domain:
    """Running sums over the pixels of a domain, per class, in float64; nothing grows with the number of images."""

    def __init__(self, num_classes, dim):
        self.num_classes = num_classes
        self.images = 0
        self.total = {}  # name -> (K,) sum over labelled pixels; `count` counts them, `weight` sums their weights
        self.emb = torch.zeros(num_classes, dim, dtype=torch.float64)
        self.per_image = torch.zeros(3, dtype=torch.float64)  # labelled pixels: sum, sum of squares, most possible

    def add(self, label, terms):
        """label (N,) without void; terms: name -> (N,)."""
        for name, value in terms.items():
            total = self.total.setdefault(name, torch.zeros(self.num_classes, dtype=torch.float64))
            total.index_add_(0, label.cpu(), value.double().cpu())

    def add_image(self, labelled, cells):
        self.images += 1
        self.per_image += torch.tensor([labelled, labelled ** 2, 0.0], dtype=torch.float64)
        self.per_image[2] = max(self.per_image[2].item(), cells)

    def __contains__(self, name):
        return name in self.total

    @property
    def shares(self):
        return self.total["count"] / self.total["count"].sum()

    def mean(self, name):
        """E[name] over all labelled pixels, a float."""
        return (self.total[name].sum() / self.total["count"].sum()).item()

    def class_mean(self, name):
        """E[name | y], (K,), nan for a class without pixels."""
        return self.total[name] / self.total["count"]

    @staticmethod
    def mixture(domains):
        """Several sources as training sees them: every source has the same say, whatever its number of pixels."""
        if len(domains) == 1:
            return domains[0]
        out = Domain(domains[0].num_classes, domains[0].emb.shape[1])
        pixels = [d.total["count"].sum() for d in domains]
        for d, n in zip(domains, pixels):
            c = sum(pixels) / (len(domains) * n)
            out.images += d.images
            out.emb += c * d.emb
            out.per_image[0] += c * d.per_image[0]
            out.per_image[1] += c ** 2 * d.per_image[1]
            out.per_image[2] = max(out.per_image[2].item(), (c * d.per_image[2]).item())
            for name, total in d.total.items():
                power = 2 if name == "square" else 1  # the sum of squared weights, for n_eff
                out.total[name] = out.total.get(name, 0) + c ** power * total
            # Every pixel now weighs c, with or without learning weights; n_eff has to know.
            if "weight" not in d.total:
                out.total["square"] = out.total.get("square", 0) + c ** 2 * d.total["count"]
        return out


def labels_on_grid(label, h, w):
    """The label at the centre of each cell: (H, W) -> (h, w). The pixels of the theorem are the cells of Eq. 3."""
    row = ((torch.arange(h, device=label.device) + 0.5) * label.shape[0] / h).long()
    col = ((torch.arange(w, device=label.device) + 0.5) * label.shape[1] / w).long()
    return label[row[:, None], col]


@torch.no_grad()
def measure(run, items, limit=0, device="cpu", weights=False):
    """Stream the images of one domain through the network of `run` and return the sums as a Domain.

    run      evaluate.load_run's result: .net .vtp (or None) .otp .config
    items    list from data.list_items; of them `limit` (0 = all), evenly spaced so that no part of the list is favoured
    weights  also sum under the learning weights of Eq. 6 with the ramp at 1, in batches of the run's own size
    """
    import data  # here, so that the functions above need torch alone

    if limit and len(items) > limit:
        items = [items[(i * len(items)) // limit] for i in range(limit)]
    config, otp = run.config, run.otp.to(device).float()
    basis, tau = span_basis(otp.cpu()).to(device), config["tau"]
    num_classes, dim = otp.shape
    domain, batch = Domain(num_classes, dim), []
    run.net.to(device).eval()
    if run.vtp is not None:
        run.vtp.to(device).eval()
    for number, item in enumerate(items):
        image = data.to_tensor(data.load_image(item)).to(device)
        label = torch.as_tensor(data.load_label(item, config.get("mapillary", "A"))).long().to(device)
        image, label = _pad(image, label, getattr(getattr(run.net, "encoder", None), "multiple", 32))
        _, emb, pooled = run.net(image[None])
        grid = labels_on_grid(label, *emb.shape[2:]).flatten()
        pixel = emb[0].flatten(1).T.float()  # (N, D)
        near = None if run.vtp is None else run.vtp(otp, emb, pooled)[0]  # (K, D)
        valid = grid != VOID
        if valid.any():
            y, z = grid[valid], pixel[valid]
            terms = _pixel_terms(z, y, otp, near, tau, basis)
            domain.add(y, dict(terms, count=torch.ones_like(y)))
            domain.emb.index_add_(0, y.cpu(), z.double().cpu())
            domain.add_image(len(y), len(grid))
            if weights:
                batch.append((y, terms, _reliability(emb, grid, otp, near, config)[valid]))
        if batch and (len(batch) == max(1, config.get("batch", 1)) or number == len(items) - 1):
            _add_weighted(domain, batch, config)
            batch = []
    if not domain.images:
        raise data.DataError(f"{items[0].dataset}: none of the {len(items)} images read has a labelled pixel; raise "
                             f"the limit or check the labels.")
    return domain


def _pixel_terms(z, y, otp, near, tau, basis):
    """Everything that the theorem asks of a pixel: z (N, D), y (N,) without void -> name: (N,)."""
    loss = score_loss(z, y, otp, tau)
    along = basis.T @ (z - otp[y]).T  # (r, N): the part of z - p_y that the loss can see
    along = along.norm(dim=0)
    terms = dict(risk=loss, radius_otp=distance(z, y, otp), radius_span=along,
                 climb=local_slope(z, y, otp, tau) * along, error=((z @ otp.T).argmax(dim=1) != y).float())
    if near is not None:
        gap = (near - otp).norm(dim=1)  # (K,)
        terms.update(risk_vtp=score_loss(z, y, near, tau), radius_vtp=distance(z, y, near), gap=gap[y],
                     gap_max=gap.max().expand(len(y)))
    return terms


def _reliability(emb, grid, otp, near, config):
    """Eq. 5 at the pixels of one image, (N,): OTP and VTP together, as in training."""
    import reweight

    label = grid.view(1, *emb.shape[2:])
    sets = [otp] if near is None else [otp, near[None]]
    rel = sum(reweight.reliability(emb, label, prototypes, config["tau_w"]) for prototypes in sets) / len(sets)
    return rel.flatten()


def _add_weighted(domain, batch, config):
    """Eq. 6 over a batch, by the function that training uses; images of different sizes are padded with void."""
    import reweight

    longest = max(len(y) for y, _, _ in batch)
    label = torch.stack([F.pad(y, (0, longest - len(y)), value=VOID) for y, _, _ in batch])[:, None]  # (B, 1, N)
    rel = torch.stack([F.pad(r, (0, longest - len(r))) for _, _, r in batch])[:, None]
    if config.get("reweight", "none") == "image":
        rel = reweight.image_reliability(rel, label)
    weight = reweight.learning_weights(rel, label, 1.0, config["w_min"], config.get("reweight_per_class", True))
    for (y, terms, _), w in zip(batch, weight[:, 0]):
        w = w[:len(y)]
        domain.add(y, dict(weight=w, square=w ** 2, risk_w=w * terms["risk"], radius_w=w * terms["radius_otp"]))


def _pad(image, label, multiple):
    """Grow an image to the multiple that CLIP's strides need; what is added is void, hence in no mean."""
    if label.shape != image.shape[1:]:  # some data sets label at another size than they photograph
        label = F.interpolate(label[None, None].float(), size=image.shape[1:], mode="nearest-exact")[0, 0].long()
    bottom, right = -image.shape[1] % multiple, -image.shape[2] % multiple
    image = F.pad(image[None], (0, right, 0, bottom), mode="replicate")[0]
    return image, F.pad(label, (0, right, 0, bottom), value=VOID)


# -------------------------------------------------------------------------------------- the theorem for every domain


def describe(source, domain, otp, tau):
    """One row of bound.json: the terms of `domain` and the right sides, with `source` as the S of Eq. 12.

    slope_measured is what Eq. 10's L would have to be for this domain, on average: L over it is the looseness.
    """
    hub, lipschitz = hub_loss(otp, tau).double().cpu(), lipschitz_per_class(otp, tau).double().cpu()
    slope = hub_slope(otp, tau).max().item()
    share_s, share_t = source.shares, domain.shares
    osc, tv = oscillation(hub, share_s, share_t), total_variation(share_s, share_t)
    risk_s, radius_s = source.mean("risk"), source.mean("radius_otp")
    row = dict(images=domain.images, pixels=int(domain.total["count"].sum()), risk=domain.mean("risk"),
               error=domain.mean("error"), radius_otp=domain.mean("radius_otp"), radius_vtp=None, gap=None,
               radius_span=domain.mean("radius_span"), lipschitz=lipschitz.max().item(), slope=slope, osc=osc, tv=tv)
    if "gap" in domain:
        row.update({name: domain.mean(name) for name in ("radius_vtp", "gap", "gap_max", "risk_vtp")})
    row.update(_sample_size(domain))
    row["left"] = row["risk"]
    row["right"] = hub_bound(risk_s, radius_s, row["radius_otp"], slope, row["lipschitz"], osc, tv)
    row["right_direct"] = direct_bound(share_t, hub, lipschitz, domain.class_mean("radius_span"))
    row["right_local"] = (share_t * hub).sum().item() + domain.mean("climb")
    row["ceiling"] = loss_ceiling(otp, tau)
    row["vacuous"] = row["right"] > row["ceiling"]
    row["slope_measured"] = (row["risk"] - (share_t * hub).sum().item()) / max(row["radius_otp"], 1e-12)
    row["reach_low"], row["reach_high"] = transport_bracket(source, domain, lipschitz)
    ratio = share_ratio(share_s, share_t)
    row["share_ratio"] = ratio if math.isfinite(ratio) else None
    checks = {"eq_12": holds(row["left"], row["right"]), "eq_13": holds(row["left"], row["right_direct"]),
              "eq_13_below_12": holds(row["right_direct"], row["right"]),
              "eq_15": holds(row["reach_low"], row["reach_high"]),
              "eq_25": holds(row["left"], row["right_local"]) and holds(row["right_local"], row["right_direct"])}
    if "weight" in source:  # the weighted source is one more distribution, hence one more valid right side
        weighted = source.total["weight"] / source.total["weight"].sum()
        s = _sample_size(source)
        row["right_weighted"] = hub_bound(s["risk_weighted"], s["radius_weighted"], row["radius_otp"], slope,
                                          row["lipschitz"], oscillation(hub, weighted, share_t),
                                          total_variation(weighted, share_t))
        checks["eq_12_weighted"] = holds(row["left"], row["right_weighted"])
    if row["gap"] is not None:
        checks["eq_16"] = holds(row["radius_otp"], row["radius_vtp"] + row["gap"])
        checks["eq_17"] = holds(row["risk"], row["risk_vtp"] + (row["gap"] + row["gap_max"]) / tau)
    return dict(row, holds=all(checks.values()), checks=checks)


def transport_bracket(source, domain, lipschitz):
    """Eq. 15: two numbers with the reach, sum_y pi_T(y) W_1(T_y, S_y), between them; no transport problem is solved.

    From below by what any 1-Lipschitz function tells apart (the distance to p_y, the loss over L_y, the mean), from
    above by moving every pixel to its prototype and on from there. For a class that the source does not have, the
    prototype itself stands in as a source of one point.
    """
    share, seen = domain.shares, source.shares > 0
    radius_t = domain.class_mean("radius_otp")
    radius_s = source.class_mean("radius_otp").where(seen, torch.zeros_like(share))
    mean_t, mean_s = (d.emb / d.total["count"][:, None] for d in (domain, source))
    low = torch.stack([(radius_t - radius_s).abs(), (mean_t - mean_s).norm(dim=1),
                       (domain.class_mean("risk") - source.class_mean("risk")).abs() / lipschitz]).amax(dim=0)
    low = low.where(seen, radius_t)
    present = share > 0
    return (share * low)[present].sum().item(), (share * (radius_t + radius_s))[present].sum().item()


def _sample_size(domain):
    """Eq. 22 and 23: n_eff over pixels (weighted, where weights were summed), and what images alone allow."""
    pixels = domain.total["count"].sum()
    n_eff = (domain.total["weight" if "weight" in domain else "count"].sum() ** 2 / domain.total["square"].sum()
             if "square" in domain else pixels)
    total, square, largest = domain.per_image.tolist()
    out = dict(n_eff=float(n_eff), n_eff_images=total ** 2 / square,
               n_hoeffding=total ** 2 / (domain.images * largest ** 2))
    if "weight" in domain:
        weight = domain.total["weight"].sum()
        out["risk_weighted"] = (domain.total["risk_w"].sum() / weight).item()
        out["radius_weighted"] = (domain.total["radius_w"].sum() / weight).item()
        out["share_shift"] = total_variation(domain.shares, domain.total["weight"] / weight)  # 0 with means per class
    return out


def measure_run(run, data_root=None, limit=200, device="cpu"):
    """Measure a run on its source and on every target; print, draw and store the terms; returns the report (a dict).

    run        run folder, or what evaluate.load_run made of it
    data_root  overrides the place of the data sets that the run remembers
    limit      images per domain, evenly spaced (0 = all): the theorem is then about the images that were read

    The source S is the training split as it lies on the disk, wrong labels included: whole images, no augmentation.
    Where the source has a held-out split it gets a row of its own, which shows what no transport between domains
    explains: the difference between images that were learnt and images that were not.
    """
    import data

    if isinstance(run, (str, Path)):
        from evaluate import load_run  # evaluate.py imports this file only when asked for the bound

        run = load_run(run, device)
    config = run.config
    root = data_root or config.get("data_root")
    weights = config.get("reweight", "none") != "none"

    def sources(split, **more):
        lists = [data.list_items(name, root, split, holdout=config.get("holdout", 0), **more)
                 for name in config["source"]]
        return Domain.mixture([measure(run, items, limit, device, weights and split == "train") for items in lists])

    print(f"Measuring the bound of {run.path}; targets are read here for analysis only, after training.")
    domains = {"source": sources("train", harmful=config.get("harmful", 0.0))}
    notes = []
    try:
        domains["source held out"] = sources("val")
    except data.DataError as error:
        notes.append(f"no held-out source row: {error}")
    for name in config["targets"]:
        items = data.list_items(name, root, "val", holdout=config.get("holdout", 0))
        domains[name] = measure(run, items, limit, device)

    otp, tau = run.otp.cpu().float(), config["tau"]
    rows = {name: describe(domains["source"], domain, otp, tau) for name, domain in domains.items()}
    held_out = rows.get("source held out")
    if held_out:  # Eq. 23: to be added to `right`, for all targets at once, because it speaks of the source alone
        spread = 2 * (held_out["lipschitz"] + held_out["slope"])
        held_out["concentration"] = concentration(spread, held_out["n_hoeffding"])
    report = dict(about="terms of theory.md; targets read for analysis only", run=str(run.path), step=run.step,
                  source=config["source"], method=config.get("method"), seed=config.get("seed"), tau=tau, limit=limit,
                  delta=DELTA, notes=notes, domains=rows)
    folder = Path(run.path)
    folder = folder if folder.is_dir() else folder.parent
    (folder / "bound.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print_bound(report)
    draw_bound(report, folder / "bound.png")
    print(f"Written: {folder / 'bound.json'} and {folder / 'bound.png'}")
    return report


def print_bound(report):
    """The report as a table for the terminal."""
    rows = report["domains"]
    first = next(iter(rows.values()))
    print(f"\ntau {report['tau']}   slope anywhere L {first['lipschitz']:.2f}   "
          f"slope at the prototypes g {first['slope']:.2f}   largest loss possible {first['ceiling']:.2f}")
    print(f"{'domain':17s} images left=R error   A^O   A^V     G   osc    TV n_eff/n   reach in     local direct "
          f" right  holds")
    for name, r in rows.items():
        verdict = ("yes" if r["holds"] else "NO: a bug") + (", vacuous" if r["vacuous"] else "")
        near, gap = (f"{r[key]:5.3f}" if r[key] is not None else f"{'-':>5s}" for key in ("radius_vtp", "gap"))
        print(f"{name:17s} {r['images']:6d} {r['risk']:6.3f} {r['error']:5.3f} {r['radius_otp']:5.3f} {near} {gap} "
              f"{r['osc']:5.2f} {r['tv']:5.3f} {r['n_eff'] / r['pixels']:7.3f} "
              f"[{r['reach_low']:.2f}, {r['reach_high']:.2f}] {r['right_local']:6.2f} {r['right_direct']:6.2f} "
              f"{r['right']:6.2f}  {verdict}")
    print("right = R_S + g A_S + L A^O + osc TV (Eq. 12), direct: Eq. 13, local: Eq. 25; "
          "vacuous: right is above the largest loss possible")
    source = rows["source"]
    if "radius_weighted" in source:
        print(f"learning weights (Eq. 18): radius {source['radius_otp']:.3f} -> {source['radius_weighted']:.3f}, "
              f"risk {source['risk']:.3f} -> {source['risk_weighted']:.3f}, "
              f"class shares moved by {source['share_shift']:.4f}")
    if "concentration" in rows.get("source held out", {}):
        print(f"from these source images to all source images (Eq. 23, with probability {1 - report['delta']:.2f}): "
              f"add {rows['source held out']['concentration']:.2f}")
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
    figure.savefig(file, dpi=110)


def _demo():
    """Two drawn domains around the same prototypes, with void pixels and a class that only one of them has."""
    generator = torch.Generator().manual_seed(0)
    otp, tau = F.normalize(torch.randn(6, 32, generator=generator), dim=1), 0.2

    def draw(n, noise, classes):
        label = torch.randint(0, classes, (n,), generator=generator)
        emb = F.normalize(otp[label] + noise * torch.randn(n, 32, generator=generator), dim=1)
        return emb, label.where(torch.rand(n, generator=generator) > 0.1, torch.tensor(VOID))

    constants = hub_slope(otp, tau).max().item(), lipschitz_constant(otp, tau)
    hub, per_class = hub_loss(otp, tau).double(), lipschitz_per_class(otp, tau).double()
    emb_s, label_s = draw(2000, 0.1, 5)
    share_s, basis = class_shares(label_s, 6), span_basis(otp)
    print(f"g {constants[0]:.2f}   L {constants[1]:.2f}   largest loss possible {loss_ceiling(otp, tau):.2f}")
    for noise in (0.1, 0.2, 0.4):
        emb_t, label_t = draw(2000, noise, 6)
        share_t = class_shares(label_t, 6)
        left = risk(emb_t, label_t, otp, tau)
        right = hub_bound(risk(emb_s, label_s, otp, tau), alignment_radius(emb_s, label_s, otp),
                          alignment_radius(emb_t, label_t, otp), *constants, oscillation(hub, share_s, share_t),
                          total_variation(share_s, share_t))
        along = distance(emb_t @ basis, label_t, otp @ basis).double()
        radius = torch.stack([along[label_t == c].mean() for c in range(6)])
        direct = direct_bound(share_t, hub, per_class, radius)
        print(f"target noise {noise:.1f}   risk {left:6.3f}   direct bound {direct:6.2f}   hub bound {right:6.2f}")
        assert left <= direct <= right, "Eq. 12 and 13 hold for any two sets of pixels"


if __name__ == "__main__":
    _demo()
