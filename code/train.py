"""Train a diffusion model:  python ./train.py ./configs/mnist.yaml [--resume PATH]"""

import time
from functools import partial

import torch

import libs
from libs.common.cli import Parser, add_training_flags, run
from libs.common.checkpoint import check_data, set_aside_later
from libs.training.distributed import World
from libs.common.errors import UsageError, display_path
from libs.evaluation.report import RealImages
from libs.data.latents import cached_latents
from libs.models import check_autoencoder
from libs.training.optimizers import build_optimizer
from libs.common.seeds import seed_everything, seeded_generator
from libs.training.update import (AverageMeter, ModelEMA, Signals, TenthsMeter, Updater, learning_rate, measure_data,
                           memory_format, peak_memory, pick_device, pick_precision, prepare_network)
from libs.training.run_folder import RunFolder, describe, find_place, restore, resume_command


def parse_args():
    parser = Parser(__doc__)
    add_training_flags(parser)
    return parser.parse_args()


def draw(model, config, step, n, device):
    """Noise level, noise and hidden labels of the n images of update `step`: a function of (seed, step) alone."""
    generator = seeded_generator(config["seed"], "noise", step, device=device)
    t = torch.randint(model.timesteps, (n,), generator=generator, device=device)
    noise = torch.randn(n, *model.img_shape, generator=generator, device=device)
    drop = torch.rand(n, generator=generator, device=device) < model.label_dropout
    return t, noise, drop


def main():
    """1. Configuration"""
    args = parse_args()
    config = libs.load_config(args.config, args.set)
    cfg, world = config["train_cfg"], World()
    seed_everything(config["seed"])
    device = pick_device([world.device_name(config["devices"])])
    precision, dtype = pick_precision(config["dtype"], device)
    folder, resume_path, state = find_place(args, config)

    """2. Model: before the data are read, so that a setting that cannot work costs no time"""
    data = config["dataset"]
    num_classes, num_images = libs.describe_dataset(data["name"], data["split"], data["data_folder"], data["limit"])
    if config["model"]["num_classes"] not in (None, num_classes) and data["name"] != "AFHQ":  # may lack a class
        raise UsageError(f"model.num_classes is {config['model']['num_classes']}, but the data set {data['name']} "
                         f"in {data['data_folder']} has {num_classes} classes")
    config["model"]["num_classes"] = num_classes
    model = libs.build_model(config).to(dtype)
    if args.resume:
        check_autoencoder(model, state, config, resume_path)
    world.share(config["loader"]["batch_size"], num_images)
    updates = num_images // min(config["loader"]["batch_size"], num_images)  # an epoch
    total_steps = cfg["epochs"] * updates
    if world.first:
        describe(config, model, num_images, updates, device, precision, folder)
    if args.dry_run:
        return
    world.connect(device)

    """3. Data: in [0, 1] for the autoencoder, in [-1, 1] for a model of pixels"""
    world.one_after_the_other()  # the first may download what the others read
    dataset, _, _ = libs.build_dataset(data["name"], data["split"], data["data_folder"], data["img_size"],
                                       (0, 1) if config["model"]["use_vae"] else (-1, 1), data["limit"])
    if args.resume:
        check_data(state, resume_path, updates, data["data_folder"], dataset.classes)
    loader = libs.build_dataloader(dataset, **config["loader"], seed=config["seed"], share=world.share)
    model.to(device, memory_format=memory_format(device))
    dataset.to(device)
    say = partial(print, flush=True) if world.first else None
    measure_data(model, dataset, device, say=say)
    if config["model"]["use_vae"] and data["latent_crops"]:
        loader.dataset = dataset = cached_latents(model, dataset, data, device, say)
    real = RealImages(config, device) if config["eval"]["every"] and world.first else None
    world.one_after_the_other(done=True)
    ema = ModelEMA(model, cfg["ema_decay"])
    optimizer = build_optimizer(model, cfg, device)
    updater = Updater(model, optimizer, precision, cfg["clip_grad_norm"], device)

    """4. Resume: everything that the next update depends on"""
    epoch = batch = step = 0
    if args.resume:
        step = restore(state, resume_path, cfg, model, ema, optimizer, updater)
        epoch, batch = state["epoch"], state["batch"]
        del state
        if world.first:
            set_aside_later(resume_path)
            print(f"resumed from {display_path(resume_path)}: {epoch} epochs and {batch} batches done, update {step}")

    """5. Run folder"""
    out = RunFolder(folder, config, step, total_steps, loader.batch_size, active=world.first)
    out.last_good = resume_path
    signals = Signals()
    per_go = -(-len(range(loader.batch_size)[loader.part]) // cfg["accumulate"])  # images that fit in memory at once
    prepare_network(model, cfg, dataset, device, precision, per_go, world.size)
    network = world.wrap(model, device)

    def save(is_final=False):
        progress = {"epoch": epoch, "batch": batch, "step": step, "updates_per_epoch": updates,
                    "classes": list(dataset.classes)}
        if model.use_vae:
            progress["autoencoder"] = model.vae.hashes()
        return out.save(progress, model, ema, optimizer, updater, is_final)

    """6. Training"""
    model.train()
    loss_meter, norm_meter, tenths = AverageMeter(), AverageMeter(), TenthsMeter(model.timesteps, device)
    clock, clock_step, first_step = time.time(), step, step
    stop = 0
    while epoch < cfg["epochs"]:
        for images, labels in loader.epoch(epoch, batch):
            images, labels = images.to(device, dtype, non_blocking=True), labels.to(device, non_blocking=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg, total_steps)
            t, noise, drop = (x[loader.part] for x in draw(model, config, step, loader.batch_size, device))

            # Algorithm 1: a gradient step on the mean loss of the batch, in one go or in `accumulate` of them
            losses = []
            for part in zip(*(x.split(per_go) for x in (images, labels, t, noise.to(dtype), drop))):
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    losses.append(network(*part, encoded=dataset.encoded))
                updater.backward(losses[-1].sum() / len(labels))
            norm, finite = updater.step()
            ema.update(model)
            batch, step = batch + 1, step + 1

            losses = torch.cat(losses).detach()
            loss_meter.update(losses.mean().nan_to_num(0, 0, 0), finite)
            norm_meter.update(norm.nan_to_num(0, 0, 0), finite)
            tenths.update(losses, t)
            out.update(step - first_step, total_steps - step)
            if device.type == "cpu" or step % updater.LIMIT == 0:
                updater.check(step, out.last_good)
            if step % args.print_freq == 0 or step == total_steps:
                loss = loss_meter.average(world.total)
                speed = (step - clock_step) * loader.batch_size / (time.time() - clock)
                minutes = (total_steps - step) * loader.batch_size / speed / 60
                skipped = f"  {int(updater.skipped)} updates left out" if updater.skipped else ""
                out.say(f"epoch {epoch + 1}/{cfg['epochs']}  update {step}/{total_steps}  loss {loss:.4f}  "
                        f"{speed:.0f} images/s  {minutes:.1f} minutes left{skipped}")
                out.bar.set_postfix(loss=f"{loss:.4f}")
                scalars = {"train/loss": loss, "train/lr": group["lr"], "train/grad_norm": norm_meter.avg,
                           "train/skipped_updates": int(updater.skipped), "speed/images_per_s": speed,
                           "speed/peak_memory_GiB": peak_memory(device) / 2 ** 30}
                scalars |= {f"loss_by_time/{k / 10:.1f}": x for k, x in enumerate(tenths.read(world.total)) if x == x}
                out.scalars(scalars, step)
                loss_meter.reset(), norm_meter.reset()
                clock, clock_step = time.time(), step
            stop = world.agree(signals.received or 0)
            if stop:
                break
        if stop and batch < len(loader):
            break
        epoch, batch = epoch + 1, 0

        if stop or epoch == cfg["epochs"]:
            break
        started = time.time()
        if epoch % args.ckpt_freq == 0:
            save()
            out.sample(model, ema, epoch, step, device)
        out.evaluate(ema, real, epoch, step, device)
        clock += time.time() - started
    stop = stop if epoch < cfg["epochs"] else 0  # at the very end there is nothing left to stop
    path = save(is_final=not stop)
    if not stop:
        out.sample(model, ema, epoch, step, device)
        if step > first_step and not signals.received:
            out.evaluate(ema, real, epoch, step, device)
    out.close()
    world.close()
    if stop:
        out.say(f"saved {display_path(path)}; go on with: {resume_command(args, folder)}")
        return 128 + stop
    out.say(f"done: {display_path(folder)} holds model_final.pth.tar and the sample grids; "
            f"peak memory {peak_memory(device) / 2 ** 30:.2f} GiB")


if __name__ == "__main__":
    run(main)
