"""How many samples a reader of digits takes for what they should be:

python ./evaluate.py ../pretrained/mnist_cpu.pth.tar --num 1000
"""

import json
import time

import torch
from tqdm import tqdm

import libs
from cli import Parser, check_output, positive, run
from libs.classifier import file_hash, load_classifier
from libs.errors import UsageError
from libs.training import pick_device
from sample import draw_images


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py, of an MNIST model")
    parser.add_argument("--num", type=positive, default=1000, help="images to draw, the classes in turn (default 1000)")
    parser.add_argument("--steps", type=positive, default=None, help="sampler steps; the config's if not given")
    parser.add_argument("--guidance-scale", type=float, default=None, help="the config's if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive, default=200)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--output", default="", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args()
    if args.output:
        check_output(args.output, args.overwrite)
    model, config = libs.load_model(args.checkpoint)
    if config["dataset"]["name"] != "MNIST":
        raise UsageError(f"{args.checkpoint} was trained on {config['dataset']['name']}; the classifier reads MNIST alone")
    if args.num < model.num_classes:
        raise UsageError(f"--num: {args.num} is too few; {model.num_classes} is one of each class")
    device = pick_device([args.device])
    classifier = load_classifier(device=device)
    options = libs.sampling_options(config, steps=args.steps, guidance_scale=args.guidance_scale)
    labels = torch.arange(args.num) % model.num_classes

    print(f"drawing {args.num} images with " + ", ".join(f"{k} {v}" for k, v in options.items() if v is not None)
          + f", seed {args.seed}", flush=True)
    started, right = time.time(), torch.zeros(model.num_classes, dtype=torch.long)
    with tqdm(total=args.num, unit="image", disable=None) as bar:
        images = draw_images(model.to(device), labels, options, args.seed, args.batch_size, device)
        for batch, wanted in zip(images, labels.split(args.batch_size)):
            hit = classifier(batch.to(device)).argmax(1).cpu() == wanted
            right += torch.bincount(wanted[hit], minlength=model.num_classes)
            bar.update(len(batch))
    figures = {
        "label_accuracy": int(right.sum()) / args.num, "num": args.num, "seed": args.seed, **options,
        "accuracy_by_class": (right / torch.bincount(labels, minlength=model.num_classes)).tolist(),
        "classifier": file_hash(), "classifier_test_accuracy": classifier.test_accuracy,
        "seconds": round(time.time() - started, 1),
    }
    print(f"label accuracy {figures['label_accuracy']:.2%} of {args.num} images, by the classifier {file_hash()} "
          f"({classifier.test_accuracy:.2%} on the MNIST test set); {figures['seconds']:.0f} s")
    if args.output:
        with open(args.output, "w") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    run(main)
