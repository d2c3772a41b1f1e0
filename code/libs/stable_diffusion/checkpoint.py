"""From a file of Stable Diffusion 1.x, official layout, to a model. Every tensor is used, or known to be unneeded."""

import re

import torch

from ..blocks import SinusoidalPE
from ..common.errors import UsageError
from .autoencoder import AutoencoderKL
from .files import read_tensors
from .model import StableDiffusion
from .text import TextEncoder, Tokenizer
from .unet import SDUNet

UNET, AUTOENCODER, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
PARTS = {UNET: ("unet", SDUNet), AUTOENCODER: ("autoencoder", AutoencoderKL), TEXT: ("text_encoder", TextEncoder)}

# tensors that a file may hold and that are not needed
IGNORED = (
    # the noise schedule, which is computed here
    r"betas|alphas_cumprod(_prev)?|sqrt_\w+_cumprod|log_one_minus_alphas_cumprod|posterior_\w+|logvar",
    r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids",  # 0 to 76
    r"model_ema\..*",  # the weights' average, if it is not taken
    r"first_stage_model\.loss\..*",
    r"cond_stage_model\.(.*\.)?(logit_scale|text_projection(\.weight)?)",  # CLIP's, to compare texts with images
)

# how a tensor's name begins in files that are often taken for one of Stable Diffusion 1.x
FAMILIES = (
    (r"(.*[._])?lora[._]|lycoris_", "a LoRA, a change to a model"),
    (r"conditioner\.embedders\.", "Stable Diffusion XL"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2.x"),
    (r"(unet|vae|text_encoder)\.|(encoder\.)?down_blocks\.", "a model whose tensors have diffusers' names"),
)


def load_checkpoint(path, dtype=None, device="cpu", ema=True, model=None):
    """The model in a file of Stable Diffusion 1.1 to 1.5, or fine-tuned from it: a StableDiffusion in eval mode.

    Weights that need no conversion stay in the mapped file, so that loading takes no memory for them.

    Args:
        path: .safetensors, or .ckpt, of which only tensors are read; fp32, fp16 or bf16.
        dtype: of UNet and text encoder; None: fp16 on an NVIDIA GPU, else fp32. The autoencoder is always fp32.
        device: where the model goes.
        ema: take the averaged weights if the file has them beside the plain ones; False: the plain ones.
        model: {"unet": {...}, "autoencoder": {...}, "text_encoder": {...}}, arguments for a model of other sizes.

    Raises:
        UsageError: no such file, a damaged one, another model's, missing or unexpected tensors, wrong shapes,
            weights that are not finite.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    tensors = modern_names(read_tensors(path))
    check_family(path, tensors)
    parts = build_parts(model)
    averaged = ema and take_average(tensors, parts)
    check_tensors(path, tensors, parts)
    tokenizer = Tokenizer()
    for prefix, part in parts.items():
        # to() returns the tensor itself if nothing changes
        part.load_state_dict({name: tensors.pop(prefix + name).to(device, precision(prefix, dtype))
                              for name in part.state_dict()}, assign=True)
    parts[UNET].time_pe = SinusoidalPE(parts[UNET].time_pe.dim).to(device, dtype)  # its buffer is in no checkpoint
    sd = StableDiffusion(*parts.values(), tokenizer).to(device)
    sd.weights = "ema" if averaged else "plain"
    return sd


def build_parts(model=None):
    """{prefix in the checkpoint: module}, without memory for the weights. model: see `load_checkpoint`."""
    with torch.device("meta"):
        return {prefix: kind(**(model or {}).get(name, {})) for prefix, (name, kind) in PARTS.items()}


def precision(prefix, dtype):
    """The autoencoder is always fp32, since in half precision some overflow."""
    return torch.float32 if prefix == AUTOENCODER else dtype


def weight_bytes(parts, dtype):
    """Memory of all weights, with UNet and text encoder in `dtype`."""
    return sum(p.numel() * precision(prefix, dtype).itemsize
               for prefix, part in parts.items() for p in part.parameters())


def expected_shapes(parts):
    """{name in the checkpoint: shape} of all weights."""
    return {prefix + name: tuple(t.shape) for prefix, part in parts.items() for name, t in part.state_dict().items()}


def modern_names(tensors):
    """Some fine-tuned files lack the level "text_model." in the text encoder's names."""
    pattern = re.compile(r"cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)")
    return {pattern.sub(TEXT, name): tensor for name, tensor in tensors.items()}


def check_family(path, tensors):
    """Raise UsageError for another model's file, by its name."""
    family = next((family for pattern, family in FAMILIES if any(re.match(pattern, name) for name in tensors)), None)
    first = tensors.get(UNET + "input_blocks.0.0.weight")
    if first is not None and tuple(first.shape[1:2]) == (9,):
        family = "an inpainting model (its UNet takes 9 channels, not 4)"
    if family:
        raise UsageError(f"checkpoint: {path} is of {family}; this is for Stable Diffusion 1.1 to 1.5 and models "
                         "fine-tuned from them, in one file of the official layout")


def take_average(tensors, parts):
    """Put the UNet's averaged weights, if the file has them, in place of the plain ones; returns whether it has them.

    The official code leaves the dots out of the averages' names.
    """
    averages = {name: "model_ema." + name.removeprefix("model.").replace(".", "")
                for name in expected_shapes(parts) if name.startswith(UNET)}
    if not all(average in tensors for average in averages.values()):
        return False
    tensors |= {name: tensors[average] for name, average in averages.items()}
    return True


def check_tensors(path, tensors, parts):
    """Raise UsageError unless the file has all tensors, finite and in their shapes, and no unknown ones."""
    shapes = expected_shapes(parts)
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": sorted(name for name in tensors.keys() - shapes.keys()
                             if not any(re.fullmatch(pattern, name) for pattern in IGNORED)),
        "of another shape": [f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
                             for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape],
        "of integers": [name for name in shapes if name in tensors and not tensors[name].is_floating_point()],
    }
    texts = [f"tensors {problem}: {len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
             for problem, names in problems.items() if names]
    if texts:
        raise UsageError(f"checkpoint {path} is not of Stable Diffusion 1.x: {'; '.join(texts)}")
    for name in shapes:
        if not torch.stack(tensors[name].aminmax()).isfinite().all():  # quick, and NaN shows in both
            raise UsageError(f"checkpoint {path}: {name} is not finite")
