"""The report page and the plots, from results on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyengine.bench import plots
from pyengine.bench.report import main, report
from pyengine.bench.report_tables import forecasts
from pyengine.bench.results import read_run, record, write_record
from pyengine.bench.rows import KINDS
from pyengine.bench.samples import CsvWriter
from pyengine.bench.sampling import BenchModel
from pyengine.bench.settings import Settings
from pyengine.errors import UsageError

MACHINE = {
    "cpu": "Toy CPU",
    "cores": 2,
    "cpu_flags": ["avx2", "avx512f"],
    "hypervisor": True,
    "memory_bytes": 8 << 30,
    "swap_bytes": 0,
    "system": "Linux 6 x86_64",
    "file_system": "ext4",
    "disk": {"device": "vda", "model": None, "scheduler": "none", "read_ahead_kb": "128"},
    "pyengine": "0.1.0",
    "llama_cpp_python": "0.3.36",
    "python": "3.11.7",
}


@pytest.fixture
def samples(sample):
    found = []
    for number in range(2):
        found += [
            sample(round=number, decode_tok_per_s=20.0, prefill_tok_per_s=60.0, ttft_s=11.0, exact="yes"),
            sample(round=number, kind="stock-mmap", status="out of memory", reason="killed", peak_group_bytes=10**9),
            sample(round=number, kind="stock-mmap-plain", decode_tok_per_s=1.0, disk_mb_per_token=300.0, exact="no"),
        ]
        for share, speed in ((25.0, 4.0), (50.0, 8.0)):
            common = {
                "round": number,
                "share": share,
                "hit_rate": share / 100,
                "exact": "yes",
                "probe_mb_per_s": 1000.0,
            }
            found.append(
                sample(kind="lru", decode_tok_per_s=speed, reads_per_token=300.0, bandwidth_mb_per_s=800.0, **common)
            )
            found.append(
                sample(
                    kind="lru-bundle",
                    decode_tok_per_s=1.5 * speed,
                    reads_per_token=100.0,
                    bandwidth_mb_per_s=900.0,
                    **common,
                )
            )
    return found


@pytest.fixture
def folder(tmp_path, samples, facts):
    path = tmp_path / "results"
    path.mkdir()
    with (path / "bench.csv").open("w", newline="") as file:
        table = CsvWriter(file)
        for one in samples:
            table.add(one)
    models = [BenchModel(facts, None)]
    content = record(MACHINE, Settings(rounds=2), models, command="pyengine bench", busy=0.01, forced=False)
    probes = [{"size": 335872, "threads": 4, "direct": True, "bytes_per_s": speed} for speed in (9e8, 1.1e9)]
    write_record(path, {**content, "caches": "drop_caches", "probes": probes})
    return path


def row_of(page, name):
    return next(line for line in page.splitlines() if line.startswith(f"| {name} |"))


def test_page_has_medians_and_ratios(folder):
    page = report([read_run(folder)], folder.parent / "page.md")
    cells = [cell.strip() for cell in row_of(page, "lru 50%").split("|")]
    assert cells[2:5] == ["8", "0.40 (0.40 .. 0.40)", "8.00 (8.00 .. 8.00)"]
    assert "| lru 50% |  |  | 50.0% |" in page  # the second table: no limit and no peak in these samples
    assert "random direct reads of 336 kB, 4 at a time: 900 to 1100 MB/s" in page
    assert "0.10 GB, of which experts 0.08 GB: 10 layers x 8 experts of 1.00 MB, 2 used by a token." in page


def test_page_says_what_was_killed_and_what_is_not_exact(folder):
    page = report([read_run(folder)], folder.parent / "page.md")
    assert "**2 x out of memory**" in row_of(page, "stock-mmap")
    assert row_of(page, "stock-mmap-plain").endswith("| no |")
    assert "Faults of this run" not in page


def test_page_compares_bundles_with_plain_files(folder):
    page = report([read_run(folder)], folder.parent / "page.md")
    assert "| 50 % | 1.50 |  |  |  | 0.33 |  |" in page


def test_faults_are_on_the_page(folder, sample):
    run = read_run(folder)
    wrong = [*run.samples, sample(kind="on-demand", exact="no")]
    page = report([type(run)(run.folder, wrong, run.record)], folder.parent / "page.md")
    assert "- toy.gguf, on-demand: other tokens than the reference's" in page


def test_conditions_are_in_the_heading(folder):
    run = read_run(folder)
    limited = dict(run.record, settings={**run.record["settings"], "disk_limit": 2e8, "trace": "t.npz"})
    page = report([type(run)(run.folder, run.samples, limited)], folder.parent / "page.md")
    assert "## toy: disk limited to 200 MB/s; expert ids from `t.npz`: trace replay, text meaningless" in page


def test_program_writes_the_page_with_links_that_hold(folder, samples, monkeypatch):
    plots.draw(samples, folder)
    page = folder.parent / "docs" / "benchmark.md"
    page.parent.mkdir()
    main([str(folder), "-o", str(page)])
    links = [line.rpartition("(")[2].rstrip(").") for line in page.read_text().splitlines() if "](" in line]
    assert len(links) >= 3
    assert all((page.parent / link).is_file() for link in links)


@pytest.mark.parametrize("missing", ["bench.csv", "machine.json"])
def test_program_names_the_file_that_is_missing(folder, missing, tmp_path):
    (folder / missing).unlink()
    with pytest.raises(SystemExit, match=missing):
        main([str(folder), "-o", str(tmp_path / "page.md")])


def test_a_record_of_others_is_refused(folder):
    (folder / "machine.json").write_text("[]")
    with pytest.raises(UsageError, match="no record of a benchmark"):
        read_run(folder)


def test_plots_are_pictures_and_only_of_what_was_measured(tmp_path, samples):
    written = plots.draw(samples, tmp_path)
    assert {path.stem for path in written} == {"decode", "prefill", "first_token", "bytes_per_token", "bandwidth"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    idle = [replace(one, bandwidth_mb_per_s=None) for one in samples]
    assert "bandwidth" not in {path.stem for path in plots.draw(idle, tmp_path)}


def test_one_budget_makes_no_curve(tmp_path, samples):
    assert plots.draw([one for one in samples if one.share != 25.0], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_plots_do_not_change_with_time(tmp_path, samples):
    first = {path.name: path.read_bytes() for path in plots.draw(samples, tmp_path)}
    assert {path.name: path.read_bytes() for path in plots.draw(samples, tmp_path)} == first


def test_forecasts_stand_beside_what_was_measured(sample):
    told = {"plan_prefill_tok_per_s": 50.0, "guess_decode_tok_per_s": 6.0, "guess_prefill_tok_per_s": 40.0}
    common = {"kind": "lru", "share": 50.0, "hit_rate": 0.5, "plan_hit_rate": 0.55, "prefill_tok_per_s": 50.0, **told}
    page = "\n".join(
        forecasts(
            [
                sample(decode_tok_per_s=9.0),
                sample(decode_tok_per_s=4.0, plan_decode_tok_per_s=5.0, **common),
                sample(decode_tok_per_s=5.0, plan_decode_tok_per_s=4.5, **common),
            ]
        )
    )
    assert "| lru 50% | 50 % | 55 % | +25% -10% | +50% +20% | +0% +0% | -20% -20% |" in page
    assert "Largest error: decode 25%, without a trace 50%; prefill 0% and 20%." in page
    assert not list(forecasts([sample(kind="lru", share=50.0, decode_tok_per_s=4.0)]))


def test_every_kind_of_row_can_be_drawn():
    assert set(plots._COLOURS) == set(KINDS)
    assert set(plots._WIDTHS) | set(plots._LINES) == set(KINDS)
