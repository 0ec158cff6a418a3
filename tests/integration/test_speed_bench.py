"""The speed bench: its ladder, its arithmetic, its page, and one run of the smallest size."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from xml.etree import ElementTree

import pytest
import torch

from bench.speed.job import JOBS, job_for
from bench.speed.methods import LADDER, ladder, methods_for, usual_method
from bench.speed.page import BEGIN, END, PAGE, PICTURES, drawn, kept_results, section, with_section
from bench.speed.picture import bars
from bench.speed.summary import add_rates, against_loops, fastest, floor_seconds
from tegula.options import OPTIONS
from tegula.upscaler import Upscaler

RATES = {"fp32": {"product": 1e12, "convolution": 0.5e12}, "bf16": {"product": 4e12}}


def row(name, kind, least, **changes):
    usual = {
        "name": name,
        "kind": kind,
        "precision": "fp32",
        "overlap": 0.125,
        "same_work": True,
        "windows": 9,
        "evaluations": 72,
        "tflop": 2.0,
        "least": least,
        "median": least,
        "seconds": [least],
        "peak_mb": 100.0,
        "seam": 1.0,
        "distance": 0.01,
    }
    return {**usual, **changes}


ROWS = [
    row("loop small", "loop", 8.0, distance=0.2),
    row("loop large", "loop", 20.0, overlap=0.5, distance=0.1),
    row("ours", "ours", 4.0),
    row("ours, bf16", "ours", 2.0, precision="bf16"),
    row("ours, less", "ours", 0.25, precision="bf16", same_work=False, tflop=0.5),
]
RESULT = {
    "command": "python -m bench.speed",
    "machine": {
        "device": "cpu",
        "processor": "A processor",
        "features": ["avx2"],
        "threads": 2,
        "libraries": {"torch": "2"},
        "commit": "abc",
    },
    "job": {"size": "small", "source": 256, "side": 1024},
    "rates": RATES,
    "comparison": {"rows": ROWS, "skipped": {"refiners": "it is not installed"}},
    "growth": [{"megapixels": 64, "stopped": "no memory"}],
}


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
def test_every_rung_switches_something_on_that_exists(rung):
    assert set(rung.options) <= set(OPTIONS)
    assert set(rung.load) <= set(inspect.signature(Upscaler.load).parameters)


@pytest.mark.parametrize("size", JOBS)
def test_every_method_has_a_name_of_its_own(size):
    names = [method.name for method in methods_for(JOBS[size], "bf16")]
    assert len(names) == len(set(names))


def test_the_ladder_adds_up_and_leaves_out_what_does_not_stay():
    methods = {method.name: method for method in ladder(JOBS["small"], "bf16")}
    reused = methods["tegula: + features reused"]
    assert reused.precision == "bf16"
    assert reused.options["guidance_end"] < 1
    assert reused.options["feature_reuse"] > 1
    assert not reused.load
    on_gpu = dataclasses.replace(JOBS["full"], device="cuda")
    assert ladder(on_gpu, "bf16")[-1].load == {"compile": True}
    assert usual_method(on_gpu, "bf16").load == {"compile": True}
    assert usual_method(JOBS["mini"], "bf16").name == "tegula: + bf16"


def test_a_device_without_a_faster_precision_is_not_measured_twice():
    methods = methods_for(JOBS["small"], "fp32")
    assert {method.precision for method in methods} == {"fp32"}
    assert len({method.name for method in methods}) == len(methods)


def test_a_quick_job_is_smaller():
    assert job_for("small", "cpu", quick=True).side < job_for("small", "cpu", quick=False).side


def test_shares_follow_from_work_seconds_and_rates():
    rated = {row["name"]: row for row in add_rates(ROWS, RATES)}
    assert floor_seconds(ROWS, RATES) == pytest.approx(0.5)
    assert rated["ours"]["tflop_per_second"] == pytest.approx(0.5)
    assert rated["ours"]["share_of_rate"] == pytest.approx(0.5)
    assert rated["ours, bf16"]["share_of_rate"] == pytest.approx(0.25)
    assert rated["ours, bf16"]["share_of_floor"] == pytest.approx(0.25)


def test_only_rows_that_do_all_the_work_are_set_beside_the_loop():
    assert fastest(ROWS, same_work=True)["name"] == "ours, bf16"
    assert fastest(ROWS, same_work=False)["name"] == "ours, less"
    (found,) = against_loops(ROWS)
    assert found["equal_overlap"] == pytest.approx(4)
    assert found["equal_quality"] == pytest.approx(10)
    assert not found["reached"]


def test_the_loop_counts_from_the_least_overlap_that_is_as_good():
    rows = [{**ROWS[0], "distance": 0.015}, *ROWS[1:]]
    (found,) = against_loops(rows)
    assert found["reached"]
    assert found["equal_quality"] == found["equal_overlap"]


def test_the_picture_has_a_bar_for_every_row_and_is_xml():
    rows = [*add_rates(ROWS, RATES), row("not timed & odd", "loop", None)]
    root = ElementTree.fromstring(bars(rows, "a < b", "note"))
    assert len(root.findall("{*}rect")) == 1 + len(ROWS)


def test_the_page_says_what_was_skipped_and_where_memory_ended():
    text = section({"speed-cpu-small": RESULT})
    assert "| ours, bf16 | 9 |" in text
    assert "Skipped: refiners: it is not installed." in text
    assert "no memory" in text
    assert "bench.speed" in text


def test_the_page_takes_a_run_of_some_parts_alone():
    parts = {name: value for name, value in RESULT.items() if name != "comparison"}
    assert "megapixels" in section({"speed-cpu-mini": parts})


def test_only_the_part_between_the_marks_is_made_anew():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    made = with_section(page, {"speed-cpu-small": RESULT})
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert "old" not in made


def test_the_docs_show_the_figures_that_are_kept():
    results = kept_results()
    assert with_section(PAGE.read_text(), results) == PAGE.read_text(), "run `make docs`"
    compared = {name: result for name, result in results.items() if "comparison" in result}
    for name, result in compared.items():
        assert (PICTURES / f"{name}.svg").read_text() == drawn(result), "run `make docs`"


def test_the_bench_runs_in_the_smallest_size_and_keeps_its_figures(tmp_path, capsys, monkeypatch):
    from bench.speed import probe
    from bench.speed.program import main

    monkeypatch.setattr(probe, "_TRIES", 1)
    path = tmp_path / "speed.json"
    only = ["12.5% overlap, fp32", "batches", "reused", "refiners"]
    words = ["--size", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(path)]
    main([*words, "--parts", "comparison", "whole", "--only", *only])
    assert torch.is_grad_enabled()  # what trains afterwards in the same process needs it
    kept = json.loads(path.read_text())
    loop, ours, reused = kept["comparison"]["rows"]
    assert loop["windows"] == ours["windows"] == 4
    assert reused["tflop"] < ours["tflop"] < loop["tflop"]
    assert ours["distance"] < loop["distance"]
    assert set(ours["stages"]) == {"encode", "denoise", "decode"}
    assert 0 <= ours["outside_nets"] < 1
    assert list(kept["comparison"]["skipped"]) == ["refiners MultiUpscaler, " + fast_of(kept)]
    whole = kept["whole"][0]
    assert 0 < sum(whole["stages"].values()) <= whole["seconds"]
    assert re.search(r"\| tegula: \+ batches \| 4 ", capsys.readouterr().out)


def test_the_bench_of_a_card_is_rehearsed_in_the_smallest_size(tmp_path, monkeypatch, capsys):
    from bench import card
    from bench.speed import probe

    monkeypatch.setattr(probe, "_TRIES", 1)
    path = tmp_path / "card.jsonl"
    words = ["--device", "cpu", "--size", "tiny", "--out", str(path)]
    card.main([*words, "--parts", "stages", "batches", "beside", "sizes", "eight_gigabytes"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    by_part = {part: [row for row in rows if row["part"] == part] for part in card.PARTS}
    whole, refine = by_part["stages"]
    assert {"prescale", "encode", "denoise", "decode", "finish"} <= set(whole["stages"])
    assert 0 <= whole["outside_nets"] < 1
    assert refine["outside_kernels"] is None
    assert [row["windows"] for row in by_part["batches"]] == [1, None]
    beside = [row["what"] for row in by_part["beside"] if row["seconds"] > 0]
    assert beside == ["diffusers by tiles", "canvas", "redraw", "few"]
    assert [row["megapixels"] for row in by_part["sizes"]] == [0.01, 0.02]
    assert "left_out" in by_part["eight_gigabytes"][0]
    capsys.readouterr()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            card.main([])


def fast_of(kept):
    return list(kept["rates"])[-1]
