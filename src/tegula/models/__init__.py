"""Bundles, prescalers and face models, and how they run on a device.

What may be named when a model is loaded stands here, where it is read without torch.
"""

DEFAULT_BUNDLE = "mini"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BACKENDS = ("torch", "openvino")
