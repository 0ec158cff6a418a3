"""Opening weights: one reader for every model, and one set of sentences."""

import argparse
import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tegula.errors import BrokenWeightsError, MissingWeightsError
from tegula.models.faces.networks import load_restorer
from tegula.models.files import read_metadata, read_shapes, read_tensors
from tegula.models.prescalers.load import load_prescaler
from tegula.models.sd15.few_step import choose_few_step
from tegula.models.sd15.text import read_inversions

CPU = torch.device("cpu")
READERS = {
    "tensors": lambda path: read_tensors(path),
    "prescaler": lambda path: load_prescaler(str(path), CPU, torch.float32),
    "faces": lambda path: load_restorer(str(path), CPU),
    "inversion": lambda path: read_inversions([str(path)], 768),
}


def saved(path: Path, **tensors) -> Path:
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_truncated_file_is_refused_in_the_same_words_everywhere(tmp_path, reader):
    path = saved(tmp_path / "cut.safetensors", x=torch.ones(99))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BrokenWeightsError, match="bytes where its header promises"):
        reader(path)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_pickled_file_with_code_is_refused_and_not_run(tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    torch.save({"params": Evil()}, tmp_path / "odd.pth")
    with pytest.raises(BrokenWeightsError, match=r"odd\.pth (holds no weights|is not a textual)"):
        reader(tmp_path / "odd.pth")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_pickled_tensors_are_read_as_torch_reads_them(tmp_path, zipped, dtype):
    base = (torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    state = {"whole": base, "turned": base.T, "part": base[1:3, ::2], "none": base[:0]}
    state["parameter"] = torch.nn.Parameter(base, requires_grad=False)
    torch.save(OrderedDict(state), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_tensors(tmp_path / "a.pt")
    assert list(read) == list(state)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.float64])
def test_tensors_of_other_types_are_read_from_both_formats(tmp_path, dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    torch.save({"x": tensor}, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        read = read_tensors(tmp_path / name)["x"]
        assert read.dtype == dtype
        assert torch.equal(read.float(), tensor.float())


def test_objects_of_training_programs_do_not_keep_a_file_shut(tmp_path):
    pickled = {
        "state_dict": {"w": torch.ones(2)},
        "callbacks": {Path: {"best": np.float64(0.5), "where": Path("/x"), "seen": {1, 2}}},
        "loops": [np.arange(3), argparse.Namespace(lr=1e-4)],
    }
    torch.save(pickled, tmp_path / "lightning.ckpt")
    assert torch.equal(read_tensors(tmp_path / "lightning.ckpt")["w"], torch.ones(2))


def test_a_whole_module_is_read_as_its_tensors(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(net, tmp_path / "net.pth")
    read = read_tensors(tmp_path / "net.pth")
    assert {name: t.tolist() for name, t in read.items()} == {
        name: t.tolist() for name, t in net.state_dict().items()
    }


def test_a_storage_beyond_the_end_is_refused(tmp_path):
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.ones(999)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BrokenWeightsError, match="is damaged"):
        read_tensors(path)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_pickled_list_is_refused_in_the_same_words_everywhere(tmp_path, reader):
    torch.save([torch.ones(2)], tmp_path / "odd.pth")
    with pytest.raises(BrokenWeightsError, match="holds no weights by name"):
        reader(tmp_path / "odd.pth")


@pytest.mark.parametrize("kind", ["prescaler", "faces"])
def test_a_file_that_is_not_there_is_named(tmp_path, kind):
    with pytest.raises(MissingWeightsError, match=r"There is no .* file .*gone\.pth"):
        READERS[kind](tmp_path / "gone.pth")


def test_what_is_no_tensor_is_left_out(tmp_path):
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "epoch": 3, 7: torch.ones(1)}, tmp_path / "a.pt"
    )
    assert list(read_tensors(tmp_path / "a.pt")) == ["w"]


def test_a_file_that_holds_itself_is_opened_no_further_than_it_makes_sense(tmp_path):
    state = {"w": torch.ones(2)}
    state["state_dict"] = state
    torch.save(state, tmp_path / "loop.pt")
    assert list(read_tensors(tmp_path / "loop.pt")) == ["w"]


@pytest.mark.parametrize("module", ["faces.networks", "prescalers.load"])
@pytest.mark.parametrize("wrapper", ["params_ema", "params", "state_dict", "model_state_dict"])
def test_wrappers_and_prefixes_of_training_programs_are_left_out(
    tmp_path, monkeypatch, module, wrapper
):
    seen = []
    monkeypatch.setattr(
        f"tegula.models.{module}.load_with_spandrel", lambda state, _: seen.append(state)
    )
    torch.save({wrapper: {"module.netG.w": torch.ones(2)}, "iter": 7}, tmp_path / "own.pth")
    reader = READERS["faces" if module == "faces.networks" else "prescaler"]
    with pytest.raises(BrokenWeightsError):
        reader(tmp_path / "own.pth")
    assert list(seen[0]) == ["w"]


@pytest.mark.parametrize("header", [[], {"__metadata__": [1]}, {"x": 3}, {"x": {"shape": 1}}])
def test_a_header_of_another_form_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    for read in (read_shapes, read_metadata):
        with pytest.raises(BrokenWeightsError, match="not a safetensors file"):
            read(path)


def test_a_lora_that_is_still_being_downloaded_does_not_stop_the_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_MODELS", str(tmp_path))
    (tmp_path / "half.safetensors").write_bytes(b"\xff" * 64)
    whole = saved(tmp_path / "lcm-lora-sdv1-5.safetensors", x=torch.ones(1))
    assert choose_few_step((), "auto").loras == ((str(whole), 1.0),)


@pytest.mark.parametrize(
    "tensors",
    [
        {"conv_first.weight": torch.ones(3), "conv_body.weight": torch.ones(3)},
        {"body.0.weight": torch.ones(3), "body.1.weight": torch.tensor(1.0)},
        {"body.0.weight": torch.ones(3), "body.1.weight": torch.ones(3), "body.x.y": torch.ones(1)},
    ],
)
def test_odd_shapes_under_the_names_of_a_prescaler_are_refused(tmp_path, tensors):
    with pytest.raises(BrokenWeightsError, match="cannot be used as a prescaler"):
        READERS["prescaler"](saved(tmp_path / "odd.safetensors", **tensors))
