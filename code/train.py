"""Train a diffusion model.

python code/train.py configs/mnist.yaml
python code/train.py --resume logs/RUN             goes on with a run, with its own settings"""

import math
from contextlib import nullcontext, suppress
from functools import partial
from hashlib import sha256

import torch

import libs
from libs.common.checkpoint import set_aside_later
from libs.common.cli import Parser, add_training_flags, run
from libs.common.errors import UsageError, display_path
from libs.common.memory import send
from libs.common.seeds import seed_everything, seeded_generator
from libs.data.latents import cached_latents
from libs.models import check_autoencoder
from libs.training.device import autocast, memory_format, peak_memory, pick_device, pick_precision, prepare_network
from libs.training.distributed import World, averaged
from libs.training.resume import check_data, find_place, restore
from libs.training.run_folder import Claim, RunFolder, Stopped, TrainingLog, describe, resume_command
from libs.training.update import Signals, Trainer, measure_data


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_training_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    """Train, or go on training; returns an exit status."""
    args, world = parse_args(argv), World()
    with Claim() if world.first and not args.dry_run else nullcontext() as claim:
        return train(args, world, claim)


def train(args, world, claim):
    """Train, in the run folder that `claim` keeps other trainings out of."""
    # ---- 1. Configuration
    config, folder, resume_path, state = find_place(args, claim)
    cfg, data = config["train_cfg"], config["dataset"]
    seed_everything(config["seed"])
    device = pick_device(world.device_name(config["devices"]))
    precision = pick_precision(config["dtype"], device)

    # ---- 2. Model: before the data are read, to fail early where a setting cannot work
    num_classes, num_images = libs.describe_dataset(data["name"], data["split"], data["data_folder"], data["limit"])
    # AFHQ's folder decides, as it may hold one kind of animal only
    if config["model"]["num_classes"] not in (None, num_classes) and data["name"] != "AFHQ":
        raise UsageError(f"model.num_classes is {config['model']['num_classes']}, but the data set {data['name']} "
                         f"in {data['data_folder']} has {num_classes} classes")
    config["model"]["num_classes"] = num_classes
    model = libs.build_model(config, training=device)
    if state:
        check_autoencoder(model, state, config, resume_path)
    world.share(config["loader"]["batch_size"], num_images)  # fails where the processes cannot divide a batch
    updates_per_epoch = num_images // min(config["loader"]["batch_size"], num_images)
    if world.first:
        describe(config, model, num_images, updates_per_epoch, device, precision, folder)
    if args.dry_run:
        return
    world.connect(device)

    # ---- 3. Data: in [0, 1] for the autoencoder, in [-1, 1] for a model of pixels
    world.one_after_the_other()  # the first may download what the others read
    report = partial(print, flush=True) if world.first else None
    dataset, _, _ = libs.build_dataset(data["name"], data["split"], data["data_folder"], data["img_size"],
                                       (0, 1) if config["model"]["use_vae"] else (-1, 1), data["limit"])
    facts = {"updates_per_epoch": updates_per_epoch, "classes": list(dataset.classes),
             "labels_sha256": sha256(dataset.labels.numpy()).hexdigest()[:12]}
    if state:
        check_data(state, resume_path, data["data_folder"], facts)
    loader = libs.build_dataloader(dataset, **config["loader"], seed=config["seed"], share=world.share)
    model.to(device, memory_format=memory_format(device))
    dataset.to(device)
    measure_data(model, dataset, device, report=report)
    if config["model"]["use_vae"] and data["latent_crops"]:
        loader.dataset = dataset = cached_latents(model, dataset, data, device, report).to(device)
    world.one_after_the_other(done=True)

    # ---- 4. Optimizer and averages; resume
    trainer = Trainer(model, cfg, device, precision, cfg["epochs"] * updates_per_epoch)
    if state:
        restore(trainer, state, resume_path)
        del state
        if world.first:
            set_aside_later(resume_path)
            print(f"resumed from {display_path(resume_path)}: {trainer.epoch} epochs and {trainer.batch} batches done, "
                  f"update {trainer.step}")
    signals = Signals()
    images_per_process = len(range(loader.batch_size)[loader.part])
    n = math.ceil(images_per_process / cfg["accumulate"])  # images in the network at once
    prepare_network(model, cfg, dataset, device, precision, n, world.size)

    # ---- 5. Run folder
    out = RunFolder(folder, config, trainer, loader.batch_size, args, claim)
    out.last_checkpoint = resume_path
    log = TrainingLog(out, model, world, loader.batch_size, cfg["epochs"])
    if model.use_vae:
        facts["autoencoder"] = model.vae.hashes()

    # ---- 6. Training
    compute_loss = world.wrap(model, device)
    model.train()
    stop = 0
    while not stop:
        if trainer.epoch < cfg["epochs"]:
            train_one_epoch(compute_loss, trainer, loader, log, n, config["seed"], precision,
                            stopped=lambda: world.agree(signals.received or 0))
        stop, is_final = world.agree(signals.received or 0), trainer.epoch == cfg["epochs"]
        with log.paused():
            due = is_final or trainer.epoch % args.ckpt_freq == 0
            if stop or due:
                out.save(facts, is_final)
            if due and (is_final or not stop):
                with suppress(Stopped):
                    out.sample(signals)
            world.meet()
        if is_final:
            break
    out.close()
    world.close()
    if not is_final:
        out.print(f"saved {display_path(out.last_checkpoint or out.path)}; go on with: {resume_command(out.path)}")
        return 128 + stop
    out.print(f"done: {display_path(out.path)} has model_final.pth.tar and the sample grids; "
              f"peak memory {peak_memory(device) / 2 ** 30:.2f} GiB")


def train_one_epoch(compute_loss, trainer, loader, log, n, seed, precision, stopped):
    """Algorithm 1 of Ho et al. over the rest of the current epoch, all of it unless resumed; `stopped()` ends it early.

    compute_loss: the model's own, in ddpm.py for a DDPM. n: images that go through the network at once.
    """
    model, device = trainer.model, trainer.device
    for images, labels in loader.epoch(trainer.epoch, trainer.batch):
        if stopped():
            return
        images, labels = send(images, device), send(labels, device)

        # lines 2 to 4: x_0 (B x C x H x W), t (B) and the noise (B x C x H x W), here of this process's part of the batch
        t, noise, drop = (x[loader.part] for x in draw(model, seed, trainer.step, loader.batch_size, device))

        # line 5: a gradient step on the mean loss of the batch, computed in one piece or in `accumulate` of them
        if model.dropout:
            seed_everything(seed, "dropout", trainer.step, loader.part.start)
        losses, parts = [], list(zip(*(whole.split(n) for whole in (images, labels, t, noise, drop))))
        for k, (x_start, label, time, eps, hidden) in enumerate(parts, 1):
            with averaged(compute_loss, last=k == len(parts)):
                with autocast(device, precision):
                    loss, each = compute_loss(x_start, label, time, eps, hidden, loader.dataset.encoded,
                                              return_each=True)
                trainer.backward(loss, share=len(each) / len(labels))
            losses.append(each.detach())
        norm, finite = trainer.update()

        trainer.batch += 1
        log.update(torch.cat(losses), t, norm, finite)
    trainer.epoch, trainer.batch = trainer.epoch + 1, 0


def draw(model, seed, step, batch_size, device):
    """Times, noise and hidden labels of the images of update `step`: a function of (seed, step), so that a resumed run
    draws what the uninterrupted one would have drawn."""
    generator = seeded_generator(seed, "noise", step, device=device)
    t = model.draw_times(batch_size, generator, device)
    noise = torch.randn(batch_size, *model.img_shape, generator=generator, device=device)
    drop = torch.rand(batch_size, generator=generator, device=device) < model.label_dropout
    return t, noise, drop


if __name__ == "__main__":
    run(main)
