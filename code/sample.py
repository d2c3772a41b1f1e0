"""Draw images from a trained model:  python ./sample.py ../pretrained/mnist_cpu.pth.tar"""

import torch
from torchvision.utils import save_image
from tqdm import tqdm

import libs
from cli import Parser, check_output, positive, run
from libs.errors import UsageError
from libs.seeds import image_noise, seeded_generator
from libs.training import pick_device


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py")
    parser.add_argument("--labels", default="", metavar="L,L,...", help="classes to draw (default: all)")
    parser.add_argument("--num", type=positive, default=10, help="images per class, one row each (default 10)")
    parser.add_argument("--sampler", default=None, help="the config's if not given")
    parser.add_argument("--steps", type=positive, default=None, help="sampler steps; the config's if not given")
    parser.add_argument("--guidance-scale", type=float, default=None, help="the config's if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive, default=100)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--output", default="samples.png", help="PNG file (default samples.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args()
    check_output(args.output, args.overwrite)
    return args


def parse_labels(text, num_classes):
    try:
        return torch.tensor([int(x) for x in text.split(",")]) if text else torch.arange(num_classes)
    except ValueError:
        raise UsageError(f"--labels: {text!r} is no list of integers such as 3,1,4") from None


def draw_images(model, labels, options, seed=0, batch_size=100, device="cpu"):
    """Yield images B x C x H x W in [0, 1], batch by batch.

    With a deterministic sampler image k depends on (seed, k, its label) alone, not on the batch it is in.
    """
    generator = seeded_generator(seed, "sampler", device=device)
    for numbers in torch.arange(len(labels)).split(batch_size):
        noise = image_noise(seed, numbers, model.img_shape).to(device)
        yield model.sample(labels[numbers].to(device), noise=noise, generator=generator, **options).cpu()


def main():
    args = parse_args()
    model, config = libs.load_model(args.checkpoint)
    device = pick_device([args.device])
    labels = parse_labels(args.labels, model.num_classes)
    model.check_labels(labels)
    labels = labels.repeat_interleave(args.num)
    options = libs.sampling_options(config, sampler=args.sampler, steps=args.steps,
                                    guidance_scale=args.guidance_scale)
    print(f"drawing {len(labels)} images into {args.output}: "
          + ", ".join(f"{k} {v}" for k, v in options.items() if v is not None), flush=True)
    with tqdm(total=len(labels), unit="image", disable=None) as bar:
        images = []
        for batch in draw_images(model.to(device), labels, options, args.seed, args.batch_size, device):
            images.append(batch)
            bar.update(len(batch))
    try:
        save_image(torch.cat(images), args.output, nrow=args.num, padding=1)
    except (OSError, ValueError) as e:
        raise UsageError(f"--output: cannot write {args.output} ({e})") from None


if __name__ == "__main__":
    run(main)
