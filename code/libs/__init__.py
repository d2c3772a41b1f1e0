"""The library: models, data, configuration, training helpers. Knows no script."""

from .common.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from .config import load_config
from .datasets import build_dataloader, build_dataset, describe_dataset
from .ddim import DDIM
from .ddpm import DDPM
from .edm import EDM
from .common.errors import RunError, UsageError
from .models import build_model, load_model, sampling_options
from .training.update import AverageMeter, ModelEMA
