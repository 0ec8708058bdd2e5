"""ppar.py: the whole method. Network and prototypes are one module, the loss of a step is one function.

    logits, emb, vtp = PPAR(image)     dense CLIP and decoder, prototypes      model.py, prototypes.py (Eq. 1, 2)
    L_align                            pixels to a goal that moves             align.py (Eq. 3, 4)
    omega_i, w_i                       is label i reliable?                    reweight.py (Eq. 5, 6)
    Eq. 7   L = L_seg(w) + w_align * L_align(w),     L_seg(w) = sum_i w_i CE(logits_i, y_i) / sum_i w_i
            means over the labelled pixels of the whole batch

Shapes
    image, label   (B, 3, H, W), (B, H, W) int64, 255 = void     logits   (B, K, H/4, W/4)
    emb            (B, D, h, w)  unit norm over D (clip_emb: on a coarser grid)    otp, vtp (K, D), (B, K, D)  unit rows
    omega, weight  (B, H, W)                                     grid     (B, h, w): the label at the centre of each cell

Every function says by its arguments which numbers enter; none of them knows the flags of train.py.

Not here: the loop (train.py), the score (evaluate.py). `python ppar.py` prints
    lambda 1.0   seg 1.30   align 1.10   weight of right labels 1.00, of wrong ones 1.00
    lambda 0.0   seg 0.05   align 0.05   weight of right labels 1.00, of wrong ones 0.00
    Notice: the network is the same in both lines. The losses fall because the wrong labels, a third of this street, lose their weight.
"""

import copy
from typing import NamedTuple

from data import CLASSES, PADDING, VOID, normalise  # first: it refuses a Python that is too old

import torch
import torch.nn.functional as F

import align
import prototypes
import reweight
from model import SegmentationNet, load_clip, pad


class Output(NamedTuple):
    """What PPAR says about a batch of images.

    The last two come from frozen CLIP. They are None if no term of the loss needs them.
    """

    logits: torch.Tensor  # (B, K, H/4, W/4), of the decoder
    emb: torch.Tensor  # (B, D, h, w), of the trained image tower
    vtp: torch.Tensor | None = None  # (B, K, D), Eq. 2
    clip_emb: torch.Tensor | None = None  # (B, D, any, any), of frozen CLIP


class PPAR(torch.nn.Module):
    """Image -> Output: the network that is trained, its prototypes, and a frozen copy of CLIP.

    net    image -> (logits, emb): model.SegmentationNet, or another network of that kind
    otp    (K, D), unit rows: a buffer, which gets no gradient
    clip   frozen image tower, image -> (anything, emb), with its `multiple`; None if not needed
    tau, beta      of Eq. 2: its temperature, and the most that a prototype moves
    mask_padding   Eq. 2 leaves out the padding of training views
    """

    def __init__(self, net, otp, clip=None, tau=0.07, beta=0.7, mask_padding=False):
        super().__init__()
        self.net, self.clip = net, clip
        self.tau, self.beta, self.mask_padding = tau, beta, mask_padding
        self.register_buffer("otp", otp)
        # Classes whose prototype is a mean of source pixels (follow_source). With text: none.
        self.register_buffer("seen", torch.zeros(len(otp), dtype=torch.bool, device=otp.device))
        # The colour of padding, as the network sees it. A buffer, because it has to be on the GPU.
        colour = normalise(torch.tensor(PADDING).view(3, 1, 1))
        self.register_buffer("padding", colour, persistent=False)

    def forward(self, image):
        logits, emb = self.net(image)
        # In channels_last memory, the softmax of every loss would copy its input, because the
        # scores of the classes must lie apart. One copy here is enough.
        logits, emb = logits.contiguous(), emb.contiguous()
        if self.clip is None:
            return Output(logits, emb)
        vtp, clip_emb = self.ask_frozen_clip(image)
        return Output(logits, emb, vtp, clip_emb)

    @torch.no_grad()
    def ask_frozen_clip(self, image):
        """Eq. 2: image (B, 3, H, W) -> the VTPs (B, K, D), and the embedding that they are made of.

        # our reading: CLIP sees the image at about half its size, which costs a quarter. Each side
        is rounded to the nearest size that the tower takes.
        """
        step = self.clip.multiple
        half = [step * max(1, round(side / 2 / step)) for side in image.shape[2:]]
        small = F.interpolate(image, size=half, mode="bilinear", align_corners=False, antialias=True)
        emb = self.clip(small)[1]
        shown = None
        if self.mask_padding:
            shown = F.adaptive_avg_pool2d(shows_image(image, self.padding), emb.shape[2:])
        vtp = prototypes.visual_text_prototypes(self.otp, emb, self.tau, self.beta, shown=shown)
        return vtp, emb

    @torch.no_grad()
    def follow_source(self, emb, label, reduce=None):
        """A control: the prototypes become a running mean of the source's own pixels, per class.

        emb (B, D, h, w) and label (B, H, W) of a batch; reduce as in `objective`. The result takes
        the place of the OTP wherever that is used: in the goal, in Eq. 5, and in the prediction.
        """
        grid = align.labels_on_grid(label, emb)
        rows, seen = prototypes.source_prototypes(self.otp, self.seen, emb, grid, reduce=reduce)
        self.otp.copy_(rows)
        self.seen.copy_(seen)


def shows_image(image, padding):
    """Where a training view shows its image and not padding: 1 or 0, (B, H, W) float.

    image (B, 3, H, W) and padding (3, 1, 1), both normalised. No label is read.

    data.training_view lays the image, a rectangle, on a canvas of one colour. So padding is made of
    whole rows and whole columns of that colour. A pixel of the image that happens to have the
    colour, too, is not taken for padding. Two grey levels are 0.014 apart; rounding is far below.
    """
    same = ((image - padding).abs() < 0.001).all(dim=1)  # (B, H, W)
    padded = same.all(dim=2, keepdim=True) | same.all(dim=1, keepdim=True)
    return (~padded).float()


def build(clip, *, seed, stride, freeze, shuffle=False, frozen_clip=True,
          tau=0.07, beta=0.7, mask_padding=False):
    """PPAR at step 0 -> (PPAR, one line that says what was loaded of CLIP).

    clip          a CLIP by name, the path of a checkpoint, or "toy" (model.load_clip)
    seed          of the decoder's initial weights, and of the shuffle
    stride        of a ResNet's dense embedding, in pixels
    freeze        how many of the image tower's 5 stages are not trained
    shuffle       a control: each class gets the text prototype of another class
    frozen_clip   keep a frozen copy of the image tower, for the VTP and for the weights
    tau, beta, mask_padding   of Eq. 2, see PPAR
    """
    clip_model, report = load_clip(clip)
    torch.manual_seed(seed)  # every method starts from the same network
    net = SegmentationNet(clip_model.visual, len(CLASSES), stride)
    otp = prototypes.original_text_prototypes(clip_model, CLASSES)  # Eq. 1
    if shuffle:
        otp = prototypes.shuffled_prototypes(otp, seed=seed)
    frozen = None
    if frozen_clip:
        frozen = copy.deepcopy(net.encoder).requires_grad_(False)  # before any training
    net.encoder.freeze(freeze)
    return PPAR(net, otp, frozen, tau, beta, mask_padding), report


def objective(out, otp, label, *, lam, ramp, tau, judge_text, balance=0.0, w_align=1.0, reduce=None):
    """Eq. 3 to 7 for a batch -> {"seg": scalar, "align": scalar}. Their sum is the loss of Eq. 7.

    out          Output of the batch
    otp          (K, D), unit rows
    label        (B, H, W) int64, H and W multiples of h and w
    lam          lambda of Eq. 4 in [0, 1]: 0 is the VTP, 1 the OTP; None: there is no L_align
    ramp         of Eq. 6 in [0, 1]; 0: all weights are 1, and nothing is computed for them
    tau          temperature of Eq. 3 and of the text score in Eq. 5
    judge_text   gamma of Eq. 5 in [0, 1], the share of the text score in the second opinion
    balance      in [0, 1], exponent of the class balance; 0: none
    w_align      weight of L_align in Eq. 7
    reduce       sums a tensor over the processes that share the batch; None: there is one process

    # our reading: the abstract does not name the loss to which alignment and weights are added. We
    take L_seg, the usual cross-entropy of semantic segmentation.
    """
    reduce = reduce or (lambda x: x)
    if ramp > 0:
        weight = learning_weights(out, otp, label, tau=tau, judge_text=judge_text, ramp=ramp)
    else:
        weight = (label != VOID).float()

    balanced = weight
    if balance > 0:
        balanced = weight * class_balance(weight, label, balance, reduce)
    logits = out.logits.float()
    logits = F.interpolate(logits, size=label.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, label, ignore_index=VOID, reduction="none")  # (B, H, W)
    terms = {"seg": batch_mean(loss, balanced, reduce)}  # Eq. 7, L_seg

    if lam is not None:
        goal = align.goal(otp, out.vtp, lam)  # Eq. 4
        grid = align.labels_on_grid(label, out.emb)  # (B, h, w)
        weight_on_grid = align.labels_on_grid(weight, out.emb)  # (B, h, w)
        loss = align.alignment_map(out.emb, grid, goal, tau)  # Eq. 3, for each cell
        terms["align"] = w_align * batch_mean(loss, weight_on_grid, reduce)  # Eq. 3, 7
    return terms


def batch_mean(loss, weight, reduce):
    """sum(weight * loss) / sum(weight), of the whole batch; 0 if all weights are 0.

    The denominator is summed over all processes, the numerator over this one. So each process has
    its share of the mean, and the shares add up to it. A mean of the processes' means would be
    another number, because each process has other labels and weights.
    """
    total = reduce(weight.sum(dtype=torch.float64))  # in double: millions of small numbers
    return (weight * loss).sum() / total.clamp_min(1e-8).float()


def class_balance(weight, label, power, reduce):
    """n_c^-power at each pixel, (B, H, W). n_c is the weight of its class in the whole batch.

    This is not of the paper. L_seg is one mean over all pixels. Without balance, road and sky have
    most of the gradient, and poles next to none.

    n_c counts pixels after Eq. 6: a class that loses half of its weight gets a larger factor. If all
    pixels of a class lose weight, the factor gives back a part of it. (With power 1/2, a class whose
    pixels all keep a tenth of their weight has 0.32 and not 0.1 of its former gradient.)
    """
    # scatter_add_ adds each weight to the sum of its class. There is one sum for each class and
    # column of the image: with one sum for each class, all threads of a GPU would wait for each
    # other. Row 255 takes the void pixels, whose weight is 0.
    sums = weight.new_zeros(VOID + 1, label.shape[2], dtype=torch.float64)
    sums.scatter_add_(0, label.flatten(0, 1), weight.flatten(0, 1).double())
    count = reduce(sums.sum(dim=1))  # (256,)
    factor = count.clamp_min(1).float().pow(-power)  # below one pixel, a factor would exceed 1
    return factor[label]


def reliability(out, otp, label, *, tau, judge_text):
    """Eq. 5: omega (B, H, W) in [0, 1].

    # our reading: the second opinion comes from the decoder and from frozen CLIP (from the trained
    tower if there is no frozen copy). We do not use the trained embedding. Alignment has already
    pulled it towards its label, so it would agree with a wrong label, too.
    """
    emb = out.emb if out.clip_emb is None else out.clip_emb
    log_q = prediction(out.logits, emb, otp, tau=tau, text_weight=judge_text)
    return reweight.reliability(log_q, label)


def learning_weights(out, otp, label, *, tau, judge_text, ramp):
    """Eq. 5 and 6: the learning weight of each pixel, (B, H, W) in [0, 1], 0 on void, no gradient.

    # our reading: the neighbourhood of a pixel is a window that reaches one cell of `emb` to each
    side. Within a cell, the text score cannot tell pixels apart.
    """
    cell = label.shape[1] // out.emb.shape[2]  # pixels
    omega = reliability(out, otp, label, tau=tau, judge_text=judge_text)  # Eq. 5
    place = reweight.place_reliability(omega, label, side=2 * cell + 1)  # Eq. 5
    return reweight.learning_weights(omega, place, label, ramp)  # Eq. 6


@torch.no_grad()
def prediction(logits, emb, otp, *, tau, text_weight):
    """log q, up to a constant for each pixel, (B, K, H/4, W/4): decoder and text score, averaged.

        log q = (1 - gamma) logits + gamma <z, p^O> / tau,   gamma = text_weight in [0, 1]

    # our reading: the abstract does not say how to predict. gamma = 0 is the decoder alone. gamma = 1
    is the text alone; with an untrained network, this is CLIP's zero-shot segmentation.
    """
    logits = logits.detach().float()
    if text_weight == 0:
        return logits
    text = align.cosine_similarity_map(emb, otp) / tau
    text = F.interpolate(text, size=logits.shape[2:], mode="bilinear", align_corners=False)
    return (1 - text_weight) * logits + text_weight * text


@torch.no_grad()
def compare_goals(out, otp, label, *, tau, judge_text):
    """Which prototype is the easier goal? -> {name: float}. Without a VTP, the first two alone.

    radius_otp, loss_otp     mean distance to the OTP of the own class, and mean loss of Eq. 3
    radius_vtp, loss_vtp     the same to the VTP; all four are means over the labelled cells
    nearer_vtp, easier_vtp   share of the trusted cells to which the VTP is nearer than the OTP, and
                             share of those for which it has the lower loss

    Trusted cells are those that keep their weight at the end of the ramp (Eq. 6). A mean loss is
    large where CLIP mistakes some cells. The shares say what holds for most cells.
    """
    grid = align.labels_on_grid(label, out.emb)
    labelled = (grid != VOID).sum().clamp_min(1)
    goals = {"otp": otp} if out.vtp is None else {"otp": otp, "vtp": out.vtp}
    distance, loss, row = {}, {}, {}
    for name, goal in goals.items():
        distance[name] = align.distance(out.emb, grid, goal)
        loss[name] = align.alignment_map(out.emb, grid, goal, tau)
        row["radius_" + name] = (distance[name].sum() / labelled).item()
        row["loss_" + name] = (loss[name].sum() / labelled).item()
    if out.vtp is not None:
        weight = learning_weights(out, otp, label, tau=tau, judge_text=judge_text, ramp=1.0)
        trusted = align.labels_on_grid(weight, out.emb) > 0  # 0 on void, too
        number = trusted.sum().clamp_min(1)
        nearer = trusted & (distance["vtp"] < distance["otp"])
        easier = trusted & (loss["vtp"] < loss["otp"])
        row["nearer_vtp"] = (nearer.sum() / number).item()
        row["easier_vtp"] = (easier.sum() / number).item()
    return row


@torch.no_grad()
def look(ppar, image, label):
    """One image through the network -> (Output, label (1, H', W'), grid (1, h, w)).

    image (3, H, W) and label (H, W) are padded to a size that CLIP takes; the label with void.
    """
    height, width = label.shape
    image = pad(image[None].to(ppar.otp.device), ppar.net.encoder.multiple)
    label = torch.as_tensor(label, device=image.device)[None].long()
    right, below = image.shape[3] - width, image.shape[2] - height
    label = F.pad(label, (0, right, 0, below), value=VOID)
    out = ppar(image)
    return out, label, align.labels_on_grid(label, out.emb)


def _demo():
    """A street of two classes. The middle third is building, and so the label says of the last third."""
    otp = torch.eye(2, 4)
    truth = torch.zeros(1, 12, 48, dtype=torch.long)
    truth[:, :, 16:32] = 1
    label = truth.clone()
    label[:, :, 32:] = 1  # wrong
    offset = torch.tensor([0, 0, 0.3, 0.1])  # by which the image differs from the text
    emb = F.normalize(otp[truth[:, 1::4, 1::4]] + offset, dim=3).permute(0, 3, 1, 2)  # (1, 4, 3, 12)
    logits = 4 * F.one_hot(truth[:, ::4, ::4], 2).permute(0, 3, 1, 2).float()
    out = Output(logits, emb, prototypes.visual_text_prototypes(otp, emb, tau=0.3))
    for ramp in (0.0, 1.0):
        lam = align.SCHEDULES["otp-to-vtp"](ramp)
        terms = objective(out, otp, label, lam=lam, ramp=ramp, tau=0.3, judge_text=0.5)
        weight = learning_weights(out, otp, label, tau=0.3, judge_text=0.5, ramp=ramp)
        right, wrong = weight[label == truth].mean(), weight[label != truth].mean()
        print(f"lambda {lam:.1f}   seg {terms['seg']:.2f}   align {terms['align']:.2f}   "
              f"weight of right labels {right:.2f}, of wrong ones {wrong:.2f}")
    print("Notice: the network is the same in both lines. The losses fall because the wrong labels, "
          "a third of this street, lose their weight.")
    assert right > 0.95 and wrong < 0.2


if __name__ == "__main__":
    _demo()
