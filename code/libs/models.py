"""From a configuration or a checkpoint to a model."""

from .checkpoint import load_checkpoint
from .config import complete_config
from .ddim import DDIM
from .ddpm import DDPM
from .edm import EDM
from .errors import UsageError

MODELS = {"DDPM": DDPM, "DDIM": DDIM, "EDM": EDM}
GRID_SAMPLER = {"DDPM": "ddim", "DDIM": "ddim", "EDM": "heun"}
DEFAULT_STEPS = {"ddim": DDIM.DEFAULT_STEPS, "heun": EDM.DEFAULT_STEPS}


def build_model(config):
    """The model that a configuration describes, on the CPU. Raises UsageError when it cannot be."""
    kind = MODELS[config["model_name"]]
    model = kind(**config["model"])
    sampling = sampling_options(config)
    if sampling["sampler"] not in kind.SAMPLERS:
        raise UsageError(f"config: sample_cfg.sampler is {sampling['sampler']!r}; {config['model_name']} has "
                         f"{', '.join(kind.SAMPLERS)}")
    steps, timesteps = sampling["steps"], config["model"]["timesteps"]
    if steps and sampling["sampler"] == "ddim" and steps > timesteps:
        raise UsageError(f"config: sample_cfg.steps is {steps}; it must be at most model.timesteps, {timesteps}")
    if steps and sampling["sampler"] == "ddpm" and steps != timesteps:
        raise UsageError(f"config: sample_cfg.steps is {steps}, but the sampler ddpm always takes all {timesteps}; "
                         "ddim takes fewer")
    return model


def sampling_options(config, **given):
    """Keyword arguments of `Diffusion.sample`: the configuration's, under those given that are not None."""
    options = dict(config["sample_cfg"])
    options["sampler"] = options["sampler"] or GRID_SAMPLER[config["model_name"]]
    if given.get("sampler") not in (None, options["sampler"]):
        options["steps"] = None  # meant for another sampler
    options |= {k: v for k, v in given.items() if v is not None}
    if options["steps"] is None and options["sampler"] in DEFAULT_STEPS:
        options["steps"] = DEFAULT_STEPS[options["sampler"]]
        if options["sampler"] == "ddim":
            options["steps"] = min(options["steps"], config["model"]["timesteps"])
    return options


def load_model(path, ema=True):
    """The trained model in a checkpoint of train.py, in eval mode on the CPU, and its configuration.

    ema: take the averaged weights. Raises UsageError for a file that is no such checkpoint.
    """
    state = load_checkpoint(path)
    config = complete_config(state["config"])
    model = build_model(config)
    key = "state_dict_ema" if ema else "state_dict"
    if key not in state:  # export.py keeps the averaged weights alone
        raise UsageError(f"checkpoint {path} has no {key}")
    load_weights(model, state[key], path)
    return model.eval(), config


def load_weights(model, state_dict, path):
    """Load strictly; a checkpoint of another architecture is a UsageError that names what differs."""
    own = model.state_dict()
    differ = [k for k in own if k not in state_dict or own[k].shape != state_dict[k].shape]
    differ += [k for k in state_dict if k not in own]
    if differ:
        raise UsageError(f"checkpoint {path} is of another architecture: {len(differ)} tensors differ, "
                         f"first {differ[0]}")
    model.load_state_dict(state_dict)
