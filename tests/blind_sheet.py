"""Does the judge of photographs see what the eye sees? Pairs of pictures that are judged without knowing what they are.

python tests/blind_sheet.py draw blind --data data/afhq --set guided=guided.npz --set unguided=unguided.npz
python tests/blind_sheet.py score blind answers.txt --output results/afhq_metric/blind.json

`draw` writes 40 pictures, each four cats of one set above four of another, and key.json, which says what they are. Sets are
each --set, of sample.py --output, and, without --samples-only, photographs (test images) and their reconstructions by the
autoencoder that ships.
Somebody writes into answers.txt, a line a picture, which four look more like real cats: L for the upper four, R for
the lower. `score` compares that with the order in which the MobileNet puts the sets: by its share of recognised cats,
and by its distances.
Photographs (CC BY-NC 4.0) in these pictures are not for the repository."""

import itertools
import json
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))
import libs
from libs.common.cli import Parser, check_output, run
from libs.common.errors import UsageError
from libs.common.files import atomic_file
from libs.common.pictures import sheet, write_png
from libs.common.seeds import seeded_generator
from libs.data.images import ImageSet, read_images, to_uint8
from libs.evaluation import RealImages
from libs.evaluation.features import extract_features
from libs.evaluation.fid import fit_gaussian, frechet_distance, kernel_distance
from libs.tiny_autoencoder import TAESD

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
CONFIG = os.path.join(ROOT, "configs", "afhq_cpu_edm.yaml")
PAIRS, SHOWN = 40, 4


def draw_pairs(names):
    """PAIRS pairs of names, (upper, lower): all combinations in turn, order and places at random."""
    generator = seeded_generator("blind sheet")
    combinations = list(itertools.combinations(names, 2))
    pairs = list(itertools.islice(itertools.cycle(combinations), PAIRS))
    sides = torch.rand(PAIRS, generator=generator) < 0.5
    return [pairs[k][::-1] if sides[k] else pairs[k] for k in torch.randperm(PAIRS, generator=generator).tolist()]


def measure(features, real):
    """What the judge says of a set: see evaluate.py."""
    labels = torch.zeros(len(features), dtype=torch.long)  # all cats
    return {"images": len(features), "recognised": real.extractor.recognised(features, labels, real.train.classes),
            "fd_train": frechet_distance(fit_gaussian(features), real.gaussians["train"]),
            "kd": kernel_distance(features, real.features["train"])[0]}


def draw(args):
    config = libs.load_config(CONFIG)
    config["dataset"]["data_folder"], config["eval"]["features"] = args.data, "mobilenet"
    real = RealImages(config, torch.device("cpu"))
    sets = {}
    if not args.samples_only:
        cats = real.test.take((real.test.labels == real.train.classes.index("cat")).nonzero()[:, 0])
        taesd = TAESD(config["model"]["vae_encoder_weights"], config["model"]["vae_decoder_weights"])
        sets = {"photographs": cats, "reconstructions": ImageSet(torch.cat(
            [to_uint8(taesd.decoder(taesd.encoder(x / 255))) for x in cats.images.split(16)]))}
    for text in args.set:
        name, _, path = text.partition("=")
        if not path or name in sets:
            raise UsageError(f"--set: {text}; must be NAME=FILE.npz, with a name of its own")
        sets[name] = read_images(path, 3, real.train.classes).take()
    least = torch.arange(min(map(len, sets.values())))  # a Frechet distance depends on the number of images
    measures = {name: measure(extract_features(real.extractor, images.take(least).batches()), real)
                for name, images in sets.items()}
    os.makedirs(args.folder)
    turn = {name: 0 for name in sets}  # every picture shows other images of a set
    pairs = draw_pairs(sets)
    for k, pair in enumerate(pairs):
        panels = []
        for side, name in zip("LR", pair):
            index = (torch.arange(SHOWN) + turn[name]) % len(sets[name])
            turn[name] += SHOWN
            panels.append((side, sets[name].take(index).images))
        write_png(os.path.join(args.folder, f"{k:02d}.png"), sheet(panels, SHOWN))
    with atomic_file(os.path.join(args.folder, "key.json")) as f:
        f.write(json.dumps({"judge": real.extractor.hash, "sets": measures, "pairs": pairs}, indent=1).encode())
    print(f"{PAIRS} pictures and key.json, which is not to be read before they are judged, in {args.folder}")


def compare(key, answers):
    """key.json and a list of L and R -> how often eye and judge agree.

    Returns a dict: "wins", name -> share of its pictures that a set won; "agree", measure -> share of the pictures in
    which it prefers the same side.
    """
    shown, won = {name: 0 for name in key["sets"]}, {name: 0 for name in key["sets"]}
    hits = {"recognised": 0, "fd_train": 0, "kd": 0}
    for (upper, lower), answer in zip(key["pairs"], answers):
        chosen, other = (upper, lower) if answer == "L" else (lower, upper)
        shown[upper], shown[lower], won[chosen] = shown[upper] + 1, shown[lower] + 1, won[chosen] + 1
        for name in hits:
            better = key["sets"][chosen][name] - key["sets"][other][name]
            hits[name] += better > 0 if name == "recognised" else better < 0
    n = len(key["pairs"])
    return {"pictures": n, "wins": {name: won[name] / shown[name] for name in shown},
            "agree": {name: hit / n for name, hit in hits.items()}}


def score(args):
    with open(os.path.join(args.folder, "key.json")) as f:
        key = json.load(f)
    with open(args.answers) as f:
        answers = [line.strip().upper() for line in f if line.strip()]
    if len(answers) != len(key["pairs"]) or set(answers) - {"L", "R"}:
        raise UsageError(f"{args.answers}: must be {len(key['pairs'])} lines of L or R")
    found = compare(key, answers)
    with atomic_file(args.output) as f:
        f.write(json.dumps({**key, "answers": "".join(answers), **found}, indent=1).encode())
    print("set: won by eye, recognised, FD (MobileNet) to training images, kernel distance")
    for name in sorted(found["wins"], key=found["wins"].get, reverse=True):
        m = key["sets"][name]
        print(f"{name}: {found['wins'][name]:.0%}, {m['recognised']:.1%}, {m['fd_train']:.0f}, {m['kd']:.2f}")
    print("agree: " + ", ".join(f"{name} {share:.0%}" for name, share in found["agree"].items()))


def parse_args(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=lambda prog, **_: Parser(__doc__, prog))
    one = commands.add_parser("draw")
    one.add_argument("folder", help="a new folder")
    one.add_argument("--data", default=os.path.join(ROOT, "data", "afhq"), help="AFHQ (default data/afhq)")
    one.add_argument("--set", action="append", default=[], metavar="NAME=FILE.npz", help="a set of samples")
    one.add_argument("--samples-only", action="store_true", help="no photographs, no reconstructions")
    two = commands.add_parser("score")
    two.add_argument("folder", help="the folder of draw")
    two.add_argument("answers", help="a text file, L or R in each line")
    two.add_argument("--output", required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    if args.command == "draw" and args.samples_only and len(args.set) < 2:
        parser.error("--samples-only: at least two --set are needed")
    check_output(args.folder if args.command == "draw" else args.output)
    return args


def main(argv=None):
    args = parse_args(argv)
    return draw(args) if args.command == "draw" else score(args)


if __name__ == "__main__":
    run(main)
