"""make_clip.py: small random CLIPs of both kinds, and files of them in CLIP's own two formats. A helper of the tests.

CLIP's constructor leaves many weights at 0 or 1 (the last batch norm of every residual branch is zero, so a fresh
ResNet computes almost nothing), and two wrong networks agree when all they compute is nothing. So every norm, its
running statistics and every bias get random values here.
"""

import copy
import warnings

import torch
from torch import nn

with warnings.catch_warnings(action="ignore"):  # clip-anytorch imports pkg_resources, which complains
    from clip.model import CLIP, convert_weights

VOCABULARY = 49408  # what CLIP's tokenizer needs; a test that encodes no text may take less
# A file with other towers than OpenAI's says how it is computed, in one more tensor. Written by hand, as model.py expects it.
MARK = {"computed_as": torch.tensor(list(b"clip.model.CLIP: QuickGELU, heads of width 64"), dtype=torch.uint8)}


def make_clip(kind="resnet", dim=48, resolution=64, layers=None, vocabulary=VOCABULARY, context=77, seed=0):
    """A random clip.model.CLIP, float32, eval, every number of it representable in half precision.

    kind "resnet": layers (1, 2, 2, 2), width 16 (hence 8 heads); "vit": 4 layers, patch 16, width 128 (hence 2 heads).
    The state dict alone tells the architecture, as with OpenAI's: one head for 64 channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = ((1, 2, 2, 2) if layers is None else layers, 16, None) if kind == "resnet" else (layers or 4, 128, 16)
        model = CLIP(dim, resolution, *tower, context, vocabulary, 64, 1, 1).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # wide enough that an image is still an image after ten layers
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            if isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_bias, std=0.3)
                nn.init.normal_(module.out_proj.bias, std=0.3)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(tensor.half())  # then a file in half precision holds exactly this model
    return model


def write_archive(model, path, marked=True):
    """A TorchScript archive like OpenAI's: half precision, and three sizes as buffers in the state dict. Marked or not."""
    model = copy.deepcopy(model)
    convert_weights(model)
    resolution = model.visual.input_resolution
    sizes = dict(input_resolution=resolution, context_length=model.context_length, vocab_size=model.vocab_size)
    for name, size in sizes.items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(size))
    for name, tensor in MARK.items() if marked else ():
        model.register_buffer(name, tensor)
    example = dict(encode_image=torch.zeros(1, 3, resolution, resolution),
                   encode_text=torch.zeros(1, sizes["context_length"], dtype=torch.long))
    with warnings.catch_warnings(action="ignore"), torch.no_grad():  # TorchScript announces its retirement
        torch.jit.trace_module(model, example, check_trace=False).save(str(path))
    return str(path)


def write_state_dict(model, path, marked=True):
    """A plain state dict, float32. Marked or not."""
    torch.save(dict(model.state_dict(), **(MARK if marked else {})), path)
    return str(path)
