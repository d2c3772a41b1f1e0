"""Sets of images as people look at them: grids, captioned sheets, folders. All uint8, N x C x H x W."""

import os
import shutil

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from .errors import RunError, first_line, display_path
from .files import atomic_file

CAPTION = 20  # pixels


def image_grid(images, nrow):
    """Images N x C x H x W, of any type, as one: `nrow` in each row, lines between them, small ones enlarged."""
    zoom = max(1, 64 // images.shape[-1])
    return make_grid(images, nrow=nrow, padding=1).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def grid(images, nrow):
    """`image_grid` as a Pillow image."""
    return to_pil_image(image_grid(images, nrow)[:images.shape[1]])  # make_grid turns grey into RGB


def sheet(panels, nrow):
    """Grids below each other, each under its caption: a Pillow image.

    panels: list of (caption, images).
    """
    grids = [grid(images, nrow) for _, images in panels]
    font = ImageFont.load_default()
    width = max(max(g.width, 8 + int(font.getlength(caption))) for (caption, _), g in zip(panels, grids))
    picture = Image.new("RGB", (width, sum(CAPTION + g.height for g in grids)), "white")
    top = 0
    for (caption, _), g in zip(panels, grids):
        ImageDraw.Draw(picture).text((4, top + 4), caption, "black", font)
        picture.paste(g, (0, top + CAPTION))
        top += CAPTION + g.height
    return picture


def write_png(path, picture):
    """Write a Pillow image, whole or not at all. RunError where that is impossible."""
    with atomic_file(path) as f:
        picture.save(f, "PNG")


def folder_names(classes, num_classes):
    """Names of one folder per class, as `read_images` takes them; None where the classes' names are not known or are no
    plain folder names (FashionMNIST has a "T-shirt/top")."""
    names = [str(c) for c in classes or ()]
    plain = all(n and n[0] != "." and not set(n) & set("/\\:\0") for n in names)
    return names if plain and len(names) == len(set(names)) == num_classes else None


def write_folder(path, images, folders=None):
    """Write 00000.png, 00001.png, ... into a new or empty folder, which appears when it is whole.

    folders: for each image the name of its sub-folder, a plain name; None: no sub-folders.
    Raises RunError where that is impossible.
    """
    path = os.path.realpath(path)
    partial = f"{path}.{os.getpid()}.partial"
    try:
        for k, image in enumerate(images):
            folder = os.path.join(partial, folders[k] if folders else "")
            os.makedirs(folder, exist_ok=True)
            to_pil_image(image).save(os.path.join(folder, f"{k:05d}.png"))
        if os.path.isdir(path):
            os.rmdir(path)  # fails unless it is empty
        os.replace(partial, path)
    except OSError as e:
        raise RunError(f"cannot write {display_path(path)}: {first_line(e)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
