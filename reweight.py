"""reweight.py: a source pixel loses its weight if the model rejects its label and most labels around it.

Not every source pixel helps on other domains. Some are mislabelled, some show what only the source has. A network that
is made to fit them gets worse on the targets; this is called negative transfer. A second opinion finds such pixels: the
prediction of the decoder, averaged with that of frozen CLIP.

A label that the model rejects is not yet wrong. The model also rejects the labels of thin poles, of borders and of rare
classes, and these are the pixels to learn from. But there it rejects single pixels, and accepts the labels around them.
Wrong labels come in regions: polygons, objects, whole images. So a pixel loses its weight only if the model rejects
most labels of its neighbourhood, too. This is an assumption about label noise.

    Eq. 5   omega_i = q_i[y_i] / max_c q_i[c]                          reliability of the pixel, in [0, 1]
            Omega_i = mean of omega over the labelled pixels around i  reliability of its neighbourhood ("place")
    Eq. 6   w_i = 1 - ramp * [omega_i < 0.2 and Omega_i < 0.5]         learning weight, in [0, 1]

Shapes
    logits                (B, K, h, w)      log q, up to a constant for each pixel; on the label's grid, or on a coarser one
    label                 (B, H, W) int64   y: 0 .. K-1, 255 = void
    omega, place, weight  (B, H, W)         in [0, 1], 0 on void, no gradient

Not here: what is weighted (ppar.py), how well wrong labels are found (figures.py). Needs torch alone. `python reweight.py` prints
    on paper:  omega 1.00 0.33 0.11  place 0.67 0.48 0.22  weight 1.00 1.00 0.50   L_seg 1.104
    clean pixels  omega 1.00   place 0.93   weight 1.00
    the pole      omega 0.01   place 0.78   weight 1.00
    wrong region  omega 0.02   place 0.25   weight 0.11
    Notice: omega alone cannot tell the pole from the wrong region. The neighbourhood (place) can.
"""

import torch
import torch.nn.functional as F

VOID = 255  # the train id of pixels without a class: in no loss and in no mean


@torch.no_grad()
def reliability(logits, label):
    """Eq. 5, omega: the label's probability over the largest one, (B, H, W) in [0, 1], 0 on void.

    # our reading: the abstract says that reliability is estimated, and not how. The label's
    probability alone would be low for every difficult pixel. The ratio is not: where several
    classes are likely, omega is high as long as the label is one of them. It is small only if
    another class is far more likely than the label.

    Each pixel of the label reads the pixel of `logits` in which its centre lies. Logits are never
    resized to the size of the label: that would be the largest tensor of the step.

    ValueError for what is no label of these logits (check_label).
    """
    check_label(label, logits)
    logits = logits.float()
    ratio = (logits - logits.amax(dim=1, keepdim=True)).exp()  # (B, K, h, w): q / max q, in (0, 1]

    valid = label != VOID
    classes = label.where(valid, 0)  # 255 is no channel of the ratio
    classes = classes.where(classes >= 0, VOID)  # channel -1 would be the last one: refuse it, too
    image = torch.arange(len(label), device=label.device)[:, None, None]  # (B, 1, 1)
    row = centres(label.shape[1], logits.shape[2], label.device)[:, None]  # (H, 1)
    column = centres(label.shape[2], logits.shape[3], label.device)  # (W,)
    try:
        return ratio[image, classes, row, column] * valid  # Eq. 5
    except IndexError:
        raise unknown_id(label, logits) from None


def centres(pixels, cells, device):
    """For each of `pixels` pixels in a row, the cell that its centre lies in, of `cells` equal cells.

    Pixel i has its centre at i + 1/2, in cells at (i + 1/2) * cells / pixels. All of it is computed
    in whole numbers, so that no rounding moves a pixel into the neighbouring cell.
    """
    i = torch.arange(pixels, device=device)
    return (2 * i + 1) * cells // (2 * pixels)


@torch.no_grad()
def place_reliability(omega, label, side):
    """Eq. 5, Omega: the mean omega of the labelled pixels around each pixel, (B, H, W) in [0, 1].

    The neighbourhood ("place") of a pixel is a window of side x side pixels around it. side must be
    odd, else ValueError: a window of even side has no middle. 0 on void.

    # our reading: one pixel of low omega among pixels of high omega is probably a difficult pixel.
    A whole region of low omega is probably a labelling error.
    """
    if side % 2 == 0:
        raise ValueError(f"side must be odd, not {side}: the window needs a pixel in its middle")
    check_shape(omega, label)
    valid = (label != VOID).to(omega.dtype)
    total = window_sum(omega * valid, side)
    number = window_sum(valid, side)
    return total / number.clamp_min(1) * valid  # Eq. 5: a mean over labelled pixels alone


def window_sum(x, side):
    """The sum of x (B, H, W) over a window of side x side pixels around each. Outside of x is 0.

    An average pooling that divides by 1 is a sum. First along columns, then along rows: that takes
    2 * side additions for each pixel. A square pooling would take side * side, which is many times
    slower on a CPU.
    """
    reach = side // 2
    x = F.avg_pool2d(x, (side, 1), stride=1, padding=(reach, 0), divisor_override=1)
    return F.avg_pool2d(x, (1, side), stride=1, padding=(0, reach), divisor_override=1)


@torch.no_grad()
def learning_weights(omega, place, label, ramp, least_pixel=0.2, least_place=0.5):
    """Eq. 6: learning weights (B, H, W) in [0, 1], 0 on void, no gradient.

    omega, place   (B, H, W), both of Eq. 5
    ramp           in [0, 1], else ValueError. At 0 every weight is 1: at the start of a run the
                   decoder has learned nothing, and its opinion is worth nothing
    least_pixel, least_place   the label is rejected where omega and place are below them. Both
                   were chosen on development domains (results/README.md)

    # our reading: the abstract says that reweighting "adjusts its contribution" and not how. We
    take a step, because clean pixels should keep all of their weight and wrong ones none. Weights in
    proportion to omega take weight from all difficult pixels alike.
    """
    if not 0 <= ramp <= 1:
        raise ValueError(f"ramp must lie in [0, 1], not {ramp}")
    check_shape(omega, label)
    check_shape(place, label)
    rejected = (omega < least_pixel) & (place < least_place)
    weight = 1 - ramp * rejected.to(omega.dtype)  # Eq. 6
    return weight * (label != VOID)


def check_label(label, logits):
    """ValueError, one sentence, for what is no label (B, H, W) of logits (B, K, h, w).

    A label is int64, and has the grid of the logits or a finer one. Both are known without a look
    at the numbers. A side need not be a multiple: with patches of 14 pixels, 70 pixels of the label
    meet 17 of the logits, and `centres` maps these, too.

    The numbers must be 0 .. K-1 and 255. They are not checked here: to look at them, the program
    would wait in every step until a GPU has done all its work. Torch itself notices a wrong id when
    it looks up a class. On the CPU that is an IndexError, of which we make a sentence (unknown_id).
    On a GPU it stops the program, some steps later, with "device-side assert".
    """
    if label.dtype != torch.int64:
        raise ValueError(f"a label must be int64, not {label.dtype}: call label.long() first")
    (height, width), (h, w) = label.shape[-2:], logits.shape[2:]
    if label.dim() != 3 or len(label) != len(logits) or height < h or width < w:
        raise ValueError(
            f"a label of shape {tuple(label.shape)} is none of logits of shape "
            f"{tuple(logits.shape)}: as many images, and at least as many pixels, are needed"
        )


def unknown_id(label, logits):
    """The ValueError that names an id of the label that is neither a class nor void."""
    classes = logits.shape[1]
    known = ((label >= 0) & (label < classes)) | (label == VOID)
    return ValueError(
        f"the label holds the id {label[~known][0]}: ids must be 0 to {classes - 1}, "
        f"or {VOID} for pixels without a class"
    )


def check_shape(x, label):
    """ValueError, one sentence, if x has not one number for each pixel of the label."""
    if x.shape != label.shape:
        raise ValueError(
            f"{tuple(x.shape)} numbers are none of a label of shape {tuple(label.shape)}: "
            f"each pixel of the label needs one"
        )


def _demo():
    """The step on paper of exercises.md. Then a street with a thin pole and a mislabelled region."""
    q = torch.tensor([[0.8, 0.2], [0.75, 0.25], [0.9, 0.1]])  # three pixels, two classes
    label = torch.tensor([[[0, 1, 1]]])
    omega = reliability(q.log().T[None, :, None], label)  # logits (1, 2, 1, 3)
    place = place_reliability(omega, label, side=3)
    weight = learning_weights(omega, place, label, ramp=0.5)
    loss = F.nll_loss(q.log(), label.flatten(), reduction="none")
    seg = (weight * loss).sum() / weight.sum()
    said = "on paper:"
    for name, values in (("omega", omega), ("place", place), ("weight", weight)):
        said += f"  {name} " + " ".join(f"{x:.2f}" for x in values.flatten())
    print(f"{said}   L_seg {seg:.3f}")

    torch.manual_seed(0)
    truth = torch.zeros(1, 32, 64, dtype=torch.long)
    truth[:, :, 10:12] = 1  # a pole
    label = truth.clone()
    label[:, 8:24, 36:56] = 1  # a mislabelled region
    wrong = label != truth
    logits = 5 * F.one_hot(truth, 2).permute(0, 3, 1, 2) + torch.randn(1, 2, 32, 64)
    logits[:, :, :, 10:12] = logits[:, :, :, 10:12].flip(1)  # the network does not see the pole yet
    omega = reliability(logits, label)
    place = place_reliability(omega, label, side=9)
    weight = learning_weights(omega, place, label, ramp=1.0)
    parts = {"clean pixels": (truth == 0) & ~wrong, "the pole": truth == 1, "wrong region": wrong}
    for name, where in parts.items():
        print(f"{name:12s}  omega {omega[where].mean():.2f}   "
              f"place {place[where].mean():.2f}   weight {weight[where].mean():.2f}")
    print("Notice: omega alone cannot tell the pole from the wrong region. "
          "The neighbourhood (place) can.")
    assert weight[wrong].mean() < 0.2 and weight[truth == 1].mean() > 0.9


if __name__ == "__main__":
    _demo()
