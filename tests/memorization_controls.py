"""Does the memorization test find copies, and nothing else? Sets of real digits of which it is known:

python tests/memorization_controls.py --output results/memorization/controls.json

The test is told that 50,000 training digits are all that a model saw. Others, which it did not see, stand for what
the model draws: as they are (nobody may be accused), and with 1 %, 10 % and 100 % of them replaced by copies."""

import io
import json
import os
import sys

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))
import libs
from libs.common.cli import Parser, check_output, positive, progress_bar, run
from libs.common.errors import UsageError, display_path
from libs.common.seeds import seeded_generator
from libs.evaluation.features import extract_features, load_extractor
from libs.evaluation.memorization import LEAST, MemorizationTest

KINDS = ("exact", "shifted", "noisy", "recompressed")
SHARES = (0.01, 0.1, 1.0)
TRAIN = 50000
DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data")


def near_copies(images, kind, generator):
    """Copies of N x C x H x W uint8 images: "exact", "shifted" by a pixel in one of eight directions (edges repeated),
    "noisy" (sigma is 0.1 of the range), "recompressed" (JPEG, quality 75). generator: of the CPU."""
    if kind == "exact":
        return images.clone()
    if kind == "shifted":
        height, width = images.shape[2:]
        corners = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate").byte()
        chosen = torch.randint(len(corners), (len(images),), generator=generator).tolist()
        return torch.stack([image[:, i:i + height, j:j + width]
                            for image, (i, j) in zip(padded, (corners[c] for c in chosen))])
    if kind == "noisy":
        noise = torch.randn(images.shape, generator=generator) * 25.5
        return (images + noise).round().clamp(0, 255).byte()
    return torch.stack([_jpeg(image) for image in images])


def _jpeg(image):
    file = io.BytesIO()
    to_pil_image(image).save(file, "JPEG", quality=75)
    return pil_to_tensor(Image.open(file))


def slip_in(images, train, share, kind, generator=None):
    """Replace a share of `images`, N x C x H x W uint8, by near copies of training images.

    Returns (images, places, sources): the new set, and which of its images are copies of which training images,
    round(share x N) different ones of both.
    """
    count = round(share * len(images))
    generator = generator or seeded_generator("slip_in")
    places = torch.randperm(len(images), generator=generator)[:count]
    sources = torch.randperm(len(train), generator=generator)[:count]
    images = images.clone()
    images[places] = near_copies(train[sources], kind, generator)
    return images, places, sources


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data-folder", default=os.path.relpath(DATA), help="where MNIST is, or is downloaded to")
    parser.add_argument("--num", type=positive, default=2000, help="images in each set (default 2000)")
    parser.add_argument("--output", default="controls.json", metavar="FILE.json",
                        help="a figure of that name in PNG goes beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args(argv)
    if not args.output.endswith(".json"):
        raise UsageError(f"--output: {args.output} must end in .json")
    if args.num < LEAST:
        raise UsageError(f"--num: {args.num} is too few; at least {LEAST}")
    for path in (args.output, args.output[:-4] + "png"):
        check_output(path, args.overwrite)
    return args


def main(argv=None):
    args = parse_args(argv)
    data = {split: libs.build_dataset("MNIST", split, args.data_folder)[0].images for split in ("train", "test")}
    order = torch.randperm(len(data["train"]), generator=seeded_generator("controls"))
    train, fresh = data["train"][order[:TRAIN]], data["train"][order[TRAIN:]][:args.num]
    if len(fresh) < args.num:
        raise UsageError(f"--num: {args.num}; at most {len(fresh)} digits are left")
    extractor = load_extractor("classifier")

    def features(images):
        return extract_features(extractor, images.split(500))

    print(f"{1 + len(KINDS) * len(SHARES)} sets of {args.num:,} images against {TRAIN:,} training images", flush=True)
    test = MemorizationTest(train, data["test"], (features(train), features(data["test"])))
    sets = [("none", 0.0)] + [(kind, share) for kind in KINDS for share in SHARES]
    rows = []
    with progress_bar(len(sets), "set") as bar:
        for kind, share in sets:
            images = slip_in(fresh, train, share, kind)[0] if share else fresh
            report = test.report(images, features(images))
            copies = report["copies"]
            rows.append({"kind": kind, "true_share": share} | {
                key: copies[key] for key in ("detected", "share", "share_low", "share_high", "p_value")} | {
                f"ratio_{space}": report[space]["ratio"] for space in ("pixels", "features")})
            bar.write(f"{kind:<13}{share:>5.0%}  {copies['verdict']}")
            bar.update()
    with open(args.output, "w") as f:
        json.dump({"num": args.num, "train": TRAIN, "classifier": extractor.hash, "level": copies["level"],
                   "sets": rows}, f, indent=1)
    plot(rows, args.output[:-4] + "png")


def plot(rows, path):
    """Estimated against true share, one panel for each kind of copy."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: matplotlib is missing (pip install -r requirements-extra.txt)")
        return
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS):
        panel = [r for r in rows if r["kind"] in (kind, "none")]
        true, found = ([100 * r[key] for r in panel] for key in ("true_share", "share"))
        errors = [[100 * max(r["share"] - r["share_low"], 0) for r in panel],
                  [100 * max(r["share_high"] - r["share"], 0) for r in panel]]
        axis.errorbar(true, found, errors, fmt="none", color="black", capsize=3)
        for x, y, row in zip(true, found, panel):  # filled: the test says "copies"
            axis.plot(x, y, "o", color="black", markerfacecolor="black" if row["detected"] else "white")
        axis.plot([0, 100], [0, 100], color="grey", linewidth=0.7, zorder=0)
        axis.set_xscale("symlog", linthresh=0.5), axis.set_yscale("symlog", linthresh=0.5)
        axis.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"]), axis.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axis.set_title(f"copies, {kind}"), axis.set_xlabel("true share (%)")
    figure.axes[0].set_ylabel("estimated share (%)")
    figure.savefig(path, dpi=150)
    print(f"figure in {display_path(path)}")


if __name__ == "__main__":
    run(main)
