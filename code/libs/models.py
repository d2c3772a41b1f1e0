"""From a configuration or a checkpoint to a model."""

from .common.checkpoint import load_checkpoint
from .config import complete_config
from .ddim import DDIM
from .ddpm import DDPM
from .edm import EDM
from .common.errors import UsageError, display_path
from .samplers import OPTIONS, default_steps

MODELS = {"DDPM": DDPM, "DDIM": DDIM, "EDM": EDM}
GRID_SAMPLER = {"DDPM": "ddim", "DDIM": "ddim", "EDM": "heun"}


def build_model(config):
    """The model that a configuration describes, on the CPU. Raises UsageError when it cannot be."""
    model = MODELS[config["model_name"]](**config["model"])
    try:
        model.plan(**sampling_options(config))
    except UsageError as e:
        raise UsageError(f"config: sample_cfg.{e}") from None
    return model


def sampling_options(config, **given):
    """Keyword arguments of `Diffusion.sample`: the configuration's, under those given that are not None.

    Those that neither settles are left to the sampler, but for `steps`, so that it can be said which are meant.
    """
    options = dict(config["sample_cfg"])
    options["sampler"] = options["sampler"] or GRID_SAMPLER[config["model_name"]]
    if given.get("sampler") not in (None, options["sampler"]):  # these were meant for another sampler
        options |= dict.fromkeys(["steps", *OPTIONS])
    options |= {k: v for k, v in given.items() if v is not None}
    if options["steps"] is None:
        options["steps"] = default_steps(options["sampler"], config["model"]["timesteps"])
    pixels = config["model_name"] != "EDM" and not config["model"]["use_vae"]
    if options["clip"] is None and pixels and options["sampler"] != "ddpm":  # Algorithm 2 has no clipping
        options["clip"] = True
    return {k: v for k, v in options.items() if v is not None or k == "steps"}


def load_model(path, ema=True):
    """The trained model in a checkpoint of train.py, in eval mode on the CPU, and its configuration.

    ema: take the averaged weights. Raises UsageError for a file that is no such checkpoint, or whose autoencoder is not
    the one that its configuration finds.
    """
    return model_from(load_checkpoint(path), path, ema)


def model_from(state, path, ema=True):
    """`load_model` for the `state` that was read from `path`."""
    config = complete_config(state["config"])
    model = build_model(config)
    check_autoencoder(model, state, config, path)
    key = "state_dict_ema" if ema else "state_dict"
    if key not in state:  # export.py keeps the averaged weights alone
        raise UsageError(f"checkpoint {path} has no {key}")
    load_weights(model, state[key], path)
    return model.eval(), config


def check_autoencoder(model, state, config, path):
    """UsageError unless the autoencoder of `config` is that of the checkpoint `path`, as far as its `state` says."""
    if not model.use_vae:
        return
    here = model.vae.hashes()
    differ = [f"model.vae_{half}_weights" for half, digest in state.get("autoencoder", here).items()
              if digest != here[half]]
    if differ:
        files = ", ".join(display_path(config["model"][key.removeprefix("model.")]) for key in differ)
        raise UsageError(f"{', '.join(differ)}: the weights in {files} are not those in whose latents {path} was "
                         "trained; give its own")


def load_weights(model, state_dict, path):
    """Load strictly; a checkpoint of another architecture is a UsageError that names what differs."""
    own = model.state_dict()
    differ = [k for k in own if k not in state_dict or own[k].shape != state_dict[k].shape]
    differ += [k for k in state_dict if k not in own]
    if differ:
        raise UsageError(f"checkpoint {path} is of another architecture: {len(differ)} tensors differ, "
                         f"first {differ[0]}")
    model.load_state_dict(state_dict)
