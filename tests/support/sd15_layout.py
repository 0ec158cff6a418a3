"""Names and shapes of the original Stable Diffusion 1.5 checkpoint, generated from its settings.

``v1-inference.yaml`` of the release: 320 channels times 1, 2, 4, 4, two residual blocks a level,
attention on the first three levels, text of width 768.
"""

from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXT = "cond_stage_model.transformer.text_model."
_TEXT_WIDTH, _MULTIPLES = 768, (1, 2, 4, 4)


class _Layout:
    def __init__(self, prefix: str) -> None:
        self.shapes: Shapes = {}
        self.prefix = prefix

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        self.shapes[f"{self.prefix}{name}.weight"] = shape
        if bias:
            self.shapes[f"{self.prefix}{name}.bias"] = shape[:1]

    def residual(self, name: str, inputs: int, outputs: int) -> None:
        self.layer(f"{name}.in_layers.0", inputs)
        self.layer(f"{name}.in_layers.2", outputs, inputs, 3, 3)
        self.layer(f"{name}.emb_layers.1", outputs, 1280)
        self.layer(f"{name}.out_layers.0", outputs)
        self.layer(f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            self.layer(f"{name}.skip_connection", outputs, inputs, 1, 1)

    def attention(self, name: str, width: int) -> None:
        self.layer(f"{name}.norm", width)
        self.layer(f"{name}.proj_in", width, width, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for kind, other in (("attn1", width), ("attn2", _TEXT_WIDTH)):
            self.layer(f"{block}.{kind}.to_q", width, width, bias=False)
            self.layer(f"{block}.{kind}.to_k", width, other, bias=False)
            self.layer(f"{block}.{kind}.to_v", width, other, bias=False)
            self.layer(f"{block}.{kind}.to_out.0", width, width)
        self.layer(f"{block}.ff.net.0.proj", 8 * width, width)
        self.layer(f"{block}.ff.net.2", width, 4 * width)
        for number in (1, 2, 3):
            self.layer(f"{block}.norm{number}", width)
        self.layer(f"{name}.proj_out", width, width, 1, 1)

    def vae_block(self, name: str, inputs: int, outputs: int) -> None:
        self.layer(f"{name}.norm1", inputs)
        self.layer(f"{name}.conv1", outputs, inputs, 3, 3)
        self.layer(f"{name}.norm2", outputs)
        self.layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            self.layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def vae_middle(self, name: str) -> None:
        self.vae_block(f"{name}.block_1", 512, 512)
        self.layer(f"{name}.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            self.layer(f"{name}.attn_1.{part}", 512, 512, 1, 1)
        self.vae_block(f"{name}.block_2", 512, 512)


def _unet() -> Shapes:
    net = _Layout(_UNET)
    net.layer("time_embed.0", 1280, 320)
    net.layer("time_embed.2", 1280, 1280)
    net.layer("input_blocks.0.0", 320, 4, 3, 3)
    width, skips, at = 320, [320], 1
    for level, multiple in enumerate(_MULTIPLES):
        for _ in range(2):
            net.residual(f"input_blocks.{at}.0", width, 320 * multiple)
            width = 320 * multiple
            if level < 3:
                net.attention(f"input_blocks.{at}.1", width)
            skips.append(width)
            at += 1
        if level < 3:
            net.layer(f"input_blocks.{at}.0.op", width, width, 3, 3)
            skips.append(width)
            at += 1
    net.residual("middle_block.0", width, width)
    net.attention("middle_block.1", width)
    net.residual("middle_block.2", width, width)
    at = 0
    for level, multiple in reversed(list(enumerate(_MULTIPLES))):
        for number in range(3):
            net.residual(f"output_blocks.{at}.0", width + skips.pop(), 320 * multiple)
            width = 320 * multiple
            if level < 3:
                net.attention(f"output_blocks.{at}.1", width)
            if level and number == 2:
                place = 2 if level < 3 else 1
                net.layer(f"output_blocks.{at}.{place}.conv", width, width, 3, 3)
            at += 1
    net.layer("out.0", 320)
    net.layer("out.2", 4, 320, 3, 3)
    return net.shapes


def _vae() -> Shapes:
    net = _Layout(_VAE)
    net.layer("encoder.conv_in", 128, 3, 3, 3)
    net.layer("decoder.conv_in", 512, 4, 3, 3)
    width = 128
    for level, multiple in enumerate(_MULTIPLES):
        for number in range(2):
            net.vae_block(f"encoder.down.{level}.block.{number}", width, 128 * multiple)
            width = 128 * multiple
        if level < 3:
            net.layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    for level, multiple in reversed(list(enumerate(_MULTIPLES))):
        for number in range(3):
            net.vae_block(f"decoder.up.{level}.block.{number}", width, 128 * multiple)
            width = 128 * multiple
        if level:
            net.layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    for half, outputs, last in (("encoder", 8, 512), ("decoder", 3, 128)):
        net.vae_middle(f"{half}.mid")
        net.layer(f"{half}.norm_out", last)
        net.layer(f"{half}.conv_out", outputs, last, 3, 3)
    net.layer("quant_conv", 8, 8, 1, 1)
    net.layer("post_quant_conv", 4, 4, 1, 1)
    return net.shapes


def _text() -> Shapes:
    net = _Layout(_TEXT)
    net.layer("embeddings.token_embedding", 49408, 768, bias=False)
    net.layer("embeddings.position_embedding", 77, 768, bias=False)
    for number in range(12):
        layer = f"encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            net.layer(f"{layer}.self_attn.{part}", 768, 768)
        net.layer(f"{layer}.mlp.fc1", 3072, 768)
        net.layer(f"{layer}.mlp.fc2", 768, 3072)
        net.layer(f"{layer}.layer_norm1", 768)
        net.layer(f"{layer}.layer_norm2", 768)
    net.layer("final_layer_norm", 768)
    return net.shapes


def checkpoint_shapes() -> Shapes:
    """Return the shapes of a whole checkpoint: 686 + 248 + 196 tensors."""
    return {**_unet(), **_vae(), **_text()}


def controlnet_shapes() -> Shapes:
    """Return the shapes of a ControlNet in a file of its own: 340 tensors."""
    net = _Layout("control_model.")
    names = ("time_embed.", "input_blocks.", "middle_block.")
    for name, shape in _unet().items():
        own = name.removeprefix(_UNET)
        if own.startswith(names):
            net.shapes[net.prefix + own] = shape
    widths = (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280)
    for number, width in enumerate(widths):
        net.layer(f"zero_convs.{number}.0", width, width, 1, 1)
    net.layer("middle_block_out.0", 1280, 1280, 1, 1)
    hint = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    for number, (inputs, outputs) in enumerate(pairwise(hint)):
        net.layer(f"input_hint_block.{2 * number}", outputs, inputs, 3, 3)
    return net.shapes
