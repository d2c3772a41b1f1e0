"""Sharpen a trained decoder against a critic of patches; the encoder, and so latents and their models, stay the same.

python tests/sharpen_decoder.py --data data/afhq --output decoder.pth

A decoder that only minimises the error of pixels answers a latent with the mean of all images that have it, which is
blurred. The critic sees patches of an image beside the latents that it came from and tells photographs from decoded
ones (hinge loss, Lim and Ye 2017; spectral norm, Miyato et al. 2018), and the decoder learns from both (Esser et al.
2021, VQGAN). Images are those of configs/afhq_autoencoder.yaml; on a CPU in bf16."""

import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))
from libs.common.cli import Parser, check_output, positive, run
from libs.common.files import atomic_file, save_tensors
from libs.common.seeds import seed_everything
from libs.tiny_autoencoder import DOWNSCALE, TAESD
from libs.training.autoencoder import EDGES, LATENT_NOISE, distance, evaluate, load_images

SIZE = 128
ADVERSARIAL = 0.5  # norm of the critic's gradient at the image, in units of the pixels' gradient
LR, CRITIC_LR, BETAS = 2e-4, 4e-4, (0.5, 0.99)
WARMUP, DECAY = 300, 0.3  # updates until the critic counts in full; the last part of the updates, whose rates fall
AVERAGED = 0.999  # decay of the decoder's average, which is what is written


def build_critic(width=48):
    """Images in [-1, 1] and latents at their size, B x 7 x H x W -> a score for each patch, B x 1 x H/8 x W/8."""
    layers = [spectral_norm(nn.Conv2d(7, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
    for k in (1, 2):
        layers += [spectral_norm(nn.Conv2d(width * k, width * k * 2, 4, 2, 1)), nn.LeakyReLU(0.2)]
    layers += [spectral_norm(nn.Conv2d(width * 4, width * 4, 3, 1, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(width * 4, 1, 3, 1, 1)))


class Sharpener:
    """A decoder, its critic and their optimizers. `.average` is the decoder's averaged state dict."""

    def __init__(self, model):
        self.model, self.decoder = model, model.decoder.requires_grad_(True)
        self.critic = build_critic().to(memory_format=torch.channels_last)
        self.average = {name: w.detach().clone() for name, w in self.decoder.state_dict().items()}
        self.optimizers = [torch.optim.Adam(self.decoder.parameters(), LR, BETAS),
                           torch.optim.Adam(self.critic.parameters(), CRITIC_LR, BETAS)]
        self.step = 0

    def update(self, images, noise, rate=1.0):
        """One update of the critic and one of the decoder.

        Args:
            images: B x 3 x H x W in [0, 1].
            noise: standard normal, of the latents' shape.
            rate: factor of the learning rates.

        Returns:
            The critic's loss and the decoder's error of pixels, two numbers.
        """
        for optimizer, lr in zip(self.optimizers, (LR, CRITIC_LR)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate * min(1, (self.step + 1) / 100)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = self.model.encoder(images) + LATENT_NOISE * noise
                seen = F.interpolate(latents, scale_factor=DOWNSCALE, mode="bilinear") / 3  # about in [-1, 1]
            decoded = self.decoder(latents)

            def score(x):
                return self.critic(torch.cat([x * 2 - 1, seen], 1)).float()

            loss = F.relu(1 - score(images)).mean() + F.relu(1 + score(decoded.detach())).mean()
        self.descend(self.optimizers[1], loss)

        self.critic.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = -score(decoded).mean()
        difference = decoded.float() - images
        error = distance(difference) + EDGES * (distance(difference.diff(dim=2)) + distance(difference.diff(dim=3)))
        pixels = torch.autograd.grad(error, decoded, retain_graph=True)[0]
        patches = torch.autograd.grad(wanted, decoded)[0]
        weight = ADVERSARIAL * pixels.norm() / (patches.norm() + 1e-6) * min(1, self.step / WARMUP)
        self.descend(self.optimizers[0], decoded, pixels + weight * patches)
        self.critic.requires_grad_(True)

        self.step += 1
        for name, w in self.decoder.state_dict().items():
            self.average[name].lerp_(w, 1 - min(AVERAGED, (1 + self.step) / (10 + self.step)))
        return loss.item(), error.item()

    @staticmethod
    def descend(optimizer, output, gradient=None):
        optimizer.zero_grad()
        output.backward(gradient)
        optimizer.step()


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data", default="data/afhq", help="folder with train/ and test/ (default data/afhq)")
    parser.add_argument("--encoder", default="pretrained/afhq_encoder.pth", help="stays as it is")
    parser.add_argument("--decoder", default="pretrained/afhq_decoder.pth", help="where training starts")
    parser.add_argument("--updates", type=positive, default=11400, help="default 11400: an hour on two cores")
    parser.add_argument("--batch-size", type=positive, default=4, help="default 4")
    parser.add_argument("--output", required=True, metavar="FILE.pth", help="the decoder, in fp16")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    check_output(args.output, args.overwrite)
    return args


def main(argv=None):
    args = parse_args(argv)
    seed_everything(0)
    data = {"name": "AFHQ", "data_folder": args.data, "img_size": SIZE}
    train, test = (load_images(data, split) for split in ("train", "test"))
    sharpener = Sharpener(TAESD(args.encoder, args.decoder).to(memory_format=torch.channels_last))
    generator, started, sums = torch.Generator().manual_seed(0), time.monotonic(), [0, 0]
    print(f"{args.updates:,} updates of {args.batch_size} images; then {args.output}", flush=True)
    for step in range(args.updates):
        images, _ = train.batch(torch.randint(len(train), (args.batch_size,), generator=generator), generator)
        noise = torch.randn(args.batch_size, *TAESD.latent_shape(images.shape[1:]), generator=generator)
        left = 1 - step / args.updates
        losses = sharpener.update(images.to(memory_format=torch.channels_last), noise, min(1, left / DECAY))
        sums = [total + loss for total, loss in zip(sums, losses)]
        if (step + 1) % 500 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"update {step + 1:,}: critic {sums[0] / 500:.3f}, error of pixels {sums[1] / 500:.4f}, "
                  f"{minutes * (args.updates / (step + 1) - 1):.0f} minutes left", flush=True)
            sums = [0, 0]
    sharpener.decoder.load_state_dict(sharpener.average)
    with atomic_file(args.output) as f:
        save_tensors({name: w.half().contiguous() for name, w in sharpener.average.items()}, f)
    figures, _, _ = evaluate(sharpener.model, test, torch.device("cpu"))
    print(f"{args.output}: {len(test)} test images: PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}")


if __name__ == "__main__":
    run(main)
