"""Make pretrained/mobilenet_imagenet.pth, the judge of photographs, from TensorFlow's MobileNetV1.

python tests/mobilenet_weights.py mobilenet_v1_0.75_192_quant.tflite pretrained/mobilenet_imagenet.pth

Needs the package tflite (pip install tflite). The original, under the Apache License 2.0, is in
github.com/google-coral/test_data. Its weights are kept as they are, in 8 bits; biases become fp32."""

import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))
from libs.common.cli import Parser, check_output, run
from libs.common.files import atomic_file, save_tensors
from libs.evaluation.mobilenet import MobileNet


def tensors(path):
    """(integers, scale, zero point) of each layer's weight and bias in a .tflite file, in the order of the layers."""
    from tflite import BuiltinOperator, Model, TensorType
    with open(path, "rb") as f:
        model = Model.GetRootAs(f.read())
    graph, dtypes = model.Subgraphs(0), {TensorType.UINT8: np.uint8, TensorType.INT32: np.int32}
    for k in range(graph.OperatorsLength()):
        operator = graph.Operators(k)
        code = model.OperatorCodes(operator.OpcodeIndex()).DeprecatedBuiltinCode()
        if code in (BuiltinOperator.CONV_2D, BuiltinOperator.DEPTHWISE_CONV_2D):
            for number in operator.InputsAsNumpy()[1:]:
                tensor = graph.Tensors(number)
                content = model.Buffers(tensor.Buffer()).DataAsNumpy().view(dtypes[tensor.Type()])
                values = torch.from_numpy(content.reshape(tensor.ShapeAsNumpy()).copy())
                if values.dim() == 4:  # out x H x W x in; of a depthwise convolution 1 x H x W x out
                    depthwise = code == BuiltinOperator.DEPTHWISE_CONV_2D
                    values = values.permute(*(3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
                quantization = tensor.Quantization()
                yield values, float(quantization.Scale(0)), int(quantization.ZeroPoint(0))


def convert(path):
    """What `load_mobilenet` reads: {"weights": {name: tensor}, "scales": {name: s}, "zero_points": {name: z}}."""
    saved = {"weights": {}, "scales": {}, "zero_points": {}}
    for (name, own), (values, scale, zero) in zip(MobileNet().state_dict().items(), tensors(path), strict=True):
        if values.dtype == torch.uint8:
            saved["scales"][name], saved["zero_points"][name] = scale, zero
        else:
            values = (values.double() * scale).float()
        saved["weights"][name] = values.reshape(own.shape).contiguous()  # the head is a 1 x 1 convolution there
    return saved


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", help="mobilenet_v1_0.75_192_quant.tflite")
    parser.add_argument("output", help="FILE.pth")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    check_output(args.output, args.overwrite, "output")
    saved = convert(args.source)
    with atomic_file(args.output) as f:
        save_tensors(saved, f)
    print(f"saved {args.output}")


if __name__ == "__main__":
    run(main)
