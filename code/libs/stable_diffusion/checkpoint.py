"""From a file of Stable Diffusion 1.x, official layout, to a model. Every tensor is used, or ignored for a reason."""

import os
import re

import torch

from ..blocks import SinusoidalPE
from ..common.errors import UsageError
from .autoencoder import AutoencoderKL
from .files import aligned, read_tensors
from .memory import check_memory
from .model import StableDiffusion
from .text import TextEncoder, Tokenizer
from .unet import SDUNet

UNET, AUTOENCODER, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
PARTS = {UNET: ("unet", SDUNet), AUTOENCODER: ("autoencoder", AutoencoderKL), TEXT: ("text_encoder", TextEncoder)}

# what a file may hold besides, and why it is not needed
IGNORED = (
    (r"(betas|alphas_cumprod(_prev)?|sqrt_\w+_cumprod|log_one_minus_alphas_cumprod|posterior_\w+|logvar)",
     "of the noise schedule (worked out anew)"),
    (r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids", "of positions (0 to 76)"),
    (r"model_ema\..*", "of the weights' average"),
    (r"first_stage_model\.loss\..*", "of the autoencoder's loss"),
    (r"cond_stage_model\.(.*\.)?(logit_scale|text_projection(\.weight)?)", "for comparing texts with images"),
)

# (how a name begins, whose file has one): none is in a file of Stable Diffusion 1.x
FAMILIES = (
    (r"(.*[._])?lora[._]|lycoris_|.*\.(hada|lokr)_w", "a LoRA, a change to a model"),
    (r"conditioner\.embedders\.", "Stable Diffusion XL"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2.x"),
    (r"model\.diffusion_model\.label_emb\.", "Stable Diffusion XL"),  # and 2.x unCLIP's, which is caught above
    (r"(.*\.)?joint_blocks\.", "Stable Diffusion 3"),
    (r"(.*\.)?double_blocks\.", "Flux"),
    (r"control_model\.", "a ControlNet"),
    (r"emb_params", "a textual inversion, a word for a model"),
    (r"(unet|vae|text_encoder)\.", "a model whose tensors have diffusers' names"),
    (r"down_blocks\.|(en|de)coder\.(down|up)_blocks\.", "one part of a model in diffusers' folder layout"),
    (r"(text_model\.)?encoder\.layers\.", "a text encoder alone"),
    (r"decoder\.mid\.", "an autoencoder alone"),
    (r"(model\.)?encoder\.0\.2\.", "this project's train.py, which sample.py draws from"),
)
CHANNELS = {9: "an inpainting model", 8: "InstructPix2Pix", 5: "a depth-to-image model"}


def load_checkpoint(path, dtype=None, device=None, ema=True, vocabulary=None, model=None):
    """The model in a file of Stable Diffusion 1.1 to 1.5, or fine-tuned from it: a StableDiffusion in eval mode.

    Weights that need no conversion stay in the mapped file, so that loading takes no memory for them.

    Args:
        path: .safetensors, or .ckpt, of which only tensors are read; fp32, fp16 or bf16.
        dtype: of UNet and text encoder; None: fp16 on a GPU of NVIDIA's, else fp32. See `precision`.
        device: where the model goes; None: the CPU.
        ema: take the averaged weights where the file has them beside the plain ones; False: the plain ones.
        vocabulary: see Tokenizer.
        model: {"unet": {...}, "autoencoder": {...}, "text_encoder": {...}}, arguments for a model of other sizes.

    Raises:
        UsageError: no such file, a damaged one, another model's, missing or unexpected tensors or wrong shapes
            (counted, the first five named), too little memory.
    """
    if os.path.isdir(path):
        layout = "is diffusers' folder layout" if "model_index.json" in os.listdir(path) else "is a folder"
        raise UsageError(f"checkpoint: {path} {layout}; it must be one file, .safetensors or .ckpt, such as "
                         "v1-5-pruned-emaonly.safetensors")
    device = torch.device(device or "cpu")
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    tokenizer = Tokenizer(vocabulary)
    parts = build_parts(model)
    tensors = modern_names(read_tensors(path))
    check_family(path, tensors)
    replaced = take_average(path, tensors, parts) if ema else None
    ignored = check_tensors(path, tensors, parts)
    if replaced:
        ignored["of plain weights, as the averaged ones are taken"] = replaced
    check_memory(device, weight_bytes(parts, dtype), "the model", "take half precision, or close other programs")

    for prefix, part in parts.items():
        # to(): the tensor itself where nothing changes
        part.load_state_dict({name: aligned(tensors.pop(prefix + name)).to(device, precision(prefix, dtype))
                              for name in part.state_dict()}, assign=True)
    parts[UNET].time_pe = SinusoidalPE(parts[UNET].time_pe.dim).to(device, dtype)  # has no weights, but a buffer
    sd = StableDiffusion(*parts.values(), tokenizer).to(device)
    sd.weights = "plain" if replaced is None else "ema"
    said = ", ".join(f"{counted(count)} {why}" for why, count in ignored.items())
    sd.summary = f"{'' if replaced is None else 'averaged weights taken; '}ignored: {said or 'nothing'}"
    return sd


def build_parts(model=None):
    """{prefix in the checkpoint: module}, without memory for the weights."""
    with torch.device("meta"):
        return {prefix: kind(**(model or {}).get(name, {})) for prefix, (name, kind) in PARTS.items()}


def precision(prefix, dtype):
    """The autoencoder is in fp32 always, since half precision overflows in some."""
    return torch.float32 if prefix == AUTOENCODER else dtype


def weight_bytes(parts, dtype):
    """Memory of all weights, with UNet and text encoder in `dtype`."""
    return sum(p.numel() * precision(prefix, dtype).itemsize
               for prefix, part in parts.items() for p in part.parameters())


def expected_shapes(parts):
    """{name in the checkpoint: shape} of all weights."""
    return {prefix + name: tuple(t.shape) for prefix, part in parts.items() for name, t in part.state_dict().items()}


def modern_names(tensors):
    """Some fine-tuned files lack a level in the text encoder's names."""
    old, new = "cond_stage_model.transformer.", TEXT
    return {new + name[len(old):] if name.startswith((old + "embeddings.", old + "encoder.", old + "final_layer_norm."))
            else name: t for name, t in tensors.items()}


def check_family(path, tensors):
    """Raise UsageError for another model's file, by name."""
    found = next((what for pattern, what in FAMILIES if any(re.match(pattern, name) for name in tensors)), None)
    first = tensors.get(UNET + "input_blocks.0.0.weight")
    if first is not None and first.dim() == 4 and first.shape[1] in CHANNELS:
        found = f"{CHANNELS[first.shape[1]]} (its UNet takes {first.shape[1]} channels, not 4)"
    if found:
        raise UsageError(f"checkpoint: {path} is of {found}; this is for Stable Diffusion 1.1 to 1.5 and models "
                         "fine-tuned from them, in one file of the official layout")


def take_average(path, tensors, parts):
    """Put the UNet's averaged weights in place of the plain ones; returns how many of those there were, None without an
    average. In the averages' names the official code leaves the dots out."""
    names = {name: "model_ema." + name[len("model."):].replace(".", "") for name in expected_shapes(parts)
             if name.startswith(UNET)}
    missing = [average for average in names.values() if average not in tensors]
    if len(missing) == len(names):
        return None
    if missing:
        raise UsageError(f"checkpoint {path}: of the averaged weights {counted(len(missing), 'missing')} "
                         f"({first_five(missing)}); take the plain ones (txt2img.py: --weights plain)")
    replaced = sum(name in tensors for name in names)
    for name, average in names.items():
        tensors[name] = tensors.pop(average)
    return replaced


def counted(n, what=""):
    """1 tensor, 2 tensors; 1 tensor is `what`, 2 tensors are `what`."""
    return f"{n} tensor{'s' * (n != 1)}" + (f" {'is' if n == 1 else 'are'} {what}" if what else "")


def first_five(names):
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def check_tensors(path, tensors, parts):
    """Raise UsageError unless the file has all tensors, in their shapes, and no unknown ones.

    Returns {why: how many} of those that are not used.
    """
    shapes, ignored, unexpected = expected_shapes(parts), {}, []
    for name in tensors.keys() - shapes.keys():
        why = next((why for pattern, why in IGNORED if re.fullmatch(pattern, name)), None)
        if why:
            ignored[why] = ignored.get(why, 0) + 1
        else:
            unexpected.append(name)
    problems = [("missing", [name for name in shapes if name not in tensors]), ("unexpected", sorted(unexpected)),
                ("of another shape", [f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
                                      for name, shape in shapes.items()
                                      if name in tensors and tuple(tensors[name].shape) != shape]),
                ("of whole numbers", [f"{name} {tensors[name].dtype}" for name in shapes if name in tensors
                                      and not tensors[name].is_floating_point()])]
    said = {what: f"{counted(len(names), what)} ({first_five(names)})" for what, names in problems if names}
    if said.keys() == {"unexpected"}:
        raise UsageError(f"checkpoint {path} has all tensors of Stable Diffusion 1.x, but {said['unexpected']}; what "
                         "such a model draws is not known here, so it is refused")
    if said:
        raise UsageError(f"checkpoint {path} is not of Stable Diffusion 1.x: {'; '.join(said.values())}")
    return dict(sorted(ignored.items()))
