"""Make a checkpoint of Stable Diffusion 1.x with random weights: the official layout at the true size.

python tests/random_sd_checkpoint.py random.safetensors                    4.0 GiB in fp32, to try txt2img.py with
python tests/random_sd_checkpoint.py random.ckpt --half                    2.0 GiB in fp16

The weights are scaled so that pictures are not flat and follow their prompt; they show nothing."""

import json
import math
import os
import sys

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))
from libs.common.cli import Parser, check_output, run
from libs.common.errors import UsageError
from libs.common.files import atomic_file, save_tensors
from libs.common.seeds import seeded_generator
from libs.stable_diffusion.checkpoint import AUTOENCODER, TEXT, UNET, build_parts, expected_shapes
from libs.stable_diffusion.config import load_config
from libs.stable_diffusion.files import DTYPES

# the noise schedule's tables, which a real file has too
SCHEDULE = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
            "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")
POSITIONS = TEXT + "embeddings.position_ids"
# layers whose weights are scaled by more than 1 / sqrt(number of inputs)
GAINS = {"attn2.to_q.": 2.0, "attn2.to_out.": 2.0, "decoder.conv_out.": 0.6, "encoder.conv_out.": 0.5}


def layout(dtype, model=None):
    """{name: (dtype, shape)}, the 1,145 tensors of a file like v1-5-pruned-emaonly."""
    specs = {name: (torch.float32, (1000,)) for name in SCHEDULE}
    specs |= {"model_ema.decay": (torch.float32, ()), "model_ema.num_updates": (torch.int32, ()),
              POSITIONS: (torch.int64, (1, 77))}
    return specs | {name: (dtype, shape) for name, shape in expected_shapes(build_parts(model)).items()}


def random_tensor(name, shape, seed=0):
    """A tensor of the file, fp32; depends on its name and the seed alone."""
    if name == POSITIONS:
        return torch.arange(77)[None]
    if not name.startswith((UNET, AUTOENCODER, TEXT)):
        return torch.zeros(shape)
    noise = torch.randn(shape, generator=seeded_generator(seed, name))
    if len(shape) == 1:
        return 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)  # of a norm, or a bias
    if "embedding.weight" in name:
        return noise if "token" in name else 0.1 * noise
    gain = next((gain for layer, gain in GAINS.items() if layer in name), 1.0)
    return noise * gain / math.sqrt(math.prod(shape[1:]))


def write_safetensors(path, specs, make, metadata=None):
    """Write a file tensor by tensor, so that only one is in memory at a time.

    specs: {name: (dtype, shape)}; make(name) -> the tensor; metadata: {text: text}.
    """
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": metadata or {}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in specs.items():
            tensor = make(name).to(dtype).contiguous()
            f.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write(path, dtype=torch.float32, seed=0, model=None):
    """Write the file: .safetensors one tensor at a time, .ckpt from memory. model: see load_checkpoint."""
    specs = layout(dtype, model)
    with tqdm(total=len(specs), disable=None) as bar:
        def make(name):
            bar.update()
            return random_tensor(name, specs[name][1], seed).to(specs[name][0])

        if path.endswith(".safetensors"):
            write_safetensors(path, specs, make, {"about": f"random weights, seed {seed}"})
        else:
            state = {name: make(name) for name in specs}
            with atomic_file(path) as f:
                save_tensors({"state_dict": state}, f)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("output", help="FILE.safetensors or FILE.ckpt")
    parser.add_argument("--half", action="store_true", help="fp16 in place of fp32")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--config", default=None, help="a config of txt2img.py with other sizes")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    if not args.output.endswith((".safetensors", ".ckpt")):
        raise UsageError(f"output: {args.output} must end in .safetensors or .ckpt")
    check_output(args.output, args.overwrite, "output")
    write(args.output, torch.float16 if args.half else torch.float32, args.seed,
          load_config(args.config)["model"] if args.config else None)
    print(f"saved {args.output}")


if __name__ == "__main__":
    run(main)
