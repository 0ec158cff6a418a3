"""What is chosen for a picture by what was found in it, where the caller leaves it open.

Every choice is the value of an ordinary option, so that a result's settings give it again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tegula.images.look import Look
from tegula.images.pixels import Size
from tegula.options import PresetValues, ResolvedOptions, UpscaleOptions
from tegula.resolve import enlargement

CLEAN_SHARE = 0.8
"""Share of tegula-photo's tuning for a clean photograph; docs/decisions/0005 has the figures."""
UNSEEN_SHARE = 0.65
"""The share without auto: that at which the file of tegula-photo keeps its weights."""
_BY_QUALITY = ((50, 80, 95), (0.35, 0.5, CLEAN_SHARE))
"""Qualities of JPEG and the share for each; between them it is interpolated."""
_BY_NOISE = ((1.5, 4.0), (CLEAN_SHARE, 0.65))
"""Noise in levels of 255 and the share for each, likewise."""
_DRAWN_SHARE = 0.35
"""For what is drawn: with it most letters are read right, and look most like their originals."""


def share_of_tuning(look: Look) -> float:
    """Return the share of the prescaler's tuning for a source, in steps of a twentieth.

    Tuning keeps texture that x4plus removes; with it noise and the traces of compression.
    """
    quality = 100 if look.damage.jpeg_quality is None else look.damage.jpeg_quality
    noise = look.damage.noise
    shares = [float(np.interp(quality, *_BY_QUALITY)), float(np.interp(noise, *_BY_NOISE))]
    if look.kind != "photograph":
        shares.append(_DRAWN_SHARE)
    return round(min(shares) * 20) / 20


_FOR_DRAWINGS = "tegula-line"
_LARGE = "tegula-photo"
_QUICK, _QUICK_JPEG = "tegula-swift", "tegula-swift-jpeg"
"""At up to twice the size, where a source is sharp or so little soft that it can be sharpened
before, the first is nearer to the original than the large one by most judges, and the second, for
JPEG, about as near, in a tenth of the time; docs/decisions/0008, 0010 and 0012 have the figures.
So the first is taken on every device, and the second where somebody waits for the large one."""
_QUICK_NETS = (_QUICK, _QUICK_JPEG)
_FOR_PHOTOGRAPHS = (_LARGE, *_QUICK_NETS)
"""Nets of presets whose place the net for drawings may take; others were chosen on purpose."""
_QUICK_UP_TO = 2.0
_LITTLE_NOISE = 1.5
"""Levels of noise from which a source gets the large net."""
_GOOD_ENOUGH = 80
"""Quality of JPEG below which a source does, too, and below which mini's prediction helps."""
_MORE_OF_ONE_STEP = 2.0
"""By what resemblance is divided there; docs/decisions/0013 has the figures."""
_FLAT_BY_QUALITY = ((50, 80, 95), (1.0, 0.5, 0.0))
_FLAT_BY_NOISE = ((1.5, 4.0), (0.0, 0.8))
_FLAT_BY_TIMES = ((2.0, 4.0), (0.0, 1.0))
"""What nets make of JPEG and of noise in flat places, in levels of 255; at up to twice the size
they leave less there than the originals have. docs/decisions/0011 has the figures."""
_SHARP = 0.12
"""Pixels of blur that measuring finds in sharp photographs, too; less is not undone."""
_SOFT = 1.0
"""Octaves of detail that a photograph lacks, from which it counts as soft."""
_TINY, _SMALL = 64, 384
"""Pixels: with a shorter side in this range a photograph counts as soft, too; below are icons."""
_ON_WHITE = 0.25
"""Share of white around a thing from which it counts as a product on white."""
_FLAT = 0.995
"""Share of a picture without detail from which there is nothing to refine."""
_MORE, _LESS = 1.25, 0.5
"""Factors on the creativity of a preset; its resemblance is divided by them."""


def choose(
    look: Look,
    options: UpscaleOptions,
    usual: PresetValues,
    size: Size,
    *,
    on_processor: bool = True,
) -> dict[str, Any]:
    """Return values for options that the caller leaves open, by the look of the source.

    Faces are no part of the look: what holds their likeness finds them itself, and changes the
    strength there, place by place, whatever is chosen here for the whole.

    Args:
        look: of the whole source.
        options: as the caller gave them.
        usual: of the preset.
        size: of the whole source.
        on_processor: whether the nets run there, where the large one takes most of the time.
    """
    if not options.auto:
        return {"tuning": UNSEEN_SHARE}
    chosen: dict[str, Any] = {"tuning": share_of_tuning(look)}
    if look.is_grey and not options.prompt and not options.regions:
        chosen["keep_grey"] = True
    # A net that was named runs alone, as its author meant it.
    is_drawn = look.kind != "photograph"
    if options.prescaler is None and (is_drawn or look.on_white >= _ON_WHITE):
        chosen["hold_drawings"] = True
        replaces = usual.prescaler in _FOR_PHOTOGRAPHS and options.drawing_prescaler is None
        if is_drawn and replaces:
            name = "prescaler" if look.is_all_drawn else "drawing_prescaler"
            # Diffusion leaves alone what is held, and `creative` wants something invented.
            chosen |= {name: _FOR_DRAWINGS, "hold_drawings": options.preset != "creative"}
    times = max(enlargement(options, *size))
    quick = _quick_net(look)
    has_time = options.preset == "best" or not on_processor
    if quick is not None and _leaves_quick_net_open(look, options, usual, times, has_time=has_time):
        chosen["prescaler"] = quick
    net = options.prescaler or chosen.get("prescaler", usual.prescaler)
    chosen |= _mending(look, options, net, times)
    if options.preset == "creative":
        return chosen
    if _leaves_nothing_to_refine(look, options, usual, net, times):
        return {**chosen, "creativity": 0.0}
    one_step = usual.steps == 1
    factor = _factor_for_one_step(look) if one_step else _creativity_factor(look, size)
    if factor != 1:
        chosen["resemblance"] = round(min(3.0, usual.resemblance / factor), 2)
        if not one_step:  # one takes its creativity for the noise that it was trained at
            chosen["creativity"] = round(min(1.0, usual.creativity * factor), 2)
    return chosen


def _quick_net(look: Look) -> str | None:
    """Return the quick net for a photograph that lost little to a lens, noise and compression."""
    if look.kind != "photograph" or look.softness is None or look.damage.noise >= _LITTLE_NOISE:
        return None
    return _QUICK if look.damage.jpeg_quality is None else _QUICK_JPEG


def _leaves_quick_net_open(
    look: Look, options: UpscaleOptions, usual: PresetValues, times: float, *, has_time: bool
) -> bool:
    """Return whether a quick net may take the place of the net of the preset.

    A net or a share of its tuning that was given is kept; `creative`, too, keeps the net that was
    measured below its diffusion. Of JPEG the large net keeps its place where it does not take long
    (``has_time``) and where compression was coarse.
    """
    is_open = options.prescaler is None and options.tuning is None
    is_worth_waiting = look.damage.jpeg_quality is not None and (has_time or _is_coarse(look))
    is_replaced = usual.prescaler in _QUICK_NETS or (
        usual.prescaler == _LARGE and not is_worth_waiting
    )
    return is_open and is_replaced and options.preset != "creative" and times <= _QUICK_UP_TO


def _mending(look: Look, options: UpscaleOptions, net: str, times: float) -> dict[str, float]:
    """Return what is mended before and behind a net for photographs.

    Quick nets are shown a sharpened source. An exact result shrinks to its source, and keeps all.
    """
    if net not in _FOR_PHOTOGRAPHS or look.kind != "photograph" or options.is_exact:
        return {}
    is_soft = look.softness is not None and look.softness > _SHARP
    is_known = net == _quick_net(look) and (times <= _QUICK_UP_TO or net == _QUICK)
    mended = {"mend_blur": round(look.softness or 0.0, 2)} if is_soft and is_known else {}
    if times > _QUICK_UP_TO:
        quality = 100 if look.damage.jpeg_quality is None else look.damage.jpeg_quality
        by_quality = float(np.interp(quality, *_FLAT_BY_QUALITY))
        by_noise = float(np.interp(look.damage.noise, *_FLAT_BY_NOISE))
        share = float(np.interp(times, *_FLAT_BY_TIMES))
        return {**mended, "mend_flat": round(max(by_quality, by_noise) * share, 2)}
    return mended


def _leaves_nothing_to_refine(
    look: Look, options: UpscaleOptions, usual: PresetValues, net: str, times: float
) -> bool:
    """Return whether the prescaled picture is better left alone.

    Of what is drawn, letters and lines are all there, and what diffusion could add would be wrong.
    What mini (the model of one step) does behind tegula's nets takes most photographs further from
    the original; it helps above twice the size where compression was coarse. Who asks for something
    gets it anywhere.
    """
    if look.kind == "drawing" or look.flat >= _FLAT:
        return True
    asks = options.prompt or options.regions or options.resemblance is not None or options.detail
    is_left = look.kind == "photograph" and (times <= _QUICK_UP_TO or not _is_coarse(look))
    return usual.steps == 1 and net in _FOR_PHOTOGRAPHS and is_left and not asks


def _is_coarse(look: Look) -> bool:
    """Return whether compression took so much that there is something to invent."""
    return look.damage.jpeg_quality is not None and look.damage.jpeg_quality < _GOOD_ENOUGH


def _factor_for_one_step(look: Look) -> float:
    """Return how many times as much of its prediction is taken of a model of one step."""
    return _MORE_OF_ONE_STEP if look.kind == "photograph" and _is_coarse(look) else 1.0


def _creativity_factor(look: Look, size: Size) -> float:
    """Return how many times the usual creativity a photograph gets."""
    if look.on_white >= _ON_WHITE:
        return _LESS
    return _MORE if look.blur >= _SOFT or _TINY <= min(size) < _SMALL else 1.0


_GOOD, _NOISY = 90, 2.5
"""Quality of JPEG below which, and levels of noise from which, they are spoken of."""
_KINDS = {
    "photograph": "photograph",
    "drawing": "drawing or text",
    "mixed": "photograph with drawing or text",
}


def _words_for_kind(look: Look) -> str:
    grey = "grey " if look.is_grey else ""
    if look.flat >= _FLAT:
        return f"{grey}picture without detail"
    is_sharp = _quick_net(look) == _QUICK and (look.softness or 0.0) <= _SHARP
    sharp = "sharp " if is_sharp else ""
    return f"{sharp}{grey}{_KINDS[look.kind]}"


def _words_for_damage(look: Look, resolved: ResolvedOptions) -> list[str]:
    found = []
    if look.damage.jpeg_quality is not None and look.damage.jpeg_quality < _GOOD:
        mended = ", mended" if resolved.mend_jpeg else ""
        mended += ", its blocks of colour smoothed" if resolved.mend_chroma else ""
        found.append(f"JPEG quality about {look.damage.jpeg_quality}{mended}")
    # Small letters are noise to its measure.
    if look.kind == "photograph" and look.damage.noise >= _NOISY:
        found.append(f"noise of about {look.damage.noise:.0f} levels")
    if look.kind == "photograph" and look.blur >= _SOFT:
        found.append(f"as soft as if enlarged {2 ** round(look.blur)} times")
    if resolved.mend_blur:
        found.append(f"soft by {resolved.mend_blur:.2g} px, sharpened")
    return found


def describe(look: Look, resolved: ResolvedOptions, faces: int = 0) -> str:
    """Say in one line what was found and what is done about it; ``faces``: how many were found."""
    is_flat = look.flat >= _FLAT
    found = [_words_for_kind(look)]
    if look.kind == "photograph" and not is_flat and look.on_white >= _ON_WHITE:
        found.append("on white")
    found += _words_for_damage(look, resolved)
    if faces:
        found.append(f"{faces} face{'' if faces == 1 else 's'} kept close")
    net, drawn_by = [f"net {resolved.prescaler}"], (resolved.prescaler, resolved.drawing_prescaler)
    if resolved.tuning is not None:
        net.append(f", {resolved.tuning:g} of its tuning")
    if resolved.drawing_prescaler:
        share = "" if resolved.drawing_share == 1 else f"{resolved.drawing_share:g} of "
        net.append(f"; {share}{resolved.drawing_prescaler} where it is drawn")
    if resolved.hold_drawings and _FOR_DRAWINGS not in drawn_by:
        net.append(", " if resolved.drawing_prescaler else "; drawn parts ")
        net.append("held to the source")
    is_quick = resolved.prescaler in _QUICK_NETS
    is_enough = is_flat or look.kind == "drawing" or is_quick
    if is_enough and not resolved.refines:
        net.append(", no diffusion")
    return f"{', '.join(found)}; {''.join(net)}"
