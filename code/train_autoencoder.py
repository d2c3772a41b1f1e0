"""Train the tiny autoencoder for latent diffusion on a folder of images, or measure one.

python code/train_autoencoder.py configs/afhq_autoencoder.yaml
python code/train_autoencoder.py --resume logs/RUN
python code/train_autoencoder.py configs/afhq_autoencoder.yaml --evaluate encoder.pth decoder.pth --output r.json

Leaves encoder.pth and decoder.pth, in TAESD's layout and fp16, in the run folder: for model.vae_encoder_weights and
model.vae_decoder_weights.
"""

import json
import os
from contextlib import nullcontext

from libs.common.checkpoint import set_aside_later
from libs.common.cli import Parser, add_training_flags, check_output, run
from libs.common.errors import UsageError, display_path
from libs.common.files import atomic_file, save_tensors
from libs.common.pictures import grid, write_png
from libs.common.seeds import seed_everything
from libs.data.folders import find_split
from libs.datasets import describe_dataset
from libs.evaluation import file_hash
from libs.tiny_autoencoder import TAESD
from libs.training.autoencoder import (GRID_ROW, WHOLE_FROM, TrainedTAESD, complete_settings, draw_crops, evaluate,
                                       is_taesd_kernel, load_images, load_settings)
from libs.training.device import autocast, memory_format, pick_device, pick_precision
from libs.training.distributed import World
from libs.training.resume import check_data, find_place, restore
from libs.training.run_folder import Claim, RunFolder, TrainingLog, describe, resume_command
from libs.training.update import Signals, Trainer

QUICK = 32  # test images that are measured during training


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_training_flags(parser)
    parser.add_argument("--evaluate", nargs=2, metavar=("ENCODER", "DECODER"),
                        help="only measure these weights on the held-out images; --output then names the figures,\n"
                        "FILE.json (default autoencoder.json), beside which comes a picture")
    args = parser.parse_args(argv)
    if args.evaluate:
        args.output = args.output or "autoencoder.json"
        if args.dry_run or args.resume or not args.config:
            raise UsageError("--evaluate: takes a config, and neither --resume nor --dry-run")
        if not args.output.endswith(".json"):
            raise UsageError(f"--output: {args.output} must end in .json")
        for path in (args.output, f"{args.output.removesuffix('.json')}.png"):
            check_output(path)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.evaluate:
        return measure(args)
    with nullcontext() if args.dry_run else Claim() as claim:
        return train(args, claim)


def train(args, claim):
    # ---- 1. Configuration
    config, folder, resume_path, state = find_place(args, claim, load_settings, complete_settings)
    cfg, data, batch_size = config["train_cfg"], config["dataset"], config["loader"]["batch_size"]
    seed_everything(config["seed"])
    device = pick_device(config["devices"][0])
    precision = pick_precision(config["dtype"], device)

    # ---- 2. Model
    _, num_images = describe_dataset(data["name"], "train", data["data_folder"], data["limit"])
    model = TrainedTAESD(config["model"]["vae_encoder_weights"], config["model"]["vae_decoder_weights"])
    updates = max(num_images // batch_size, 1)  # an epoch: as many crops as there are images
    describe(config, model, num_images, updates, device, precision, folder)
    print(f"an update: {batch_size} crops of half the images' side; after {WHOLE_FROM:.0%} of the training "
          f"{-(-batch_size // 4)} whole images", flush=True)
    if args.dry_run:
        return

    # ---- 3. Data, optimizer and averages; resume
    test, split = held_out(data)
    dataset = load_images(data, "train", data["limit"]).to(device)
    model.to(device, memory_format=memory_format(device))
    facts = {"updates_per_epoch": updates}
    trainer = Trainer(model, cfg, device, precision, cfg["epochs"] * updates, is_taesd_kernel)
    if state:
        check_data(state, resume_path, data["data_folder"], facts)
        restore(trainer, state, resume_path)
        set_aside_later(resume_path)
        print(f"resumed from {display_path(resume_path)}: update {trainer.step}", flush=True)
        del state

    # ---- 4. Run folder
    signals = Signals()
    out = RunFolder(folder, config, trainer, batch_size, args, claim)
    folder = out.path
    out.last_checkpoint = resume_path
    log = TrainingLog(out, model, World(), batch_size, cfg["epochs"])

    # ---- 5. Training
    model.train()
    while trainer.epoch < cfg["epochs"] and not signals.received:
        train_one_epoch(trainer, dataset, config, updates, precision, log, signals)
        is_final = trainer.epoch == cfg["epochs"]
        if is_final or signals.received or trainer.epoch % args.ckpt_freq == 0:
            with log.paused():
                out.save(facts, is_final)
                if is_final or not signals.received:
                    show_reconstructions(out, test, split)
    out.close()
    if trainer.epoch < cfg["epochs"]:
        out.print(f"saved {display_path(out.last_checkpoint)}; go on with: {resume_command(folder)}")
        return 128 + signals.received

    # ---- 6. The weight files that latent diffusion takes
    files = [os.path.join(folder, f"{half}.pth") for half in ("encoder", "decoder")]
    for path, module in zip(files, (trainer.ema.module.model.encoder, trainer.ema.module.model.decoder)):
        with atomic_file(path) as f:
            save_tensors({name: w.half().cpu().contiguous() for name, w in module.state_dict().items()}, f)
    print(f"done: {display_path(files[0])} and decoder.pth, for model.vae_encoder_weights and "
          "model.vae_decoder_weights", flush=True)
    write_report(*files, data, test, split, device, os.path.join(folder, "evaluation"))


def train_one_epoch(trainer, dataset, config, updates, precision, log, signals):
    """The updates of one epoch that are not done yet; a signal ends it early."""
    while trainer.batch < updates and not signals.received:
        images, noise = draw_crops(dataset, config, trainer.step, trainer.total_steps, trainer.device)
        with autocast(trainer.device, precision):
            loss = trainer.model(images, noise)
        trainer.backward(loss)
        norm, finite = trainer.update()
        trainer.batch += 1
        log.update(loss.detach(), None, norm, finite)
    if trainer.batch == updates:
        trainer.epoch, trainer.batch = trainer.epoch + 1, 0


def held_out(data):
    """(images to measure, their split): the test images, or some training images of a folder without splits."""
    whole = find_split(data["data_folder"], train=False) == data["data_folder"]
    if whole:
        print(f"{data['data_folder']} has no folder test or val: quality is measured on training images", flush=True)
    return load_images(data, "test", 500 if whole else None), "train" if whole else "test"


def show_reconstructions(out, images, split):
    """Held-out images through the averaged weights: figures into TensorBoard, pictures into the run folder."""
    trainer, n = out.trainer, out.config["train_cfg"]["num_eval_samples"]
    figures, _, reconstructions = evaluate(trainer.ema.module.model, images, trainer.device, QUICK, keep=n)
    out.scalars({f"eval/{tag}": figures[tag] for tag in ("psnr", "ssim")})
    name = f"sample-{trainer.epoch - 1}.png"
    write_png(os.path.join(out.path, name), grid(reconstructions, GRID_ROW))
    out.print(f"epoch {trainer.epoch}: saved {display_path(out.last_checkpoint)} and {name} (files count from 0): "
              f"PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f} on {split} images")


def measure(args):
    """The figures of two weight files, for --evaluate."""
    config = load_settings(args.config, args.set)
    write_report(*args.evaluate, config["dataset"], *held_out(config["dataset"]), pick_device(config["devices"][0]),
                 args.output.removesuffix(".json"))


def write_report(encoder, decoder, data, images, split, device, path):
    """Measure two weight files on `images`; writes path.json and, with the first 40 reconstructions, path.png."""
    print(f"measuring the reconstructions of {len(images):,} {split} images", flush=True)
    model = TAESD(encoder, decoder).to(device, memory_format=memory_format(device))
    figures, _, reconstructions = evaluate(model, images, device, keep=40)
    figures = {"data": data["name"], "split": split, "images": len(images), "img_size": data["img_size"], **figures,
               "encoder": file_hash(encoder), "decoder": file_hash(decoder)}
    print(f"PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f}; {json.dumps(figures['latents'])}")
    with atomic_file(f"{path}.json") as f:
        f.write(json.dumps(figures, indent=1).encode())
    write_png(f"{path}.png", grid(reconstructions, 10))
    print(f"figures in {display_path(path)}.json, reconstructions in {display_path(path)}.png", flush=True)


if __name__ == "__main__":
    run(main)
