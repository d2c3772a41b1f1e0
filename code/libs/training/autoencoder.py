"""Training of TAESD (tiny_autoencoder.py) on one's own images: settings, crops, loss, and measures of quality."""

import torch
import torch.nn.functional as F
from torch import nn

from ..common.errors import UsageError
from ..common.memory import send
from ..common.seeds import seeded_generator
from ..config import complete_config, read_yaml, set_values
from ..datasets import FOLDERS, build_dataset
from ..tiny_autoencoder import DOWNSCALE, TAESD, Block

GRID_ROW = 5  # reconstructions in each row of a run's grids
NAME = "TAESD"  # model_name in its checkpoints, which train.py and sample.py refuse

# the settings of libs/config.py that the autoencoder has; training starts from vae_*_weights, at random where null
USED = {
    "dataset": ("name", "data_folder", "img_size", "limit"),
    "model": ("use_vae", "vae_encoder_weights", "vae_decoder_weights"),
    "train_cfg": ("lr", "epochs", "num_eval_samples", "warmup", "lr_schedule", "optimizer", "betas", "weight_decay",
                  "clip_grad_norm", "ema_decay", "keep_last"),
    "eval": (), "sample_cfg": (),
}

# the recipe
WHOLE_FROM = 0.7  # the part of the training that sees crops; the rest sees whole images
LATENT_NOISE = 0.05  # standard deviation of the noise on latents: those of a diffusion model are not exact either
EDGES = 0.1  # weight of the differences between neighbouring pixels
LATENTS = 0.1  # weight of the latents' mean 0 and standard deviation 1
FREE = 2.5  # latents beyond this are pulled back: TAESD's decoder clamps at 3


def load_settings(path, overrides=()):
    """The configuration of one run, as config.load_config reads it; see `complete_settings`."""
    return complete_settings(set_values(read_yaml(path), overrides))


def complete_settings(given):
    """`complete_config`, with the sections and keys in USED alone.

    Raises UsageError as that does, for a key that is not in USED, and for images that cannot be halved.
    """
    config = complete_config({**given, "model_name": "DDPM"})
    for section, used in USED.items():
        for key in given.get(section) or ():
            if key not in used:
                raise UsageError(f"config: {section}.{key} is no setting of the autoencoder's training"
                                 + (f"; {section} has {', '.join(used)}" if used else ""))
    data = config["dataset"]
    if data["name"] not in FOLDERS:
        raise UsageError(f"config: dataset.name is {data['name']}; the autoencoder learns from a folder of "
                         f"photographs: one of {', '.join(FOLDERS)}")
    size = data["img_size"] = config["model"]["img_shape"][-1]
    if size % (2 * DOWNSCALE):
        raise UsageError(f"config: dataset.img_size is {size}; it must be a multiple of {2 * DOWNSCALE}, as the "
                         "autoencoder learns from crops of half that side, which it divides by 8")
    for section, used in USED.items():
        values = config.pop(section)
        if used:
            config[section] = {key: values[key] for key in used}
    config["model"]["use_vae"] = False  # this is the autoencoder itself
    return config | {"model_name": NAME}


# ---- data

def load_images(data, split, limit=None):
    """ImageDataset of a config's `dataset` section: whole images in [0, 1]; a smaller `img_size` makes crops."""
    size = data["img_size"]
    return build_dataset(data["name"], split, data["data_folder"], size, (0, 1), limit, stored_size=size)[0]


def draw_crops(dataset, config, step, total_steps, device):
    """The images of update `step` and the noise on their latents, a function of (seed, step) alone.

    First `loader.batch_size` crops of half the images' side, then a quarter as many whole images. Learning from crops
    is faster, as they differ more; but all their pixels are near a border, unlike most pixels of whole images.

    Returns (images B x 3 x S x S in [0, 1], noise B x 4 x S/8 x S/8), on `device`.
    """
    size, n = config["dataset"]["img_size"], config["loader"]["batch_size"]
    whole = step >= WHOLE_FROM * total_steps
    dataset.img_size, n = (size, -(-n // 4)) if whole else (size // 2, n)
    generator = seeded_generator(config["seed"], "crops", step)
    images, _ = dataset.batch(torch.randint(len(dataset), (n,), generator=generator), generator)
    noise = torch.randn(n, *TAESD.latent_shape(images.shape[1:]), generator=generator)
    return send(images, device), send(noise, device)


# ---- the model and its loss

class TrainedTAESD(nn.Module):
    """TAESD with gradients, as `.model`; its `forward` is the loss. A path of None starts that half at random."""

    def __init__(self, encoder_path=None, decoder_path=None):
        super().__init__()
        self.model = TAESD(encoder_path, decoder_path).requires_grad_(True)
        for half, path in ((self.model.encoder, encoder_path), (self.model.decoder, decoder_path)):
            if path is None:
                initialize(half)

    def forward(self, images, noise):
        """The loss, a scalar. See draw_crops for the arguments."""
        latents = self.model.encoder(images)
        error = self.model.decoder(latents + LATENT_NOISE * noise).to(images.dtype) - images
        latents = latents.to(images.dtype)  # out of autocast's precision for the sums
        std, mean = torch.std_mean(latents, (0, 2, 3))
        pixels = distance(error)
        edges = distance(error.diff(dim=2)) + distance(error.diff(dim=3))
        moments = mean.square().mean() + (std - 1).square().mean() + F.relu(latents.abs() - FREE).square().mean()
        return pixels + EDGES * edges + LATENTS * moments


def distance(error):
    """Root mean square of each image, averaged: unlike the mean square it weighs all images alike, as PSNR does."""
    return (error.square().mean((1, 2, 3)) + 1e-4).sqrt().mean()


@torch.no_grad()
def initialize(half):
    """Random weights of an encoder or decoder: blocks start as the identity, images as grey."""
    for module in half.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in half.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.conv[-1].weight)
    if half[-1].out_channels == 3:
        half[-1].weight *= 0.1
        half[-1].bias += 0.5


def is_taesd_kernel(name, p):
    """Whether Muon is meant for a weight of TAESD: a kernel of 64 x 64 channels, of neither end."""
    return p.dim() == 4 and p.shape[0] == p.shape[1]


# ---- quality

def psnr(images, others):
    """Peak signal-to-noise ratio in dB of each image, B x C x H x W in [0, 1] -> B: 10 log10(1 / mean square error)."""
    return -10 * (images - others).square().mean((1, 2, 3)).log10()


def ssim(images, others):
    """Structural similarity of each image, B x C x H x W in [0, 1], H and W at least 11 -> B, 1 where they are equal.

    Wang et al. 2004, eq. 13 with its constants: Gaussian window of 11 x 11, sigma 1.5, K = 0.01 and 0.03; the mean over
    all windows that lie in the image, and over the colours.
    """
    window = torch.exp(-(torch.arange(-5, 6, dtype=images.dtype, device=images.device) / 1.5).square() / 2)
    window = window / window.sum()

    def local(x):  # weighted mean in every window
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))
        return F.conv2d(x, window.view(1, 1, 1, 11)).view(*images.shape[:2], -1)

    x, y = local(images), local(others)
    xx, yy, xy = local(images ** 2) - x ** 2, local(others ** 2) - y ** 2, local(images * others) - x * y
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * x * y + c1) * (2 * xy + c2) / ((x ** 2 + y ** 2 + c1) * (xx + yy + c2))).mean((1, 2))


@torch.no_grad()
def evaluate(model, dataset, device, n=None, keep=0):
    """Reconstruct the images of an ImageDataset whose `augment` is off, in fp32, clamped to [0, 1].

    Args:
        model: TAESD.
        n: number of images, spread over the set; None: all.
        keep: number of images that are returned.

    Returns:
        (figures, images keep x 3 x S x S, their reconstructions), the latter two on the CPU. figures: "psnr" in dB and
        "ssim", means over the images; "latents": "mean" and "std" of each channel, the "largest" absolute value, and
        "beyond_2.5", the share that is larger than 2.5.
    """
    index = torch.linspace(0, len(dataset) - 1, min(n or len(dataset), len(dataset))).long()
    values, latents, kept = [], [], []
    for part in index.split(16):
        images = dataset.batch(part)[0].to(device)
        latents.append(model.encoder(images))
        others = model.decoder(latents[-1]).clamp(0, 1)
        values.append(torch.stack([psnr(images, others), ssim(images, others)]))
        kept.append((images[:keep].cpu(), others[:keep].cpu()))
        keep -= len(kept[-1][0])
    latents = torch.cat(latents)
    std, mean = torch.std_mean(latents, (0, 2, 3))
    figures = dict(zip(("psnr", "ssim"), torch.cat(values, 1).mean(1).tolist()))
    figures["latents"] = {"mean": mean.tolist(), "std": std.tolist(), "largest": float(latents.abs().max()),
                          "beyond_2.5": float((latents.abs() > 2.5).float().mean())}
    images, others = (torch.cat(x) for x in zip(*kept))
    return figures, images, others
