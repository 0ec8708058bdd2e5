"""prototypes.py: two prototypes for every class, the one that language gives and the one that the image suggests.

A prototype is a point of CLIP's joint space that stands for a class. The mean of the source's pixels is one: it knows
the source's asphalt and the source's sky, and that is what over-fits. CLIP offers points that have seen no pixel of
any domain, the embeddings of the class names. They are the same for every domain, which makes them a meeting place;
but text and pixels live in different regions of the joint space. A second prototype for each class is the text after a
look at the image.

    Eq. 1   OTP   t_cj = E_text(template_j(name_c)),   p^O_c = norm(mean_j norm(t_cj))                     frozen
    Eq. 2   VTP   p^V_bc = norm(p^O_c + gamma * Dec(query = p^O_c ; memory = [pooled_b, emb_b]))           learned

Shapes
    otp     (K, D)          unit rows
    emb     (B, D, h, w)    unit norm over D: the dense embedding of an image
    pooled  (B, D)          unit norm: the embedding of the whole image
    vtp     (B, K, D)       unit rows, one set per image

Not here: what pixels do with the prototypes (align.py), how far each pixel is believed (reweight.py).
This file needs torch, and clip for Eq. 1 alone. Run `python prototypes.py` for a demonstration in seconds.
"""

import torch
import torch.nn.functional as F
from torch import nn

VOID = 255  # the train id of pixels without a class: in no loss and in no mean

# our reading: the abstract names no prompts. A handful of frames in which a street class may be met; the mean over
# them belongs to the class, what differs between them (style, light, medium) cancels.
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "a {} in a street scene.",
    "a {} on the road at day.",
    "a blurry photo of a {}.",
    "a dark photo of a {}.",
)


@torch.no_grad()
def original_text_prototypes(clip_model, class_names, templates=TEMPLATES):
    """Eq. 1: the Original Text Prototypes (K, D), unit rows, float32, without gradient.

    Each prompt is normalised before the mean, so that every template has one vote whatever the length of its embedding.
    clip_model is a clip.model.CLIP; templates are strings with one {} for the class name.
    """
    from clip import tokenize  # here, so that the rest of the file needs torch alone

    device = clip_model.token_embedding.weight.device
    rows = []
    for name in class_names:
        tokens = tokenize([template.format(name) for template in templates], context_length=clip_model.context_length)
        text = clip_model.encode_text(tokens.to(device)).float()  # (P, D)
        rows.append(F.normalize(text, dim=1).mean(dim=0))
    return F.normalize(torch.stack(rows), dim=1)


def random_prototypes(num_classes, dim, seed=0):
    """A control: K random directions (K, D), unit rows. They tell what fixed goals are worth without language."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_classes, dim, generator=generator), dim=1)


def shuffled_prototypes(otp, seed=0):
    """A control: the same K points (K, D), each under another class's name: language's geometry without its sense."""
    order = torch.randperm(len(otp), generator=torch.Generator().manual_seed(seed))
    return otp[order.roll(1)][order.argsort()]  # one cycle through all classes: no class keeps its own row


@torch.no_grad()
def source_mean_prototypes(batches, fallback):
    """A control, which the abstract argues against: the mean embedding of each class's source pixels, (K, D), unit rows.

    batches   yields (emb (B, D, h, w), label (B, h, w) with 255 void) of source images
    fallback  (K, D), the row of a class that has no pixel in any batch; the answer is on its device
    """
    num_classes, dim = fallback.shape
    total = torch.zeros(num_classes, dim, dtype=torch.float64)
    for emb, label in batches:
        valid = label != VOID
        total.index_add_(0, label[valid].cpu(), emb.permute(0, 2, 3, 1)[valid].double().cpu())
    found = total.norm(dim=1, keepdim=True) > 0
    return torch.where(found, F.normalize(total, dim=1).float(), fallback.cpu()).to(fallback.device)


class VisualTextPrototypes(nn.Module):
    """Eq. 2: text prototypes after a look at the image; forward(otp (K, D), emb (B, D, h, w), pooled (B, D)) -> (B, K, D).

    # our reading: the abstract names the VTP without a formula. A small transformer decoder (as in DenseCLIP's
    # post-model prompting) lets each class ask the image's positions for what it looks like here.

    Each class name is a query; the memory holds every position of the image and its pooled embedding. gamma scales
    the answer, channel by channel, and starts small: the first VTP is the OTP, and it leaves it only as far as the
    loss pays for. There is no dropout: a step is to be a function of (seed, step) alone.
    """

    def __init__(self, dim, width=256, heads=4, layers=3):
        super().__init__()
        self.query = nn.Linear(dim, width)
        self.memory = nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width))
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.answer = nn.Linear(width, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-3))  # not 0: at 0 the decoder would get no gradient at all

    def forward(self, otp, emb, pooled):
        memory = torch.cat([pooled[:, None], emb.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + hw, D)
        # Unit vectors of width D have entries of order 1 / sqrt(D); a linear layer expects order 1.
        scale = otp.shape[-1] ** 0.5
        query = self.query(otp * scale).expand(len(emb), -1, -1)  # (B, K, width)
        answer = self.answer(self.decoder(query, self.memory(memory * scale)))  # (B, K, D)
        with torch.autocast(emb.device.type, enabled=False):
            return F.normalize(otp.float() + self.gamma * answer.float(), dim=-1)


def _demo():
    """The VTP learns from Eq. 3 what two images show; prints its loss, and how far pixels are from both prototypes."""
    torch.manual_seed(0)
    otp = random_prototypes(4, 16)
    shift = F.normalize(torch.randn(16), dim=0)  # text and pixels live apart, as in CLIP
    label = torch.randint(0, 4, (2, 8, 8))
    emb = F.normalize(otp[label] + shift + 0.3 * torch.randn(2, 8, 8, 16), dim=-1).permute(0, 3, 1, 2)
    model = VisualTextPrototypes(16, width=32, heads=4, layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def radius(prototypes):  # mean distance between a pixel and the prototype of its class
        own = torch.stack([p[y] for p, y in zip(prototypes, label)])  # (B, h, w, D)
        return (emb.permute(0, 2, 3, 1) - own).norm(dim=-1).mean()

    losses = []
    for step in range(61):
        vtp = model(otp, emb, F.normalize(emb.mean((2, 3)), dim=1))
        losses.append(F.cross_entropy(torch.einsum("bdhw,bkd->bkhw", emb, vtp) / 0.1, label))
        if step % 20 == 0:
            print(f"step {step:2d}   loss to VTP {losses[-1]:.3f}   mean distance to OTP {radius(otp.expand(2, -1, -1)):.3f}, "
                  f"to VTP {radius(vtp):.3f}")
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


if __name__ == "__main__":
    _demo()
