"""Train the digit classifier that judges MNIST samples (libs/evaluation/classifier.py).

python code/train_classifier.py --bf16"""

import math
import os
import time

import torch
import torch.nn.functional as F

from libs import build_dataset
from libs.common.cli import Parser, check_output, positive, progress_bar, run
from libs.common.errors import display_path
from libs.common.files import atomic_file, save_tensors
from libs.common.seeds import seed_everything
from libs.evaluation.classifier import WEIGHTS, DigitClassifier, accuracy, file_hash

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data")
BATCH, MAX_LR = 250, 4e-3


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data-folder", default=os.path.relpath(DATA), help="where MNIST is, or is downloaded to")
    parser.add_argument("--output", default=os.path.relpath(WEIGHTS), help="file to write")
    parser.add_argument("--epochs", type=positive, default=20, help="default 20")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--limit", type=positive, default=60000, help="use the first digits only, to try the script out")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16: fast on processors that support it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check_output(args.output, args.overwrite)
    seed_everything(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_set, test = (build_dataset("MNIST", s, args.data_folder)[0].to(device) for s in ("train", "test"))
    images, labels = train_set.images[:args.limit], train_set.labels[:args.limit]
    print(f"training on {len(images)} digits for {args.epochs} epochs on {device}, then writing {args.output};\n"
          "on two CPU cores an epoch takes about a minute, half of that with --bf16")

    model = DigitClassifier().to(device, memory_format=torch.channels_last)
    steps = math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=MAX_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, epochs=args.epochs, steps_per_epoch=steps)
    for epoch in range(args.epochs):
        start, total = time.time(), 0.0
        model.train()
        with progress_bar(steps, "batch", f"epoch {epoch + 1}", leave=False) as bar:
            for index in torch.randperm(len(images)).to(device).split(BATCH):
                x = augment(images[index].float() / 255)  # always fp32: bf16 would place pixels badly
                with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                bar.update()
        result = accuracy(model.eval(), test.images, test.labels)
        print(f"epoch {epoch + 1:2d}/{args.epochs}  loss {total / steps:.4f}  "
              f"test accuracy {result:.2%}  {time.time() - start:.0f} s", flush=True)

    # the last epoch, whatever the others reached: the test digits choose nothing
    recipe = (f"{len(images)} digits, {args.epochs} epochs, batch {BATCH}, AdamW, one cycle to {MAX_LR}, "
              f"{'bf16' if args.bf16 else 'fp32'}, seed {args.seed}")
    state = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    with atomic_file(args.output) as f:
        save_tensors({"state_dict": state, "test_accuracy": result, "recipe": recipe}, f)
    print(f"wrote {display_path(args.output)} (SHA-256 {file_hash(args.output)}): test accuracy {result:.2%} after {recipe}")


def augment(x):
    """Rotate by up to 12 degrees, scale by up to 12 %, shift by up to 2 pixels. No flips: a mirrored digit is none."""
    u = torch.rand(5, len(x), device=x.device) * 2 - 1
    angle, wide, high = u[0] * math.radians(12), 1 + 0.12 * u[1], 1 + 0.12 * u[2]
    right, down = u[3:] * (2 * 2 / 28)  # in affine_grid's units the image is 2 wide
    rows = [angle.cos() * wide, -angle.sin() * high, right, angle.sin() * wide, angle.cos() * high, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


if __name__ == "__main__":
    run(main)
