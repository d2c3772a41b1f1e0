"""From a configuration or a checkpoint to a model, and from a model to many images."""

import math
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from .common.checkpoint import load_checkpoint, model_file
from .common.errors import UsageError, display_path
from .common.files import load_tensors
from .common.memory import check_memory
from .common.pictures import image_grid
from .config import SETTINGS, check_value, complete_config
from .ddim import DDIM, ddim_timesteps
from .ddpm import DDPM
from .diffusion import Diffusion
from .edm import EDM
from .flow import Flow
from .samplers import SOLVERS, guidance_at, image_generator, karras_sigmas

MODELS = {"DDPM": DDPM, "EDM": EDM, "Flow": Flow}
DEFAULT_SAMPLER = {"DDPM": "ddim", "EDM": "heun", "Flow": "heun"}
GRID_SAMPLER = {"DDPM": "ddpm"}  # of training's grids, where another: the handout's p_sample_loop
KEPT = ("guidance_scale", "guidance_interval", "guide", "clip")  # when another sampler than the config's is chosen
COMMON_SETTINGS = ("steps", *KEPT)


# ---- how images are drawn

class Sampler(NamedTuple):
    """One way to draw images."""

    draw: Callable  # (model, labels, steps, **settings) -> images in [0, 1]
    levels: Callable  # (model, steps, **options) -> the noise level of each network call
    steps: int = None  # default number of steps; None: all timesteps of the model
    options: tuple = ()  # settings of its own, beside COMMON_SETTINGS


def _solver(name, steps, options=()):
    def draw(model, labels, steps, **settings):
        return model.sample(labels, name, steps, **settings)

    def levels(model, steps, **options):
        called = []

        def denoise(x, sigma):
            called.append(sigma)
            return x

        # run on a number in place of an image, to record where the solver calls the network
        SOLVERS[name](denoise, torch.zeros(1), karras_sigmas(steps, *model.sigma_range),
                      generator=lambda step, shape: torch.zeros(shape), **options)
        return called

    return Sampler(draw, levels, steps, options)


def _draw_ddpm(model, labels, steps, **settings):
    return model.p_sample_loop(labels, **settings)


def _ddpm_levels(model, steps):
    return model.sigmas.tolist()


def _draw_ddim(model, labels, steps, **settings):
    return DDIM.from_ddpm(model).p_sample_loop(labels, steps, **settings)


def _ddim_levels(model, steps, spacing="uniform", eta=0.0):
    return model.sigmas[ddim_timesteps(model.timesteps, steps, spacing)].tolist()


SAMPLERS = {
    "ddpm": Sampler(_draw_ddpm, _ddpm_levels),
    "ddim": Sampler(_draw_ddim, _ddim_levels, 50, ("eta", "spacing")),
    "heun": _solver("heun", 18, ("S_churn",)),
    "euler": _solver("euler", 50),
    "euler_ancestral": _solver("euler_ancestral", 50, ("eta",)),
    "dpmpp_2m": _solver("dpmpp_2m", 20, ("eta",)),
}


def samplers_of(model):
    """Names of the samplers that can draw from `model`."""
    names = [name for name in SAMPLERS if isinstance(model, DDPM) or name not in ("ddpm", "ddim")]
    low, high, _ = model.sigma_range
    return [name for name in names if name not in SOLVERS or low < high]  # a solver needs more than one noise level


def sampling_settings(model, config, **given):
    """Complete, checked keyword settings of `draw_images`: the configuration's `sample_cfg` under those given.

    given: values of sample_cfg; None means not given. The result always has "sampler", "steps" and "guidance_scale",
    and of the others those that are set. Raises UsageError for a sampler that the model does not have, an option that
    the sampler does not take, a value out of range, or guidance of a model without a guide that was trained without label
    dropout.
    """
    for key, value in given.items():
        if value is not None:
            given[key] = check_value(f"sample_cfg.{key}", value)
    settings = dict(config["sample_cfg"])
    name = settings["sampler"] = settings["sampler"] or DEFAULT_SAMPLER[config["model_name"]]
    if given.get("sampler") not in (None, name):  # the config's steps and options were meant for its own sampler
        settings = {k: v if k in KEPT else None for k, v in settings.items()}
    settings |= {k: v for k, v in given.items() if v is not None}
    name, available = settings["sampler"], samplers_of(model)
    if name not in available:
        raise UsageError(f"sampler: {name} cannot draw from this {config['model_name']}; it has {', '.join(available)}")
    sampler = SAMPLERS[name]

    if settings["steps"] is None:
        settings["steps"] = sampler.steps or model.timesteps
        if name == "ddim":
            settings["steps"] = min(settings["steps"], model.timesteps)
    if settings["clip"] is None and isinstance(model, DDPM) and not model.use_vae and name != "ddpm":
        settings["clip"] = True  # Algorithm 2 has no clipping
    settings = {k: v for k, v in settings.items() if v is not None}

    for key in settings:
        if key not in ("sampler", *COMMON_SETTINGS, *sampler.options):
            takers = [other for other, s in SAMPLERS.items() if key in s.options]
            raise UsageError(f"{key}: the sampler {name} does not take it; {', '.join(takers)} "
                             + ("do" if len(takers) > 1 else "does"))
    if name == "ddpm" and settings["steps"] != model.timesteps:
        raise UsageError(f"steps: ddpm always takes all {model.timesteps}, not {settings['steps']}; ddim takes fewer")
    if name == "ddim":
        ddim_timesteps(model.timesteps, settings["steps"])
    if settings.get("clip") and model.use_vae:
        raise UsageError("clip: only pixels lie in [-1, 1]; this is a model of latents")
    lo, hi = settings.get("guidance_interval", (0, 1))
    if not lo < hi:
        raise UsageError(f"guidance_interval: {[lo, hi]} is not [sigma_lo, sigma_hi] with sigma_lo < sigma_hi")
    if model.guide is None or name not in SOLVERS:
        model.check_guidance(settings["guidance_scale"])
    guide = settings.pop("guide", None)
    if given.get("guide") and settings["guidance_scale"] == 1:
        raise UsageError("guide: at guidance_scale 1 it is not used; give another, 2.25 for example")
    if guide and settings["guidance_scale"] != 1:
        settings["guide"] = "/".join(Path(guide).absolute().parts[-2:])  # the same from any folder
    return settings


def network_calls(model, settings):
    """Network calls for one image; a guided one counts twice: with and without label, or the model's and its guide's."""
    options = {k: v for k, v in settings.items() if k not in ("sampler", *COMMON_SETTINGS)}
    levels = SAMPLERS[settings["sampler"]].levels(model, settings["steps"], **options)
    scale, interval = settings["guidance_scale"], settings.get("guidance_interval")
    return sum(1 if guidance_at(sigma, scale, interval) == 1 else 2 for sigma in levels)


def sample_images(model, labels, settings, noise=None, generator=None, callback=None):
    """Draw one image per label, B -> B x C x H x W in [0, 1], by complete `settings`; see Diffusion.sample."""
    settings = {key: value for key, value in settings.items() if key != "guide"}  # the model has it
    draw = SAMPLERS[settings.pop("sampler")].draw
    return draw(model, labels, noise=noise, generator=generator, callback=callback, **settings)


def draw_images(model, labels, settings, seed=0, batch_size=100, device="cpu", callback=None):
    """Yield images B x C x H x W in [0, 1] on the CPU, one per label.

    Image k depends on (seed, k, its label) alone, not on the batch it is in. settings: of `sampling_settings`.
    callback: see Diffusion.sample.
    """
    for numbers in torch.arange(len(labels)).split(batch_size):
        yield sample_images(model, labels[numbers].to(device), settings, generator=image_generator(seed, numbers),
                            callback=callback).cpu()


def check_images(n, config, key, bytes_per_value=4):
    """Raise UsageError unless memory can hold `n` images and the copies made of them. key: the flag that sets n."""
    check_memory(n * math.prod(config["model"]["img_shape"]) * bytes_per_value, f"drawing {n:,} images", f"lower {key}")


def sample_grid(model, config, settings, device, callback=None):
    """A grid of `train_cfg.num_eval_samples` images a class, one row each, from the same noise every time."""
    per_class = config["train_cfg"]["num_eval_samples"]
    labels = torch.arange(model.num_classes).repeat_interleave(per_class)
    training = model.training
    model.eval()
    images = torch.cat(list(draw_images(model, labels, settings, config["seed"], device=device, callback=callback)))
    model.train(training)
    return image_grid(images, per_class)


# ---- from a configuration or a checkpoint

def build_model(config, training=None):
    """The model that a configuration describes, on the CPU. training: the device that is going to train it.

    Raises UsageError when it cannot be built or drawn from, or when there is not the memory.
    """
    kind, settings = MODELS[config["model_name"]], config["model"]
    if settings["num_classes"] is None:
        raise UsageError("model.num_classes is null; must be the number of classes")
    common = {key: value for key, value in settings.items() if f"model.{key}" in SETTINGS and "weights" not in key}
    with torch.device("meta"):  # where weights have a shape only
        weights = Diffusion(**common).model.parameters()
    n, remedy = sum(w.numel() for w in weights), "lower model.dim, model.dim_mults or model.context_dim"
    check_memory(4 * n, f"a network of {n:,} parameters", remedy)
    if training:  # gradients, average and two moments too
        check_memory(20 * n, f"training a network of {n:,} parameters", remedy, training)
    model = kind(**settings)
    if config["sample_cfg"]["guide"]:
        model.guide = load_guide(config["sample_cfg"]["guide"], model)
    try:
        sampling_settings(model, config)
    except UsageError as e:
        raise UsageError(f"config: sample_cfg.{e}") from None
    return model


def load_model(path, ema=True, guide=None):
    """The trained model in a checkpoint of train.py, in eval mode on the CPU, and its configuration.

    ema: take the averaged weights. guide: a checkpoint in place of the configuration's `sample_cfg.guide`. Raises
    UsageError for a file that is no such checkpoint, whose autoencoder is not the one that its configuration finds, or
    that the guide does not fit.
    """
    return model_from(load_checkpoint(path), path, ema, guide)


def load_guide(path, model):
    """The averaged model of a checkpoint or run folder, to guide `model`. Raises UsageError for one that cannot."""
    try:
        path = model_file(path)
        state = load_checkpoint(path)
        guide, _ = model_from({**state, "config": {**state["config"], "sample_cfg": {}}}, path)  # its own guide is ignored
    except UsageError as e:
        raise UsageError(f"guide: {e}") from None
    for what in ("use_vae", "img_shape", "num_classes"):
        if getattr(guide, what) != getattr(model, what):
            raise UsageError(f"guide: {display_path(path)} has {what} {getattr(guide, what)}, the model that it is to "
                             f"guide {getattr(model, what)}")
    if model.use_vae and guide.vae.hashes() != model.vae.hashes():
        raise UsageError(f"guide: {display_path(path)} was trained in the latents of another autoencoder")
    guide.vae, guide.classes = None, state.get("classes")
    return guide.requires_grad_(False)


def model_from(state, path, ema=True, guide=None):
    """`load_model` for the `state` that was read from `path`."""
    config = config_of(state, path)
    model = build_model(config)
    check_autoencoder(model, state, config, path)
    key = "state_dict_ema" if ema else "state_dict"
    if key not in state:  # export.py keeps the averaged weights alone
        raise UsageError(f"checkpoint {path} has no {key}")
    load_weights(model, state[key], path)
    if guide:
        model.guide, config["sample_cfg"]["guide"] = load_guide(guide, model), guide
    own, others = state.get("classes"), model.guide and model.guide.classes
    if own and others and own != others:
        raise UsageError(f"guide: its classes are {', '.join(others)}, those of {display_path(path)} {', '.join(own)}")
    return model.eval(), config


def config_of(state, path, complete_config=complete_config):
    """The complete configuration in the `state` of the checkpoint `path`."""
    given = dict(state["config"])
    if isinstance(given.get("eval"), dict):  # earlier versions measured samples during training
        given["eval"] = {key: value for key, value in given["eval"].items() if key not in ("every", "num")}
    try:
        return complete_config(given)
    except UsageError as e:
        raise UsageError(f"checkpoint {path}: {e}") from None


def check_autoencoder(model, state, config, path):
    """UsageError unless the autoencoder of `config` is that of the checkpoint `path`, as far as its `state` says."""
    if not model.use_vae:
        return
    hashes = model.vae.hashes()
    differ = [f"model.vae_{half}_weights" for half in hashes if state.get("autoencoder", hashes)[half] != hashes[half]]
    if differ:
        files = ", ".join(display_path(config["model"][key.removeprefix("model.")]) for key in differ)
        raise UsageError(f"{', '.join(differ)}: the weights in {files} are not those that {path} was trained "
                         "with; give its own")


def load_weights(model, state_dict, path):
    """Put the weights of the checkpoint `path` into the model. Raises UsageError where they do not fit."""
    state_dict = {k: v for k, v in state_dict.items() if k != "loss_weight"}  # unused, in old checkpoints
    load_tensors(model.state_dict(), state_dict, f"checkpoint {path}")
