"""model.py: CLIP's image tower turned into a dense encoder, with a light decoder on top.

CLIP answers one question per image: which text fits? Its last layer pools all positions into one vector, and where
things are is lost. Segmentation asks at every pixel. So the last projection is applied at every position, and each pixel
gets a vector in the space in which CLIP's text lives. This is where alignment (align.py) starts.

    ResNet     z = c_proj(v_proj(f)) at every position of the last feature map f: the value path of CLIP's attention pool,
               which is what the pool returns if it attends to that position alone (without its position code)
    ViT        z = proj(ln_post(t)) for every patch token t, where CLIP does so for the class token alone
    dilation   a ResNet's last map is refined from stride 32 to 16 or 8 with the same weights (`dilate`)
    centring   the finer map is read where a cell's pixels are, not where the weights look (`_forward_resnet`)

Shapes
    image    (B, 3, H, W)     CLIP-normalised, H and W multiples of 32 (ResNet) or of the patch (ViT): see `pad`
    emb      (B, D, h, w)     unit norm over D; h = H / stride
    logits   (B, K, H/4, W/4) scores of the decoder; the caller resizes them to the label

The last section reads CLIP's weights from a file, and refuses files that would be computed wrongly. It can be left out.

Not here: text (prototypes.py), losses (align.py, ppar.py), the training of toy_clip.pt (toy_clip.py). `python model.py` prints
    ModifiedResNet     emb (2, 64, 8, 8)   CLIP's last layer is met
    VisionTransformer  emb (2, 64, 4, 4)   CLIP's last layer is met
    Notice: an embedding is made of the very cells that CLIP's own forward pass goes through.
"""

import importlib.util
import math
import os
import pickle
import sys
import urllib.request  # noqa: F401  clip.load uses it after a bare `import urllib`
import warnings
import zipfile
from collections import namedtuple

from data import CLASSES, UserError, check_sums, require  # first: it refuses a Python that is too old

import torch
import torch.nn.functional as F
from torch import nn

from prototypes import TEMPLATES


def _explain_import(error):
    """What is wrong with the package `clip`, and the command that mends it, as one sentence."""
    if getattr(error, "name", None) == "pkg_resources":  # setuptools 70 hides the part that clip-anytorch takes, 82 has none
        return ("setuptools has no pkg_resources.packaging here, which CLIP's code needs: "
                "pip install 'setuptools>=71,<82'")
    found = importlib.util.find_spec("clip")
    if found is None:
        return "CLIP's code is not installed: pip install -r requirements.txt"
    folders = found.submodule_search_locations or []
    if any(os.path.isfile(os.path.join(folder, "simple_tokenizer.py")) for folder in folders):  # CLIP's own
        return (f"CLIP's code in {folders[0]} cannot be used ({type(error).__name__}: {error}): "
                f"pip install --force-reinstall -r requirements.txt")
    return (f"the module `clip` that Python finds in {found.origin or folders[0]} is not CLIP's code: rename it "
            f"if it is yours, else pip uninstall -y clip && pip install --force-reinstall --no-deps clip-anytorch")


try:
    with warnings.catch_warnings(action="ignore"):  # setuptools complains about pkg_resources
        import clip
        from clip.clip import _MODELS
        from clip.model import ModifiedResNet, VisionTransformer
except Exception as error:  # a foreign package may fail in any way
    # An import stands outside of what turns errors into sentences (checkpoint.one_sentence), so it is said here.
    sys.exit(f"error: {_explain_import(error)}")

TOY_CLIP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy_clip.pt")  # the small CLIP of the drawn world
Dense = namedtuple("Dense", "logits emb")  # what the network says about a batch of images; shapes as above


# ------------------------------------------------------------------------------------------------------- dense encoder


def architecture(visual):
    """The constructor arguments of CLIP's image tower as a JSON-able dict, so that a checkpoint can rebuild it."""
    if isinstance(visual, VisionTransformer):
        return dict(kind="vit", input_resolution=visual.input_resolution, patch_size=visual.conv1.kernel_size[0],
                    width=visual.conv1.out_channels, layers=len(visual.transformer.resblocks),
                    heads=visual.transformer.resblocks[0].attn.num_heads, output_dim=visual.output_dim)
    return dict(kind="resnet", layers=[len(getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)],
                output_dim=visual.output_dim, heads=visual.attnpool.num_heads,
                input_resolution=visual.input_resolution, width=visual.conv3.out_channels)


def pad(image, multiple):
    """Continue the border pixels to the right and below until both sides are multiples: (B, 3, H, W), any H and W.

    A frame of grey would be an edge that no street has; two sides, so that pixel (0, 0) stays and a slice crops back.
    """
    return F.pad(image, (0, -image.shape[3] % multiple, 0, -image.shape[2] % multiple), mode="replicate")


def _neighbour(x, dim, n):
    """At each cell what stands n cells further on along dim (n < 0: before it); beyond the border, the border's cell."""
    parts = [x.narrow(dim, 0, 1)] * -n  # a list times a negative number is empty
    parts += [x.narrow(dim, max(n, 0), x.shape[dim] - abs(n))] + [x.narrow(dim, -1, 1)] * n
    return torch.cat(parts, dim)  # not by F.pad, whose replication torch 2.15 cannot compile in this place


class _PoolWithoutStride(nn.Module):
    """AvgPool2d(2), evaluated at every position of a map whose neighbours are `dilation` cells apart."""

    def __init__(self, dilation):
        super().__init__()
        self.dilation = dilation

    def forward(self, x):
        x = x + _neighbour(x, 2, self.dilation)
        return (x + _neighbour(x, 3, self.dilation)) / 4


def dilate(resnet, stride):
    """Bring the last map of CLIP's ResNet from stride 32 to `stride` (32, 16 or 8), in place, weights untouched.

    At stride 32 a car of 64 pixels is two cells wide. So the pooling that opens a stage loses its stride, and the 3x3
    convolutions behind it look `dilation` cells away: every 2nd cell (stride 8: 4th) of the new map is one of the old.
    """
    # our reading: the abstract names no stride. Dilation is the way to a finer map that adds no weight to CLIP's.
    require(stride in (8, 16, 32), f"--stride {stride}: a CLIP ResNet can be read at stride 32, 16 or 8.")
    dilation = 1
    for stage, native in ((resnet.layer3, 16), (resnet.layer4, 32)):
        for index, block in enumerate(stage):
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
            if index == 0 and native > stride:  # its pooling comes after conv2, and again on the shortcut
                block.avgpool = block.downsample[0] = _PoolWithoutStride(dilation)
                dilation *= 2


def _resize_position(position, h, w):
    """CLIP's learned position code (1 + g*g, C), its grid resized to h x w: images need not be 224 x 224."""
    grid = round((len(position) - 1) ** 0.5)
    # our reading: bicubic, the usual way of taking a ViT to another size; the abstract says nothing.
    code = F.interpolate(position[1:].T.reshape(1, -1, grid, grid), size=(h, w), mode="bicubic", align_corners=False)
    return torch.cat([position[:1], code.flatten(2)[0].T])


class DenseCLIP(nn.Module):
    """CLIP's image tower with the position kept: image -> (low, z).

    low     (B, C, H/4, W/4) edges, for the decoder: a ResNet's first stage, a ViT's patches at every quarter (14 pixels: half) of one
    z       (B, D, h, w)     dense embedding, not yet normalised (theory.md's z is its direction, `emb`)

    `visual` itself is changed: dilated, and made trainable. Who still needs CLIP as it was hands over a copy.
    """

    def __init__(self, visual, stride):
        super().__init__()
        self.visual = visual.requires_grad_(True)
        self.dim = visual.output_dim
        self.is_vit = isinstance(visual, VisionTransformer)
        if self.is_vit:
            self.stride = self.multiple = visual.conv1.kernel_size[0]  # a ViT cannot be read finer than its patches
            self.low_channels = visual.conv1.out_channels
        else:
            dilate(visual, stride)
            self.stride, self.multiple = stride, 32
            self.low_channels = visual.layer1[-1].conv3.out_channels
            for part in (visual.attnpool.q_proj, visual.attnpool.k_proj, visual.attnpool.positional_embedding):
                part.requires_grad_(False)  # of the pooling, which is left out
        # our reading: batch normalisation stays as CLIP left it, in train() too. Its statistics come from 400 million
        # pictures; a batch of eight frames of a game would overwrite them with the source's colours.
        self.norms = [module.requires_grad_(False) for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for norm in self.norms:
            norm.eval()
        return self

    def freeze(self, stages):
        """Freeze the first `stages` of 5: a ResNet's stem and stages, or a ViT's embedding and the quarters of its blocks."""
        require(0 <= stages <= 5, f"--freeze {stages}: the image tower has 5 stages, give 0 to 5.")
        v = self.visual
        if self.is_vit:
            stem, body = [v.conv1, v.ln_pre, v.class_embedding, v.positional_embedding], list(v.transformer.resblocks)
        else:
            stem, body = [v.conv1, v.conv2, v.conv3], [v.layer1, v.layer2, v.layer3, v.layer4]
        quarter = -(-len(body) // 4)
        # The last projection into the joint space stays trainable: CLIP never asked it to work at single positions.
        for part in stem + body[:(stages - 1) * quarter] if stages else []:
            part.requires_grad_(False)

    def forward(self, image):
        require(not (image.shape[2] % self.multiple or image.shape[3] % self.multiple),
                f"{image.shape[2]} x {image.shape[3]} pixels: both must be multiples of {self.multiple} for this CLIP.")
        return self._forward_vit(image) if self.is_vit else self._forward_resnet(image)

    def _forward_resnet(self, image):
        v = self.visual
        x = v.relu1(v.bn1(v.conv1(image)))
        x = v.relu2(v.bn2(v.conv2(x)))
        x = v.avgpool(v.relu3(v.bn3(v.conv3(x))))
        low = v.layer1(x)  # our reading: the decoder's early map is the first stage, the last one at a quarter of the image
        feat = v.layer4(v.layer3(v.layer2(low)))  # (B, C, h, w)
        # our reading: the abstract does not say how CLIP becomes dense. The value path needs no new weight.
        z = v.attnpool.c_proj(v.attnpool.v_proj(feat.movedim(1, -1))).movedim(-1, 1)  # (B, D, h, w)
        step = 32 // self.stride  # before centring, every step-th cell is one that CLIP itself would have computed
        # our reading: centring. Cell j stands for the pixels from stride * j on, but CLIP's weights look at the middle of
        # the 32 pixels that begin there: at stride 8 at pixel 8 j + 16 instead of 8 j + 4, 1.5 cells too far right and
        # below (at 16: half a cell). So cell j is read between cells j - 2 and j - 1 (at 16: j - 1 and j), as the mean of
        # four neighbours. Without it each label meets a neighbour's embedding, and no error tells.
        for dim in (2, 3) if step > 1 else ():
            z = (_neighbour(z, dim, 1 - step // 2) + _neighbour(z, dim, -(step // 2))) / 2
        return low, z

    def _forward_vit(self, image):
        v = self.visual
        h, w = image.shape[2] // self.stride, image.shape[3] // self.stride
        x = v.conv1(image).flatten(2).transpose(1, 2)  # (B, hw, C)
        x = torch.cat([v.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = v.ln_pre(x + _resize_position(v.positional_embedding, h, w)).transpose(0, 1)  # (1 + hw, B, C), as CLIP has it
        x = v.ln_post(v.transformer.resblocks(x).transpose(0, 1)) @ v.proj  # (B, 1 + hw, D)
        # our reading: no block of a ViT has a finer map, and its tokens know no edge within a patch. But its first layer,
        # which is a convolution, can be read at more places, as a dilated ResNet is: no weight is added to CLIP's.
        step = self.stride // (4 if self.stride % 4 == 0 else 2)
        before = (self.stride - step) // 2  # so that a cell lies in the middle of its patch
        around = F.pad(image, 2 * (before, self.stride - step - before), mode="replicate")
        return F.conv2d(around, v.conv1.weight, stride=step), x[:, 1:].transpose(1, 2).unflatten(2, (h, w))


class SegmentationNet(nn.Module):
    """Dense CLIP and a light decoder: image (B, 3, H, W) -> Dense(logits, emb). The same for every method."""

    def __init__(self, visual, num_classes=19, stride=16, width=None):
        super().__init__()
        self.encoder = DenseCLIP(visual, stride)
        width = width or min(128, 3 * self.encoder.dim // 4 // 8 * 8)  # 3/4 of the joint width; all of OpenAI's CLIPs: 128
        self.arch = dict(visual=architecture(visual), num_classes=num_classes, stride=stride, width=width)  # JSON-able

        # our reading: the abstract says nothing about the head. Ours has two branches as in DeepLabv3+: the embedding
        # knows what, the early map knows where the edges are. Group normalisation, because it has no statistics to
        # carry from the source to a target; no dropout, because a step is to be a function of (seed, step) alone.
        def block(inputs, outputs, kernel):
            return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
                                 nn.GroupNorm(math.gcd(max(1, min(32, outputs // 4)), outputs), outputs), nn.ReLU())

        self.high = block(self.encoder.dim, width, 1)
        self.low = block(self.encoder.low_channels, width // 4, 1)
        self.fuse = block(width + width // 4, width, 3)
        self.classify = nn.Conv2d(width, num_classes, 1)

    @classmethod
    def from_arch(cls, arch):
        """The network that self.arch describes, with fresh weights: for loading a checkpoint without CLIP's file."""
        visual = dict(arch["visual"])
        tower = {"vit": VisionTransformer, "resnet": ModifiedResNet}[visual.pop("kind")]
        return cls(**{**arch, "visual": tower(**visual)})

    def forward(self, image):
        low, z = self.encoder(image)
        emb = F.normalize(z.float(), dim=1)  # a sum of squares in float16 ends at 65504
        # The decoder reads the *normalised* embedding (times sqrt(D), so that its entries are of order 1): the length
        # of z carries no class, but it does carry contrast and brightness, that is, the domain.
        maps = self.high(emb * emb.shape[1] ** 0.5), self.low(low)
        size = (image.shape[2] // 4, image.shape[3] // 4)
        x = torch.cat([F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps], dim=1)
        return Dense(self.classify(self.fuse(x)), emb)


# --------------------------------------------------------------------------------------------- CLIP: from file to model

# A file of weights tells all shapes. It does not tell the number of attention heads and the activation. With
# wrong ones every tensor loads, and every embedding is wrong. All of OpenAI's CLIPs have heads of width 64 and
# QuickGELU. So a file that has the towers of one of them is computed in that way.
# Image tower: (width, blocks, patch; None for a ResNet). Text tower: (width, blocks).
OPENAI = {
    "RN50": ((64, (3, 4, 6, 3), None), (512, 12)),
    "RN101": ((64, (3, 4, 23, 3), None), (512, 12)),
    "RN50x4": ((80, (4, 6, 10, 6), None), (640, 12)),
    "RN50x16": ((96, (6, 8, 18, 8), None), (768, 12)),
    "RN50x64": ((128, (3, 15, 36, 10), None), (1024, 12)),
    "ViT-B/32": ((768, 12, 32), (512, 12)),
    "ViT-B/16": ((768, 12, 16), (512, 12)),
    "ViT-L/14": ((1024, 24, 14), (768, 12)),  # ViT-L/14@336px has the same towers, for larger pictures
}
CONTEXT = 77  # the longest text, in tokens, of all of OpenAI's text towers
VOCABULARY = 49408  # how many different tokens they know
# A file with other towers has to say how it is computed, in one more tensor: named MARK, its bytes COMPUTED.
MARK = "computed_as"
COMPUTED = "clip.model.CLIP: QuickGELU, heads of width 64"


def mark():
    """What a file of our own making holds in addition to its weights: a dict to join to its state dict."""
    return {MARK: torch.tensor(list(COMPUTED.encode()), dtype=torch.uint8)}


def load_clip(name):
    """A CLIP by name (`toy`, `RN50`, `ViT-B/16`, ...) or from a file -> (clip.model.CLIP, one line about it).

    `toy` is the file TOY_CLIP. OpenAI's names go through clip.load: downloaded once into ~/.cache/clip, the hash checked.
    A file is a TorchScript archive (as OpenAI ships) or a state dict. The shapes of the weights tell the architecture, and
    a weight that is missing or left over is an error, never a silent random layer. Frozen, eval, on the CPU, float32.

    UserError for a file that is damaged, of another format, or holds code; with a weight that is not finite; with a
    text tower that cannot read the prompts; with towers that are neither OpenAI's nor marked.
    """
    path = TOY_CLIP if name == "toy" else name
    on_hub = path in clip.available_models()
    require(on_hub or os.path.isfile(path), f"--clip {path}: neither a file nor one of toy, {', '.join(clip.available_models())}.")
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript announces its retirement at every load
            model, known = (clip.load(path, device="cpu")[0], "OpenAI's own file") if on_hub else _from_file(path)
    except UserError:
        raise
    except Exception as error:  # network, disk, a damaged or foreign file: the user needs the reason and what to do
        reason = " ".join(str(getattr(error, "reason", error)).split(". ")[0].split())[:300]  # torch goes on to advise carelessness
        remedy = (f"Fetch {_MODELS[path]} elsewhere and put it into ~/.cache/clip, or pass its path with --clip." if on_hub
                  else "Is it readable?" if isinstance(error, OSError) else FORMATS)
        raise UserError(f"CLIP {path} cannot be loaded ({type(error).__name__}: {reason}). {remedy}") from None
    for key, tensor in model.state_dict().items():
        require(torch.isfinite(tensor).all(),
                f"CLIP {path}: {key} holds weights that are inf or nan: fetch the file again.")
    model = model.float().eval().requires_grad_(False)
    return model, (f"CLIP {name}: {architecture(model.visual)['kind']}, joint width {model.text_projection.shape[1]}, "
                   f"{len(model.state_dict())} tensors loaded, 0 missing, 0 left over; {known}")


def _from_file(path):
    """A TorchScript archive or a state dict, strictly -> (clip.model.CLIP, how activation and heads are known)."""
    state = _read_weights(path)
    _check_format(path, state)
    stated = state.pop(MARK, None)
    known = _check_towers(path, state, stated)
    model = clip.model.build_model(state).float()  # it takes an archive's three sizes out of `state`,
    model.load_state_dict(state)  # and builds in half precision, as OpenAI ships; hence once more
    return model, known


FORMATS = "It must be a TorchScript archive or a plain state dict in OpenAI's format."


def _read_weights(path):
    """What a file holds, on the CPU, in its own precision. A damaged file is refused, and one that holds code.

    Both formats are zip archives, and such an archive holds a check sum of every part. torch does not look at them.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if not head.startswith(b"PK"):  # the first bytes of every zip archive
        raise UserError(f"CLIP {path} {_explain_head(path, head)}")
    try:
        check_sums(path)
    except Exception as error:  # zipfile meets a damaged file with many kinds of errors
        raise UserError(f"CLIP {path} is damaged or not whole ({type(error).__name__}: {error}): "
                        f"fetch it again.") from None
    with zipfile.ZipFile(path) as archive:
        scripted = any(part.endswith("constants.pkl") for part in archive.namelist())
    if scripted:
        return torch.jit.load(path, map_location="cpu").state_dict()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # a pickle may hold code: refused, not run
    except pickle.UnpicklingError:
        raise UserError(f"CLIP {path} holds Python objects and not weights alone (a whole model?); nothing in it was "
                        f"executed. Ask its maker for torch.save(model.state_dict(), ...).") from None


def _explain_head(path, head):
    """What a file is that is no zip archive, told by its first bytes, and what to do with it."""
    if not head:
        return "is empty: fetch it again."
    if head[8:9] == b"{":  # eight bytes of length, then JSON
        return ("is a safetensors file, which is not read here. Convert it, in Python: torch.save("
                f"safetensors.torch.load_file({path!r}), 'new.pt'), and give --clip new.pt.")
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS and not the weights themselves: fetch them, git lfs pull."
    if head.startswith(b"\x80"):  # the first byte of a bare pickle
        return ("is a pickle as torch wrote it before 1.6, without check sums: nobody would notice a flipped bit. "
                "Nothing in it was executed. Write it anew, in Python: torch.save("
                f"torch.load({path!r}), 'new.pt'), and give --clip new.pt.")
    return f"is no archive of weights, it begins with {head[:16]!r}: fetch it again. {FORMATS}"


def _check_format(path, state):
    """Refuse what is no plain state dict with OpenAI's names, and say what makes it one."""
    require(isinstance(state, dict) and state, f"CLIP {path} holds no state dict. {FORMATS}")
    require(not {"arch", "otp", "optimizer"} <= set(state),
            f"CLIP {path} is a checkpoint of train.py: --clip takes the CLIP that a run starts from.")
    inner = [key for key in ("state_dict", "model_state_dict", "model") if isinstance(state.get(key), dict)]
    names = [str(name) for name in (state[inner[0]] if inner else state)]
    if inner or any(name.startswith("module.") for name in names):  # "module.": of several processes
        part = f"[{inner[0]!r}]" if inner else ""
        raise UserError(f"CLIP {path} is a checkpoint of a training run, not a plain state dict. Take the weights "
                        f"out, in Python: torch.save({{k.removeprefix('module.'): v for k, v in "
                        f"torch.load({path!r}){part}.items()}}, 'new.pt'), and give --clip new.pt.")
    require(all(isinstance(tensor, torch.Tensor) for tensor in state.values()),
            f"CLIP {path} holds other things than tensors. {FORMATS}")
    for start, whose in FOREIGN_NAMES.items():
        require(not any(name.startswith(start) for name in names),
                f"CLIP {path} is in the format of {whose} ({start}...), which is not read here: give OpenAI's "
                f"own by name, such as --clip ViT-B/16, or a file in OpenAI's format.")


FOREIGN_NAMES = {  # how a name of a tensor begins, and who calls it so
    "vision_model.": "Hugging Face's transformers",
    "text.": "those CLIPs of open_clip that have another text tower than OpenAI's",
    "visual.trunk.": "those CLIPs of open_clip that have an image tower of timm",
}


def _towers(state):
    """(image tower, text tower) of a state dict, as the table OPENAI has them."""
    def count(start):  # how many blocks have names that begin in this way
        return len({name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)})

    text = (len(state["ln_final.weight"]), count("transformer.resblocks."))
    if "visual.proj" in state:  # a ViT
        width, _, patch, _ = state["visual.conv1.weight"].shape
        return (width, count("visual.transformer.resblocks."), patch), text
    stages = tuple(count(f"visual.layer{n}.") for n in (1, 2, 3, 4))
    return (len(state["visual.layer1.0.conv1.weight"]), stages, None), text


def _check_towers(path, state, stated):
    """Refuse towers that nobody here can compute as they are meant -> a phrase that says how the way is known.

    state: a state dict in OpenAI's format. stated: its mark, a tensor of bytes, or None.
    """
    context, vocabulary = len(state["positional_embedding"]), len(state["token_embedding.weight"])
    tokens = clip.tokenize([template.format(name) for template in TEMPLATES for name in CLASSES])
    longest = (tokens > 0).sum(dim=1).max().item()  # 0 fills the rest of a row
    largest = tokens.max().item()  # the token that ends a text; its number is the largest of all
    require(context >= longest and vocabulary > largest,
            f"CLIP {path}: its text tower reads {context} tokens out of {vocabulary}, and the prompts have up to "
            f"{longest} out of {largest + 1}. Give a CLIP with OpenAI's text tower ({CONTEXT} out of {VOCABULARY}).")
    if stated is not None:
        words = bytes(stated.tolist()).decode(errors="replace")
        require(words == COMPUTED,
                f"CLIP {path} is to be computed as `{words}`; only `{COMPUTED}` is known here.")
        return "QuickGELU and heads of width 64, as the file says"

    image, text = _towers(state)
    alike = [name for name, towers in OPENAI.items() if towers == (image, text)]
    if not alike or (context, vocabulary) != (CONTEXT, VOCABULARY):
        width, blocks, patch = image
        kind = f"ViT of patch {patch}" if patch else "ResNet"
        raise UserError(f"CLIP {path} has not the towers of one of OpenAI's CLIPs (image: {kind}, width {width}, "
                        f"{blocks} blocks; text: width {text[0]}, {text[1]} blocks, {context} tokens out of "
                        f"{vocabulary}). A file does not tell the number of heads and the activation, so this one "
                        f"cannot be computed as its maker meant: give one of "
                        f"{', '.join(clip.available_models())}, or a file with its towers.")
    return (f"towers of {alike[0]}: QuickGELU and heads of width 64 are assumed, as OpenAI's have "
            f"(many of open_clip's have GELU, which no file tells)")


def _demo():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 64, 64)
    for visual in (ModifiedResNet((1, 1, 1, 1), 64, 8, 64, 16).eval(), VisionTransformer(64, 16, 64, 2, 1, 64).eval()):
        last, seen = getattr(visual, "layer4", None) or visual.transformer.resblocks[-1], []
        last.register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad():
            visual(image)
            out = SegmentationNet(visual, stride=8).eval()(image)
        ours = seen[1][..., ::4, ::4] if seen[1].dim() == 4 else seen[1]  # of a ResNet at stride 8, every fourth cell was CLIP's
        difference = ((ours - seen[0]).abs().max() / seen[0].std()).item()
        print(f"{type(visual).__name__:17s}  emb {tuple(out.emb.shape)}   CLIP's last layer is {'met' if difference < 1e-4 else 'MISSED'}")
        assert difference < 1e-4, "of the spread of its numbers: rounding alone"
    print("Notice: an embedding is made of the very cells that CLIP's own forward pass goes through.")


if __name__ == "__main__":
    _demo()
