"""align.py: pull every pixel towards the prototype of its class, along a path from one goal to another.

Cross-entropy on logits only asks that the right class wins on the source; where in CLIP's space a pixel ends up is left
to accident. Alignment fixes the place: the prototypes p_1 .. p_K came from language, and a pixel has to be closer to its
own class's than to any other. Pixels of an unseen domain that end near the same points land on the same side.

There are two goals. The Original Text Prototype (OTP) is the same for every image. The Visual Text Prototype (VTP) is
the OTP moved towards what this image shows. The goal walks from one to the other while training goes on.

    Eq. 3   L(Q; w) = sum_i w_i CE(<z_i, Q> / tau, y_i) / sum_i w_i             over the labelled pixels i
    Eq. 4   L_align = L(p_lambda; w),   p_lambda = norm((1 - lambda) p^V + lambda p^O),   lambda without a jump

Shapes
    emb         (B, D, h, w)          z, the embedding of each pixel; only its direction matters
    label       (B, h, w) int64       y: 0 .. K-1, 255 = void; on the grid of emb: labels_on_grid brings a finer one there
    prototypes  (K, D) or (B, K, D)   Q: unit rows; one set for all images (OTP), or one per image (VTP)
    weight      (B, h, w)             w from reweight.py, no gradient

Not here: how prototypes are made (prototypes.py), the whole loss (ppar.py). Needs torch alone. `python align.py` prints
    on paper: losses 0.127 0.693 2.127   L_align 0.753
    step   0   lambda 1.00   loss to OTP 0.74   loss to VTP 1.14
    step  25   lambda 0.98   loss to OTP 0.06   loss to VTP 0.17
    step 100   lambda 0.00   loss to OTP 0.14   loss to VTP 0.06
    Notice: pixels go to the OTP first, and then give up a little of it for the VTP.
"""

import math

import torch
import torch.nn.functional as F

VOID = 255  # the train id of pixels without a class: in no loss and in no mean


def cosine_similarity_map(emb, prototypes):
    """Cosine between every pixel and every prototype: (B, D, h, w), (K, D) or (B, K, D) -> (B, K, h, w) float32.

    The dot product is divided by the pixel's length afterwards: the same number as normalising the embedding
    first, without a second copy of the largest tensor of the step. In float32 even under autocast: half precision
    ends at 65504, so a sum of squares overflows, and in it the 1e-8 below is 0; a NaN here is a NaN in every parameter.
    """
    with torch.autocast(emb.device.type, enabled=False):
        emb, prototypes = emb.float(), prototypes.float()
        length = torch.linalg.vector_norm(emb, dim=1, keepdim=True)  # (B, 1, h, w)
        prototypes = F.normalize(prototypes, dim=-1).expand(len(emb), -1, -1)  # (B, K, D): a batched product copies no map
        dot = prototypes @ emb.flatten(2)  # (B, K, hw)
        return dot.unflatten(2, emb.shape[2:]) / length.clamp_min(1e-8)


def labels_on_grid(label, emb):
    """The label (or weight) at the centre of each cell: (B, H, W) -> (B, h, w), for emb (B, D, h, w) and H, W multiples of h, w."""
    row, col = label.shape[1] // emb.shape[2], label.shape[2] // emb.shape[3]
    return label[:, row // 2::row, col // 2::col]


def alignment_map(emb, label, prototypes, tau):
    """Eq. 3 before its mean: the cross-entropy of every pixel's cosines over the prototypes, (B, h, w) >= 0, 0 on void.

    # our reading: the abstract says "alignment" and gives no loss. Cross-entropy pulls a pixel to its own prototype and
    away from the others, as CLIP's own training did; so the loss is least beyond the prototype (theory.md, section 3). tau > 0
    divides the cosine: at 1, a softmax of cosines in [-1, 1] can never become certain; CLIP's training ended at 0.01.
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, not {tau}: it divides the cosine")
    logits = cosine_similarity_map(emb, prototypes) / tau
    return F.cross_entropy(logits, label, ignore_index=VOID, reduction="none")


def alignment_loss(emb, label, prototypes, tau, weight=None):
    """Eq. 3: the weighted mean of alignment_map over the labelled pixels; a scalar >= 0. weight None means 1 everywhere.

    If no pixel is labelled, or all weights are zero, the loss is exactly 0 and so is its gradient: a mean over nothing
    would be 0 / 0, and one all-void crop would poison the run.
    """
    loss = alignment_map(emb, label, prototypes, tau)
    weight = (label != VOID).to(loss.dtype) * (1.0 if weight is None else weight.detach())
    return (weight * loss).sum() / weight.sum().clamp_min(1e-8)


def progress(step, steps, start, end):
    """The ramp r, a float in [0, 1]: 0 until the fraction `start` of the run, 1 from the fraction `end` on (else ValueError).

    # our reading: half a cosine between them. It has no jump and no kink for the optimiser's momentum to trip over,
    and it depends on step / steps alone, so a resumed run sees the schedule of the uninterrupted one.
    """
    if not 0 <= start < end <= 1:
        raise ValueError(f"progress needs 0 <= start < end <= 1, not start {start}, end {end}")
    x = (step / steps - start) / (end - start)
    return 0.5 * (1 - math.cos(math.pi * min(max(x, 0.0), 1.0)))


# our reading: "from easy to difficult" is read as OTP first, VTP last, for all pixels together: by the loss, which is what
# training feels, the OTP is the easier goal, though the VTP is the nearer one (curves.png of any run). Measured, no order is
# clearly better; Eq. 17 speaks for the reverse. Each maps the ramp r = progress(...) to lambda, the share of the OTP in Eq. 4.
SCHEDULES = {
    "progressive": lambda r: 1 - r,  # from OTP to VTP
    "reversed": lambda r: r,  # from VTP to OTP: tells an order from a mixture
    "otp": lambda r: 1.0,  # the OTP from the first step
    "vtp": lambda r: 0.0,  # the VTP from the first step
    "none": lambda r: None,  # no alignment
}


def goal(otp, vtp, lam):
    """Eq. 4: p_lambda on the arc from the VTP (lam 0) to the OTP (lam 1): (K, D), (B, K, D) -> (B, K, D), or otp itself at 1.

    # our reading: one goal that moves. Two losses at once would ask a pixel to be in two places.
    """
    return otp if lam == 1 else F.normalize((1 - lam) * vtp + lam * otp, dim=-1)


def distance(emb, label, prototypes):
    """|z - p_y|, from each pixel to the prototype of its class, (B, h, w), 0 on void; emb of unit length, prototypes as above."""
    image = torch.arange(len(emb), device=emb.device)[:, None, None]
    own = prototypes.expand(len(emb), -1, -1)[image, label.where(label != VOID, 0)]  # (B, h, w, D)
    return (emb.permute(0, 2, 3, 1) - own).norm(dim=-1) * (label != VOID)


def _demo():
    """The step on paper of exercises.md; then its three pixels walk to one set of prototypes, and on to the other."""
    otp, vtp = torch.eye(2, 3), torch.tensor([[[0.28, 0, 0.96], [0, 1, 0]]])
    emb, label = torch.tensor([[0.8, 0, 0.6], [-0.6, 0, 0.8], [0.8, 0, 0.6]]).T.view(1, 3, 1, 3), torch.tensor([[[0, 1, 1]]])
    losses = alignment_map(emb, label, goal(otp, vtp, lam=0.5), tau=0.5).flatten()
    total = alignment_loss(emb, label, goal(otp, vtp, lam=0.5), tau=0.5, weight=torch.tensor([[[1, 1, 0.5]]]))
    print("on paper: losses", *(f"{x:.3f}" for x in losses), f"  L_align {total:.3f}")

    optimizer, rows = torch.optim.SGD([emb.requires_grad_()], lr=2.0), []
    for step in range(101):
        lam = SCHEDULES["progressive"](progress(step, 100, 0.2, 0.8))
        rows.append([alignment_loss(emb, label, prototypes, tau=0.5).item() for prototypes in (otp, vtp)])
        if step in (0, 25, 100):
            print(f"step {step:3d}   lambda {lam:.2f}   loss to OTP {rows[-1][0]:.2f}   loss to VTP {rows[-1][1]:.2f}")
        optimizer.zero_grad()
        alignment_loss(emb, label, goal(otp, vtp, lam), tau=0.5).backward()
        optimizer.step()
    print("Notice: pixels go to the OTP first, and then give up a little of it for the VTP.")
    assert rows[25][0] < rows[25][1] and rows[100][1] < rows[100][0], "the OTP first, the VTP last"


if __name__ == "__main__":
    _demo()
