"""How good generated images are: features, distances, copies of training images."""

from .classifier import file_hash
from .features import EXTRACTORS
from .report import RealImages, denoising_error, distances_to_all, evaluate, labels_like, scalars
