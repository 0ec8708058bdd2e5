"""align.py: pull every pixel towards the prototype of its class, along a path from one goal to another.

Cross-entropy on logits only asks that the right class gets the largest score on the source. It does not say where in
CLIP's space the embedding of a pixel must lie. Alignment says it. The prototypes p_1 .. p_K come from language, and a
pixel has to be closer to the prototype of its own class than to any other. The prototypes are the same for all domains.
If pixels of an unseen domain lie near the same prototypes, they get the same classes.

There are two goals. The Original Text Prototype (OTP) is the same for every image. The Visual Text Prototype (VTP) is
the OTP moved towards what this image shows. During training, the goal moves from one to the other.

    Eq. 3   L(Q; w) = sum_i w_i CE(<z_i, Q> / tau, y_i) / sum_i w_i             over the labelled pixels i
    Eq. 4   L_align = L(p_lambda; w),   p_lambda = norm((1 - lambda) p^V + lambda p^O),   lambda without a jump

Shapes
    emb         (B, D, h, w)          z, the embedding of each pixel; only its direction matters
    prototypes  (K, D) or (B, K, D)   Q: unit rows; one set for all images (OTP), or one per image (VTP)
    label       (B, h, w) int64       y: 0 .. K-1, 255 = void; on the grid of emb (see labels_on_grid)
    weight      (B, h, w)             w from reweight.py, no gradient

Not here: how prototypes are made (prototypes.py), the whole loss (ppar.py). Needs torch alone. `python align.py` prints
    on paper: losses 0.127 0.693 2.127   L_align 0.753
    step   0   lambda 1.00   loss to OTP 0.74   loss to VTP 1.14
    step  25   lambda 0.98   loss to OTP 0.06   loss to VTP 0.17
    step 100   lambda 0.00   loss to OTP 0.14   loss to VTP 0.06
    Notice: the pixels follow the goal. First the loss to the OTP is the smaller one, in the end the loss to the VTP.
"""

import math

import torch
import torch.nn.functional as F

VOID = 255  # the train id of pixels without a class: in no loss and in no mean


def cosine_similarity_map(emb, prototypes):
    """Cosine between every pixel and every prototype, (B, K, h, w) float32.

    emb          (B, D, h, w), of any length
    prototypes   (K, D) or (B, K, D), of any length

    The dot product is divided by the length of the pixel's embedding afterwards. This gives the
    same number as normalising the embedding first, and it needs no second copy of `emb`, which is
    the largest tensor of a step.

    All is computed in float32, also under autocast. Half precision ends at 65504, so a sum of
    squares can overflow. And 1e-8 rounds to 0 in half precision, so that an embedding of length 0
    would give 0 / 0 = NaN. One NaN here becomes a NaN in every parameter.
    """
    with torch.autocast(emb.device.type, enabled=False):
        emb, prototypes = emb.float(), prototypes.float()
        length = torch.linalg.vector_norm(emb, dim=1, keepdim=True)  # (B, 1, h, w)
        # One set of prototypes is repeated for all images. `expand` copies nothing.
        prototypes = F.normalize(prototypes, dim=-1).expand(len(emb), -1, -1)  # (B, K, D)
        dot = prototypes @ emb.flatten(2)  # (B, K, hw)
        return dot.unflatten(2, emb.shape[2:]) / length.clamp_min(1e-8)


def labels_on_grid(label, emb):
    """The label (or the weight) at the centre of each cell: (B, H, W) -> (B, h, w).

    The cells are the pixels of emb (B, D, h, w). H and W must be multiples of h and w, else
    ValueError: cells would have no common size, and labels would meet the embeddings of neighbours.
    """
    (height, width), (h, w) = label.shape[1:], emb.shape[2:]
    if height % h or width % w:
        raise ValueError(
            f"a label of {height} x {width} pixels does not lie on a grid of {h} x {w} cells: "
            f"each side must be a multiple of the grid's, so pad image and label"
        )
    rows, columns = height // h, width // w  # pixels in a cell
    return label[:, rows // 2::rows, columns // 2::columns]


def alignment_map(emb, label, prototypes, tau):
    """Eq. 3 before its mean: the loss of every pixel, (B, h, w) float32, at least 0, 0 on void.

    It is the cross-entropy of the pixel's cosines to all prototypes, divided by tau.

    # our reading: the abstract says "alignment" and gives no loss. Cross-entropy pulls a pixel to
    its own prototype and away from the others, as CLIP's own training did. So the loss of a pixel
    is smallest not at its prototype but beyond it, away from the others (theory.md, section 3).

    tau > 0 divides the cosine. Cosines lie in [-1, 1], so at tau = 1 no class could get a
    probability near 1. CLIP's own training ended at tau = 0.01.

    ValueError for a tau that is not positive, and for what is no label (check_label).
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, not {tau}: it divides the cosine")
    check_label(label, emb, prototypes)
    logits = cosine_similarity_map(emb, prototypes) / tau
    try:
        return F.cross_entropy(logits, label, ignore_index=VOID, reduction="none")
    except IndexError:
        raise unknown_id(label, prototypes) from None


def alignment_loss(emb, label, prototypes, tau, weight=None):
    """Eq. 3: the weighted mean of alignment_map over the labelled pixels, a scalar of at least 0.

    weight (B, h, w), no gradient goes into it; None means 1 everywhere.

    If no pixel is labelled, or all weights are zero, the loss is exactly 0 and so is its gradient.
    A mean over nothing would be 0 / 0 = NaN, and one crop without labels would spoil all parameters.
    """
    loss = alignment_map(emb, label, prototypes, tau)
    valid = (label != VOID).to(loss.dtype)
    weight = valid if weight is None else valid * weight.detach()
    return (weight * loss).sum() / weight.sum().clamp_min(1e-8)  # Eq. 3


def progress(step, steps, start, end):
    """The ramp r, a float in [0, 1]. ValueError unless 0 <= start < end <= 1.

    0 until the fraction `start` of the run, 1 from the fraction `end` on.

    # our reading: half a cosine between them, which has no jump and no kink. So the gradient never
    changes all at once, and the optimiser's moving averages stay true. The ramp depends on
    step / steps alone: a resumed run sees the same schedule as one that was never stopped.
    """
    if not 0 <= start < end <= 1:
        raise ValueError(f"progress needs 0 <= start < end <= 1, not start {start}, end {end}")
    x = (step / steps - start) / (end - start)
    x = min(max(x, 0.0), 1.0)
    return 0.5 * (1 - math.cos(math.pi * x))


# our reading: "from easy to difficult" is read as OTP first, VTP last, for all pixels together. The
# mean loss to the OTP is the smaller one, and the loss is what training feels. The VTP is the nearer
# one (curves.png of any run shows both). In our experiments no order was clearly better. Eq. 17
# favours the opposite order. So the schedules are named after what they do, and not after an opinion.
#
# Each schedule maps the ramp r = progress(...) to lambda, the share of the OTP in Eq. 4. This table
# is the one place that names a schedule: `--align` takes any name that stands here.
SCHEDULES = {
    "otp-to-vtp": lambda r: 1 - r,  # the OTP first, the VTP last
    "vtp-to-otp": lambda r: r,  # the VTP first, the OTP last
    "otp": lambda r: 1.0,  # the OTP from the first step on
    "vtp": lambda r: 0.0,  # the VTP from the first step on
    "none": lambda r: None,  # no alignment
}


def goal(otp, vtp, lam):
    """Eq. 4: p_lambda, on the arc from the VTP (lam = 0) to the OTP (lam = 1).

    otp (K, D), vtp (B, K, D) -> (B, K, D), unit rows. At lam = 1 it is otp itself, (K, D).

    # our reading: one goal that moves. Two losses at once would pull a pixel to two points.
    """
    if lam == 1:
        return otp  # no VTP is needed
    return F.normalize((1 - lam) * vtp + lam * otp, dim=-1)  # Eq. 4


def distance(emb, label, prototypes):
    """|z - p_y|: from each pixel to the prototype of its class, (B, h, w) in [0, 2], 0 on void.

    emb must have unit length. ValueError for what is no label (check_label).
    """
    check_label(label, emb, prototypes)
    image = torch.arange(len(emb), device=emb.device)[:, None, None]  # (B, 1, 1)
    classes = label.where(label != VOID, 0)  # 255 is no row of the prototypes
    classes = classes.where(classes >= 0, VOID)  # row -1 would be the last one: refuse it, too
    try:
        own = prototypes.expand(len(emb), -1, -1)[image, classes]  # (B, h, w, D)
    except IndexError:
        raise unknown_id(label, prototypes) from None
    return (emb.permute(0, 2, 3, 1) - own).norm(dim=-1) * (label != VOID)


def check_label(label, emb, prototypes):
    """ValueError, one sentence, for what is no label (B, h, w) of emb (B, D, h, w).

    A label is int64 and lies on the grid of emb. Both are known without a look at the numbers.

    The numbers must be 0 .. K-1 and 255. They are not checked here: to look at them, the program
    would wait in every step until a GPU has done all its work. Torch itself notices a wrong id when
    it looks up a class. On the CPU that is an IndexError, of which we make a sentence (unknown_id).
    On a GPU it stops the program, some steps later, with "device-side assert".
    """
    if label.dtype != torch.int64:
        raise ValueError(f"a label must be int64, not {label.dtype}: call label.long() first")
    grid = (len(emb), *emb.shape[2:])
    if tuple(label.shape) != grid:
        raise ValueError(
            f"a label of shape {tuple(label.shape)} does not lie on a grid of shape {grid}: "
            f"call labels_on_grid first"
        )


def unknown_id(label, prototypes):
    """The ValueError that names an id of the label that is neither a class nor void."""
    classes = prototypes.shape[-2]
    known = ((label >= 0) & (label < classes)) | (label == VOID)
    return ValueError(
        f"the label holds the id {label[~known][0]}: ids must be 0 to {classes - 1}, "
        f"or {VOID} for pixels without a class"
    )


def _demo():
    """The step on paper of exercises.md. Then its three pixels follow the goal from OTP to VTP."""
    otp = torch.eye(2, 3)
    vtp = torch.tensor([[[0.28, 0, 0.96], [0, 1, 0]]])
    pixels = torch.tensor([[0.8, 0, 0.6], [-0.6, 0, 0.8], [0.8, 0, 0.6]])  # three pixels, D = 3
    emb = pixels.T[None, :, None]  # (B = 1, D = 3, h = 1, w = 3)
    label = torch.tensor([[[0, 1, 1]]])
    half_way = goal(otp, vtp, lam=0.5)
    losses = alignment_map(emb, label, half_way, tau=0.5).flatten()
    weight = torch.tensor([[[1, 1, 0.5]]])
    total = alignment_loss(emb, label, half_way, tau=0.5, weight=weight)
    print("on paper: losses", *(f"{x:.3f}" for x in losses), f"  L_align {total:.3f}")

    emb.requires_grad_()
    optimizer = torch.optim.SGD([emb], lr=2.0)
    rows = []
    for step in range(101):
        lam = SCHEDULES["otp-to-vtp"](progress(step, 100, 0.2, 0.8))
        to_otp = alignment_loss(emb, label, otp, tau=0.5).item()
        to_vtp = alignment_loss(emb, label, vtp, tau=0.5).item()
        rows.append((to_otp, to_vtp))
        if step in (0, 25, 100):
            print(f"step {step:3d}   lambda {lam:.2f}   "
                  f"loss to OTP {to_otp:.2f}   loss to VTP {to_vtp:.2f}")
        optimizer.zero_grad()
        alignment_loss(emb, label, goal(otp, vtp, lam), tau=0.5).backward()
        optimizer.step()
    print("Notice: the pixels follow the goal. First the loss to the OTP is the smaller one, "
          "in the end the loss to the VTP.")
    assert rows[25][0] < rows[25][1], "the OTP first"
    assert rows[100][1] < rows[100][0], "the VTP last"


if __name__ == "__main__":
    _demo()
