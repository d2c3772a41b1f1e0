"""Train a diffusion model:  python ./train.py ./configs/mnist.yaml [--resume PATH]"""

import math
import os
import shlex
import sys
import time

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import libs
from cli import Parser, positive, run
from libs.checkpoint import (check_resumable, checkpoint_name, find_checkpoint, remove_old_checkpoints,
                             save_checkpoint, set_aside_later)
from libs.config import portable
from libs.errors import RunError, UsageError, shown
from libs.models import load_weights
from libs.optimizers import build_optimizer
from libs.seeds import rng_state, seed_everything, seeded_generator, set_rng_state
from libs.training import (AverageMeter, ModelEMA, Signals, TenthsMeter, learning_rate, measure_data,
                           memory_format, peak_memory, pick_device, pick_precision)


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file, for example ./configs/mnist.yaml")
    parser.add_argument("-p", "--print-freq", type=positive, default=100, metavar="N",
                        help="updates between two lines of the log (default 100)")
    parser.add_argument("-c", "--ckpt-freq", type=positive, default=5, metavar="N",
                        help="epochs between two checkpoints, each with sample images (default 5)")
    parser.add_argument("--output", default="", metavar="NAME",
                        help="name of the run folder, <config>_NAME; the starting time if not given")
    parser.add_argument("--resume", default="", metavar="PATH",
                        help="go on from a checkpoint, or from the newest one of a run folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change a setting of the config, for example --set train_cfg.epochs=5")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    return parser.parse_args()


def draw(model, config, step, n, device):
    """Noise level, noise and hidden labels of update `step`: a function of (seed, step) alone."""
    generator = seeded_generator(config["seed"], "noise", step, device=device)
    t = torch.randint(model.timesteps, (n,), generator=generator, device=device)
    noise = torch.randn(n, *model.img_shape, generator=generator, device=device)
    drop = torch.rand(n, generator=generator, device=device) < model.label_dropout
    return t, noise, drop


def sample_grid(model, config, device):
    """A grid with one row per class, from the same labels and noise every time."""
    per_class = config["train_cfg"]["num_eval_samples"]
    labels = torch.arange(model.num_classes, device=device).repeat_interleave(per_class)
    noise = torch.randn(len(labels), *model.img_shape, generator=seeded_generator(config["seed"], "grid")).to(device)
    generator = seeded_generator(config["seed"], "sampler", device=device)
    training = model.training
    model.eval()
    images = [model.sample(lab, noise=z, generator=generator, **libs.sampling_options(config)).cpu()
              for lab, z in zip(labels.split(100), noise.split(100))]
    model.train(training)
    return make_grid(torch.cat(images), nrow=per_class, padding=1)


def main():
    """1. Configuration"""
    args = parse_args()
    config = libs.load_config(args.config, args.set)
    cfg = config["train_cfg"]
    seed_everything(config["seed"])
    device = pick_device(config["devices"])
    precision = pick_precision(config["dtype"], device)
    if args.resume and args.output:
        raise UsageError(f"--output: {args.output} cannot be given with --resume, which goes on in the same folder")
    elif args.resume:
        resume_path, state = find_checkpoint(args.resume)
        check_resumable(config, state, resume_path)
        folder = os.path.dirname(os.path.abspath(resume_path))
    else:
        name = os.path.splitext(os.path.basename(args.config))[0]
        folder = os.path.join(config["output_folder"], f"{name}_{args.output or time.strftime('%Y-%m-%d_%H-%M-%S')}")
        if os.path.exists(folder):
            raise UsageError(f"--output: {folder} exists; give another name, or --resume {shown(folder)}")

    """2. Model: before the data are read, so that a setting that cannot work costs no time"""
    data = config["dataset"]
    num_classes, num_images = libs.describe_dataset(data["name"], data["split"], data["data_folder"])
    if config["model"]["num_classes"] not in (None, num_classes) and data["name"] != "AFHQ":  # may lack a class
        raise UsageError(f"model.num_classes is {config['model']['num_classes']}, but the data set {data['name']} "
                         f"in {data['data_folder']} has {num_classes} classes")
    config["model"]["num_classes"] = num_classes
    model = libs.build_model(config)
    updates = num_images // min(config["loader"]["batch_size"], num_images)  # an epoch
    total_steps = cfg["epochs"] * updates
    print(yaml.safe_dump(portable(config), sort_keys=False, default_flow_style=None).rstrip())
    print(f"{sum(p.numel() for p in model.model.parameters()):,} parameters, {num_images:,} images, "
          f"{updates:,} updates an epoch, {total_steps:,} in all; on {device}, "
          f"{str(precision or torch.float32).removeprefix('torch.')}")
    print(f"run folder: {shown(folder)}", flush=True)
    if args.dry_run:
        return

    """3. Data: in [0, 1] for the autoencoder, in [-1, 1] for a model of pixels"""
    dataset, _, _ = libs.build_dataset(data["name"], data["split"], data["data_folder"], data["img_size"],
                                       (0, 1) if config["model"]["use_vae"] else (-1, 1))
    loader = libs.build_dataloader(dataset, **config["loader"], seed=config["seed"])
    model.to(device, memory_format=memory_format(device))
    dataset.to(device)
    mean, std, psnr = measure_data(model, dataset, device)
    what = f"latents (autoencoder {psnr:.1f} dB PSNR)" if model.use_vae else "pixels"
    print(f"{what}: mean {mean:.3f}, standard deviation {std:.3f}")
    if model.use_vae and not (abs(mean) < 0.5 and 0.5 < std < 2):
        print("warning: the latents are far from mean 0 and standard deviation 1, which the noise schedule is made "
              "for; are these the right autoencoder weights, and images in [0, 1]?")
    ema = ModelEMA(model, cfg["ema_decay"])
    optimizer = build_optimizer(model, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    """4. Resume: everything that the next update depends on"""
    epoch = batch = step = 0
    if args.resume:
        if state.get("updates_per_epoch", updates) != updates:
            raise UsageError(f"--resume: {resume_path} has {state['updates_per_epoch']} updates an epoch, the data "
                             f"in {data['data_folder']} give {updates}")
        load_weights(model, state["state_dict"], resume_path)
        load_weights(ema.module, state["state_dict_ema"], resume_path)
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:  # what the config says now holds
            group.update(betas=tuple(cfg["betas"]), weight_decay=cfg["weight_decay"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"])
        epoch, batch, step = state["epoch"], state["batch"], state["step"]
        ema.updates = step
        del state
        set_aside_later(resume_path)
        print(f"resumed from {shown(resume_path)}: {epoch} epochs and {batch} batches done, update {step}")

    """5. Run folder"""
    try:
        os.makedirs(os.path.join(folder, "logs"), exist_ok=True)
        with open(os.path.join(folder, "config.txt"), "w") as f:
            yaml.safe_dump(portable(config), f, sort_keys=False)
    except OSError as e:
        raise UsageError(f"output_folder: cannot write {folder} ({e.strerror})") from None
    remove_old_checkpoints(folder, None)
    board = SummaryWriter(os.path.join(folder, "logs"), purge_step=step + 1 if args.resume else None)
    board.add_text("config", "```\n" + yaml.safe_dump(portable(config), sort_keys=False) + "```", step)
    signals = Signals()

    def check_finite():
        loss = loss_meter.avg
        if not math.isfinite(loss):
            raise RunError(f"the loss is {loss} at update {step}; the checkpoints in {folder} are older and whole: "
                           "resume from one with a lower train_cfg.lr")
        return loss

    def save(is_final=False):
        check_finite()
        state = {"epoch": epoch, "batch": batch, "step": step, "updates_per_epoch": updates,
                 "config": portable(config),
                 "state_dict": model.state_dict(), "state_dict_ema": ema.module.state_dict(),
                 "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": rng_state()}
        name = checkpoint_name(epoch, batch)
        save_checkpoint(state, is_final, folder, name)
        remove_old_checkpoints(folder, cfg["keep_last"])
        return os.path.join(folder, name)

    def save_and_sample(is_final=False):
        """A checkpoint, then images: from the averaged weights into the folder, from both onto the board."""
        started = time.time()
        path = save(is_final)
        grid = sample_grid(ema.module, config, device)
        save_image(grid, os.path.join(folder, f"sample-{epoch - 1}.png"))
        board.add_image("samples/ema", grid, step)
        board.add_image("samples/raw", sample_grid(model, config, device), step)
        bar.write(f"saved {shown(path)} and sample-{epoch - 1}.png")
        return time.time() - started

    """6. Training"""
    model.train()
    loss_meter, norm_meter, tenths = AverageMeter(), AverageMeter(), TenthsMeter(model.timesteps, device)
    bar = tqdm(total=total_steps, initial=step, unit_scale=loader.batch_size, unit="img", disable=None)
    clock, clock_step, first_step = time.time(), step, step
    while epoch < cfg["epochs"] and not signals.received:
        for images, labels in loader.epoch(epoch, batch):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg, total_steps)
            t, noise, drop = draw(model, config, step, len(labels), device)

            # Algorithm 1: a gradient step on the mean loss of the batch
            with torch.autocast(device.type, precision, enabled=precision is not None):
                losses = model(images, labels, t, noise, drop)
            optimizer.zero_grad()
            scaler.scale(losses.mean()).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.model.parameters(), cfg["clip_grad_norm"] or math.inf)
            scaler.step(optimizer)
            scaler.update()
            ema.update(model)
            batch, step = batch + 1, step + 1

            loss_meter.update(losses.detach().mean())
            norm_meter.update(norm)
            tenths.update(losses.detach(), t)
            bar.update()
            if step - first_step == 10:
                bar.write(f"about {(time.time() - clock) / 600 * (total_steps - first_step):.0f} minutes lie ahead")
            if step % args.print_freq == 0 or step == total_steps:
                loss, speed = check_finite(), (step - clock_step) * loader.batch_size / (time.time() - clock)
                minutes = (total_steps - step) * loader.batch_size / speed / 60
                bar.write(f"epoch {epoch + 1}/{cfg['epochs']}  update {step}/{total_steps}  loss {loss:.4f}  "
                          f"{speed:.0f} images/s  {minutes:.1f} minutes left")
                bar.set_postfix(loss=f"{loss:.4f}")
                scalars = {"train/loss": loss, "train/lr": group["lr"], "train/grad_norm": norm_meter.avg,
                           "speed/images_per_s": speed, "speed/peak_memory_GiB": peak_memory(device) / 2 ** 30}
                scalars |= {f"loss_by_time/{k / 10:.1f}": x for k, x in enumerate(tenths.read()) if x == x}
                for tag, value in scalars.items():
                    board.add_scalar(tag, value, step)
                loss_meter.reset(), norm_meter.reset()
                clock, clock_step = time.time(), step
            if signals.received:
                break
        if signals.received and batch < len(loader):
            break
        epoch, batch = epoch + 1, 0

        if epoch < cfg["epochs"] and epoch % args.ckpt_freq == 0:
            clock += save_and_sample()
    finished = not signals.received
    if finished:
        save_and_sample(is_final=True)
    bar.close()
    board.close()
    if not finished:
        path = save()
        again = [sys.argv[0], args.config, "-c", str(args.ckpt_freq), "-p", str(args.print_freq)]
        again += [x for item in args.set for x in ("--set", item)] + ["--resume", shown(folder)]
        print(f"saved {shown(path)}; go on with: python {shlex.join(again)}")
        return 128 + signals.received
    print(f"done: {shown(folder)} holds model_final.pth.tar and the sample grids; "
          f"peak memory {peak_memory(device) / 2 ** 30:.2f} GiB")


if __name__ == "__main__":
    run(main)
