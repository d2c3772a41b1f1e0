"""What a user would take instead, in the same minutes: lucidrains' classifier-free guidance, trained on MNIST.

python tests/peer_lucidrains.py --minutes 17 --output peer.npz
python code/evaluate.py peer.npz --config configs/mnist_cpu.yaml
python tests/peer_lucidrains.py --weights peer.pt --cond-scale 3 --output other.npz      drawn otherwise, not trained

It is denoising-diffusion-pytorch as it comes: Unet, GaussianDiffusion and EMA have their defaults, and updates are its
Trainer's, but of images in memory, in fp32 on the CPU, with labels (which that one cannot take), not mirrored."""

import os
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))
import libs
from libs.common.cli import Parser, check_output, positive, run
from libs.common.errors import UsageError
from libs.common.files import atomic_file, load_tensors, read_tensors, save_tensors
from libs.data.images import to_uint8, write_npz
from libs.evaluation import labels_like

SIZE = 28  # three levels; padded to 32, for the README's four, an update would take a third longer


def build(dim, dim_mults, sampling_timesteps=1000):
    """Its GaussianDiffusion of digits. With fewer than 1000 sampling_timesteps it draws by its DDIM."""
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
    return GaussianDiffusion(Unet(dim, num_classes=10, dim_mults=tuple(dim_mults), channels=1), image_size=SIZE,
                             timesteps=1000, sampling_timesteps=sampling_timesteps,
                             ddim_sampling_eta=1 - 1e-6)  # its default is 1, where it may take the root of -1e-8


def train(diffusion, dataset, minutes, lr, batch_size):
    """The EMA of `diffusion`, which is trained for so many minutes."""
    from ema_pytorch import EMA
    optimizer = torch.optim.Adam(diffusion.parameters(), lr, betas=(0.9, 0.99))
    ema, losses, updates, order = EMA(diffusion, beta=0.995, update_every=10), [], 0, []
    started = printed = now = time.monotonic()
    while now - started < 60 * minutes:
        order = order or list(torch.randperm(len(dataset)).split(batch_size))  # the next epoch's
        images, labels = dataset.batch(order.pop())
        loss = diffusion(images, classes=labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        losses, updates, now = losses + [loss.item()], updates + 1, time.monotonic()
        if now - printed > 30 or now - started >= 60 * minutes:
            print(f"{(now - started) / 60:.1f} min: {updates:,} updates, loss {sum(losses) / len(losses):.4f}, "
                  f"{updates * batch_size / (now - started):.1f} images/s", flush=True)
            printed, losses = now, []
    return ema.ema_model


def draw(diffusion, labels, cond_scale, rescaled_phi):
    """uint8 images N x 1 x 28 x 28. Its own progress bars go to stderr."""
    cond_scale = 1 + 1e-9 if cond_scale == 1 else cond_scale  # at 1, version 2.3.4 returns one tensor for two
    return torch.cat([to_uint8(diffusion.eval().sample(part, cond_scale, rescaled_phi)) for part in labels.split(200)])


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--output", required=True, metavar="FILE.npz", help="images; the weights go into FILE.pt")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--minutes", type=float, help="of training, without drawing")
    source.add_argument("--weights", metavar="FILE.pt", help="draw with these; nothing is trained")
    parser.add_argument("--dim", type=positive, default=64, help="width (default 64, as in its README)")
    parser.add_argument("--dim-mults", type=positive, nargs="+", default=[1, 2, 4], help="default 1 2 4")
    parser.add_argument("--lr", type=float, default=8e-5, help="default 8e-5, as in its README")
    parser.add_argument("--batch-size", type=positive, default=64, help="default 64; its README: 32, two an update")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--data", default="data", help="where MNIST is, or is downloaded to (default data)")
    parser.add_argument("--num", type=positive, default=10000, help="images to draw (default 10000)")
    parser.add_argument("--sampling-timesteps", type=positive, default=250, help="default 250, as in its README")
    parser.add_argument("--cond-scale", type=float, default=6.0, help="guidance (default 6, its own; none: 1)")
    parser.add_argument("--rescaled-phi", type=float, default=0.7, help="default 0.7, its own")
    args = parser.parse_args(argv)
    if not args.output.endswith(".npz"):
        raise UsageError(f"--output: {args.output} must end in .npz")
    if len(args.dim_mults) > 3:
        raise UsageError(f"--dim-mults: {len(args.dim_mults)} levels; at most 3, as {SIZE} can be halved twice")
    for path in [args.output] + [args.output[:-3] + "pt"] * (not args.weights):
        check_output(path)
    return args


def main(argv=None):
    args = parse_args(argv)
    data, test = (libs.build_dataset("MNIST", split, args.data, value_range=(0, 1))[0] for split in ("train", "test"))
    saved = read_tensors(args.weights) if args.weights else vars(args)
    args.dim, args.dim_mults = saved["dim"], saved["dim_mults"]
    torch.manual_seed(args.seed)
    diffusion = build(args.dim, args.dim_mults, args.sampling_timesteps)
    print(f"{sum(p.numel() for p in diffusion.parameters()):,} parameters, {torch.get_num_threads()} threads: "
          + ", ".join(f"{k} {v}" for k, v in vars(args).items() if v is not None), flush=True)
    if args.weights:
        load_tensors(diffusion.model.state_dict(), saved["unet"], args.weights)
    else:
        diffusion = train(diffusion, data, args.minutes, args.lr, args.batch_size)
        with atomic_file(args.output[:-3] + "pt") as f:
            save_tensors({"dim": args.dim, "dim_mults": args.dim_mults, "unet": diffusion.model.state_dict()}, f)
    torch.manual_seed(args.seed)  # so that --weights draws the same
    labels = labels_like(test.labels, 10, args.num)
    write_npz(args.output, draw(diffusion, labels, args.cond_scale, args.rescaled_phi), labels)


if __name__ == "__main__":
    run(main)
