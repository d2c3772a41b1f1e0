"""Train the tiny autoencoder for latent diffusion on a folder of images, or measure one.

python ./train_autoencoder.py ./configs/afhq_autoencoder.yaml [--resume PATH]
python ./train_autoencoder.py ./configs/afhq_autoencoder.yaml --evaluate encoder.pth decoder.pth --output r.json

Leaves encoder.pth and decoder.pth, in TAESD's layout and fp16, in the run folder: for model.vae_encoder_weights and
model.vae_decoder_weights.
"""

import json
import os
import time
from collections import defaultdict

import torch

from libs.common.cli import Parser, add_training_flags, check_output, run
from libs.training.autoencoder import (GRID_ROW, WHOLE_FROM, TrainedTAESD, build_optimizer, draw_crops, evaluate,
                                       load_images, load_settings)
from libs.common.checkpoint import check_data, set_aside_later
from libs.evaluation.classifier import file_hash
from libs.datasets import describe_dataset
from libs.training.distributed import World
from libs.common.errors import UsageError, display_path
from libs.data.folders import find_split
from libs.common.files import save_tensors, atomic_file
from libs.common.pictures import grid, write_png
from libs.common.seeds import seed_everything
from libs.tiny_autoencoder import TAESD
from libs.training.update import (AverageMeter, ModelEMA, Signals, Updater, learning_rate, memory_format, peak_memory,
                           pick_device, pick_precision)
from libs.training.run_folder import RunFolder, describe, find_place, restore, resume_command

QUICK = 32  # test images that are measured while training


def parse_args():
    parser = Parser(__doc__)
    add_training_flags(parser)
    parser.add_argument("--evaluate", nargs=2, metavar=("ENCODER", "DECODER"),
                        help="only measure these weights on the held-out images; --output then names the figures,\n"
                        "FILE.json (default autoencoder.json), beside which comes a picture")
    args = parser.parse_args()
    processes = World().size
    if processes > 1:
        raise UsageError(f"WORLD_SIZE: {processes} processes, but the autoencoder is trained by one; start it with "
                         "python, not with torchrun")
    if args.evaluate:
        args.output = args.output or "autoencoder.json"
        if args.dry_run or args.resume:
            raise UsageError("--evaluate: it only measures, and at once, so leave out "
                             + ("--resume" if args.resume else "--dry-run"))
        if not args.output.endswith(".json"):
            raise UsageError(f"--output: {args.output} must end in .json")
    return args


def report(encoder, decoder, images, data, split, device, path):
    """Measure two weight files on `images`; writes path.json and, with reconstructions alone, path.png."""
    print(f"measuring {len(images)} {split} images of {data['img_size']} x {data['img_size']} pixels", flush=True)
    model = TAESD(encoder, decoder).to(device, memory_format=memory_format(device))
    figures, _, reconstructions = evaluate(model, images, device, keep=40)
    figures = {"data": data["name"], "split": split, "images": len(images), "img_size": data["img_size"], **figures,
               "encoder": file_hash(encoder), "decoder": file_hash(decoder)}
    print(f"PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f}; {json.dumps(figures['latents'])}")
    with atomic_file(f"{path}.json") as f:
        f.write(json.dumps(figures, indent=1).encode())
    write_png(f"{path}.png", grid(reconstructions, 10))
    print(f"figures in {display_path(path)}.json, reconstructions in {display_path(path)}.png", flush=True)


def held_out(data, split):
    """The images that are measured: the test split, or as many of the others."""
    images = load_images(data, split, 500 if split == "train" else None)
    images.augment = False
    return images


def held_out_split(data):
    """"test", or, with a warning, "train" where the data folder has no other."""
    try:
        find_split(data["data_folder"], train=False)
    except UsageError as e:
        print(f"{e}: quality will be measured on training images", flush=True)
        return "train"
    return "test"


def main():
    """1. Configuration"""
    args = parse_args()
    config = load_settings(args.config, args.set)
    cfg, data = config["train_cfg"], config["dataset"]
    seed_everything(config["seed"])
    device = pick_device(config["devices"])
    precision, dtype = pick_precision(config["dtype"], device)
    _, num_images = describe_dataset(data["name"], "train", data["data_folder"], data["limit"])
    split = held_out_split(data)
    if args.evaluate:
        path = args.output.removesuffix(".json")
        for ending in ("json", "png"):
            check_output(f"{path}.{ending}")
        return report(*args.evaluate, held_out(data, split), data, split, device, path)
    folder, resume_path, state = find_place(args, config)

    """2. Model"""
    model = TrainedTAESD(config["model"]["vae_encoder_weights"], config["model"]["vae_decoder_weights"]).to(dtype)
    batch_size = config["loader"]["batch_size"]
    updates = max(num_images // batch_size, 1)  # an epoch: as many crops as there are images
    total_steps = cfg["epochs"] * updates
    describe(config, model, num_images, updates, device, precision, folder)
    print(f"an update: {batch_size} crops of half the images' side; after {WHOLE_FROM:.0%} of the training "
          f"{-(-batch_size // 4)} whole images", flush=True)
    if args.dry_run:
        return

    """3. Data, optimizer"""
    dataset = load_images(data, "train", data["limit"]).to(device)
    test = held_out(data, split).to(device)
    model.to(device, memory_format=memory_format(device))
    ema = ModelEMA(model, cfg["ema_decay"])
    optimizer = build_optimizer(model, cfg, device)
    updater = Updater(model, optimizer, precision, cfg["clip_grad_norm"], device)

    """4. Resume"""
    step = 0
    if args.resume:
        check_data(state, resume_path, updates, data["data_folder"])
        step = restore(state, resume_path, cfg, model, ema, optimizer, updater)
        set_aside_later(resume_path)
        print(f"resumed from {display_path(resume_path)}: update {step}", flush=True)
        del state
    first_step = step

    """5. Run folder"""
    out = RunFolder(folder, config, step, total_steps, batch_size)
    out.last_good = resume_path
    signals = Signals()

    def save(is_final=False):
        epoch, batch = divmod(step, updates)
        return out.save({"epoch": epoch, "batch": batch, "step": step, "updates_per_epoch": updates}, model, ema,
                        optimizer, updater, is_final)

    def look():
        """A few held-out images through the averaged weights: figures onto the board, pictures into the folder too."""
        figures, images, others = evaluate(ema.module.model, test, device, QUICK, keep=cfg["num_eval_samples"])
        latents = figures.pop("latents")
        scalars = {f"eval/{tag}": value for tag, value in figures.items()}
        scalars |= {f"latents/{tag}_{c}": x for tag in ("mean", "std") for c, x in enumerate(latents[tag])}
        out.scalars({**scalars, "latents/beyond_2.5": latents["beyond_2.5"]}, step)
        name = f"sample-{-(-step // updates) - 1}.png"
        write_png(os.path.join(folder, name), grid(others, GRID_ROW))
        for tag, x in (("images", images), ("reconstructions", others)):
            out.board.add_images(tag, x, step)
        out.say(f"saved {display_path(out.last_good)} and {name}: PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f} "
                f"of {min(QUICK, len(test))} {split} images")

    """6. Training"""
    model.train()
    meters = defaultdict(AverageMeter)
    clock, clock_step = time.time(), step
    while step < total_steps and not signals.received:
        images, noise = draw_crops(dataset, config, step, total_steps, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg, total_steps)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            terms = model(images.to(dtype), noise.to(dtype))
        terms["loss"] = sum(terms.values())
        updater.backward(terms["loss"])
        norm, finite = updater.step()
        ema.update(model)
        step += 1

        for tag, value in {**terms, "grad_norm": norm}.items():
            meters[tag].update(value.detach().nan_to_num(0, 0, 0), finite)
        out.update(step - first_step, total_steps - step)
        if device.type == "cpu" or step % updater.LIMIT == 0:
            updater.check(step, out.last_good)
        if step % args.print_freq == 0 or step == total_steps:
            rate = (step - clock_step) / (time.time() - clock)
            out.say(f"epoch {-(-step // updates)}/{cfg['epochs']}  update {step}/{total_steps}  "
                    f"loss {meters['loss'].avg:.4f}  {rate * batch_size:.0f} crops/s  "
                    f"{(total_steps - step) / rate / 60:.1f} minutes left"
                    + (f"  {int(updater.skipped)} updates left out" if updater.skipped else ""))
            scalars = {f"train/{tag}": meter.avg for tag, meter in meters.items()}
            out.scalars({**scalars, "train/lr": group["lr"], "train/skipped_updates": int(updater.skipped),
                         "speed/crops_per_s": rate * batch_size,
                         "speed/peak_memory_GiB": peak_memory(device) / 2 ** 30}, step)
            meters.clear()
            clock, clock_step = time.time(), step
        if step % (args.ckpt_freq * updates) == 0 and step < total_steps and not signals.received:
            started = time.time()
            save()
            look()
            clock += time.time() - started
    stop = signals.received if step < total_steps else 0
    path = save(is_final=not stop)
    if stop:
        out.close()
        out.say(f"saved {display_path(path)}; go on with: {resume_command(args, folder)}")
        return 128 + stop
    look()
    out.close()

    """7. What latent diffusion takes"""
    files = []
    for half in ("encoder", "decoder"):
        files.append(os.path.join(folder, f"{half}.pth"))
        weights = getattr(ema.module.model, half).state_dict()
        with atomic_file(files[-1]) as f:
            save_tensors({name: w.half().cpu().contiguous() for name, w in weights.items()}, f)
    print(f"done: {display_path(files[0])} and decoder.pth, for model.vae_encoder_weights and model.vae_decoder_weights",
          flush=True)
    report(*files, test, data, split, device, os.path.join(folder, "evaluation"))


if __name__ == "__main__":
    run(main)
