"""The parts of a bundle: found, read and put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tegula.errors import BrokenWeightsError
from tegula.models.bundle import Bundle, BundleFacts
from tegula.models.hub import HubRepository, find, formats
from tegula.models.sd15.facts import LIGHT_VAE, PART_FILES, PRESETS
from tegula.models.sd15.files import LOADING_FAILURES, read_weights
from tegula.models.sd15.networks import SdAutoencoder, align, fingerprint, make_denoiser, move
from tegula.models.sd15.text import SdTextEncoder

# Networks in, bundle out.


@dataclass(frozen=True)
class Networks:
    """The networks of one model before they are joined; ``controlnet`` may be None."""

    unet: Any
    controlnet: Any
    autoencoder: Any
    text_model: Any
    tokenizer: Any

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Return what holds weights, in the order of the fingerprint."""
        found = (self.unet, self.controlnet, self.autoencoder, self.text_model)
        return tuple(module for module in found if module is not None)


@dataclass(frozen=True)
class Identity:
    """What a bundle is called and under which licence its weights are."""

    name: str
    licence: str


def assemble(
    networks: Networks,
    identity: Identity,
    scheduler: Mapping[str, object],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Bundle:
    """Join float32 networks to a bundle on a device; the networks are used up."""
    facts = _facts(identity, networks)
    for module in networks.modules:
        move(module, device=device, dtype=dtype)
        align(module)
    return Bundle(
        facts=facts,
        text=SdTextEncoder(networks.tokenizer, networks.text_model),
        denoiser=make_denoiser(networks.unet, networks.controlnet),
        autoencoder=SdAutoencoder(networks.autoencoder),
        scheduler=scheduler,
        device=torch.device(device),
        dtype=dtype,
        warnings=() if networks.controlnet is not None else (_NO_CONTROL_WARNING,),
    )


_NO_CONTROL_WARNING = (
    "This bundle has no ControlNet, so resemblance has no effect; keep creativity low."
)


def _facts(identity: Identity, networks: Networks) -> BundleFacts:
    levels = len(networks.unet.config.block_out_channels) - 1
    factor = 2 ** (len(networks.autoencoder.config.block_out_channels) - 1)
    multiple = factor * 2**levels
    window = int(networks.unet.config.sample_size) * factor
    return BundleFacts(
        name=identity.name,
        family="sd15",
        latent_factor=factor,
        latent_channels=int(networks.unet.config.in_channels),
        window=window,
        minimum_window=max(multiple, window // 2),
        window_multiple=multiple,
        presets=PRESETS,
        fingerprint=fingerprint(networks.modules),
        licence=identity.licence,
    )


# The networks of Stable Diffusion 1.5, each from whatever its weights come in.

_NAMES = {
    UNet2DConditionModel: "UNet",
    ControlNetModel: "ControlNet",
    AutoencoderKL: "autoencoder",
    CLIPTextModel: "text encoder",
    AutoencoderTiny: "light autoencoder",
}
STANDARD_CONFIG = Path(__file__).parent / "config"


def unet_from_folder(folder: Path) -> Any:
    """Load the UNet of a diffusers folder."""
    return _from_folder(UNet2DConditionModel, folder / "unet")


def autoencoder_from_folder(folder: Path) -> Any:
    """Load an autoencoder from the folder that holds its config.json."""
    return _from_folder(AutoencoderKL, folder)


def light_autoencoder(device: torch.device | str, dtype: torch.dtype) -> SdAutoencoder | None:
    """Load TAESD, which decodes roughly in a twentieth of the time, where it is here."""
    folder = find(HubRepository(LIGHT_VAE, PART_FILES))
    if folder is None:
        return None
    return SdAutoencoder(move(_from_folder(AutoencoderTiny, folder), device=device, dtype=dtype))


def controlnet_from_folder(folder: Path) -> Any:
    """Load a ControlNet from the folder that holds its config.json."""
    return _from_folder(ControlNetModel, folder)


def text_model_from_folder(folder: Path) -> Any:
    """Load the text encoder of a diffusers folder."""
    return _from_folder(CLIPTextModel, folder / "text_encoder")


def tokenizer_from_folder(folder: Path) -> Any:
    """Load a tokenizer from the folder that holds its vocabulary."""
    with _loading("tokenizer", folder):
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def unet_from_weights(state: Mapping[str, Tensor], config: Path, source: Path) -> Any:
    """Load the UNet out of an original checkpoint."""
    return _from_weights(UNet2DConditionModel, state, config / "unet", source)


def autoencoder_from_weights(state: Mapping[str, Tensor], config: Path, source: Path) -> Any:
    """Load an autoencoder out of an original checkpoint or a file of its own."""
    return _from_weights(AutoencoderKL, state, config / "vae", source)


def controlnet_from_file(path: Path, config: Path) -> Any:
    """Load a ControlNet from one file, with original or diffusers keys."""
    return _from_weights(ControlNetModel, read_weights(path), config / "controlnet", path)


def autoencoder_from_file(path: Path, config: Path) -> Any:
    """Load an autoencoder from one file, with original or diffusers keys."""
    return autoencoder_from_weights(read_weights(path), config, path)


def text_model_from_weights(state: Mapping[str, Tensor], config: Path, source: Path) -> Any:
    """Load the text encoder out of an original checkpoint."""

    def load() -> Any:
        return create_diffusers_clip_model_from_ldm(
            CLIPTextModel,
            checkpoint=dict(state),
            config=str(config / "text_encoder"),
            torch_dtype=torch.float32,
            local_files_only=True,
        )

    return _complete(load, _NAMES[CLIPTextModel], source)


def _from_folder(kind: Any, folder: Path) -> Any:
    def load() -> Any:
        model, report = kind.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, **_variant(folder)
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(_missing(missing))
        return model

    return _complete(load, _NAMES[kind], folder)


def _variant(folder: Path) -> dict[str, str]:
    stems = ("diffusion_pytorch_model", "model")
    plain, half, _pickled = zip(*(formats(f"{stem}.safetensors") for stem in stems), strict=True)
    has = [any((folder / name).is_file() for name in names) for names in (plain, half)]
    return {"variant": "fp16"} if has == [False, True] else {}


def _from_weights(kind: Any, state: Mapping[str, Tensor], config: Path, source: Path) -> Any:
    def load() -> Any:
        return kind.from_single_file(
            dict(state), config=str(config), torch_dtype=torch.float32, local_files_only=True
        )

    return _complete(load, _NAMES[kind], source)


def _complete(load: Callable[[], Any], name: str, source: Path) -> Any:
    with _loading(name, source):
        model = load()
        empty = [key for key, weight in model.named_parameters() if weight.is_meta]
        if empty:
            raise ValueError(_missing(empty))
        return model.float().eval().requires_grad_(requires_grad=False)


@contextmanager
def _loading(name: str, source: Path) -> Iterator[None]:
    try:
        yield
    except LOADING_FAILURES as error:
        raise BrokenWeightsError(
            f"The {name} in {source} cannot be used: {_reason(error)}; get it again, or give "
            f"one of Stable Diffusion 1.5."
        ) from error


def _reason(error: Exception) -> str:
    # What diffusers trips over where a checkpoint lacks weights.
    if isinstance(error, NotImplementedError | AttributeError | TypeError):
        return "weights are missing"
    first = str(error).strip().split("\n")[0].split(". ")[0].removesuffix(".").strip()
    return first.removeprefix("Cannot load  because ")[:300]


def _missing(names: Sequence[str]) -> str:
    return f"weights are missing ({len(names)} of them, like {names[0]})"
