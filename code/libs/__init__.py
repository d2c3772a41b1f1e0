"""The library: models, data, configuration, training. Knows no script."""

from .common.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from .common.errors import RunError, UsageError
from .config import load_config
from .datasets import build_dataloader, build_dataset, describe_dataset
from .ddim import DDIM
from .ddpm import DDPM
from .edm import EDM
from .flow import Flow
from .models import build_model, draw_images, load_model, network_calls, sampling_settings
from .training.update import AverageMeter, ModelEMA
