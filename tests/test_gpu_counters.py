"""The table of what Nsight Compute counted."""

from __future__ import annotations

from tools.gpu import counters

NAMES = (
    "ID", "Kernel Name", "gpu__time_duration.sum", "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active", "launch__grid_size",
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_drain_per_issue_active.ratio",
)  # fmt: skip
RAW = "\n".join(
    [
        "==PROF== Connected to process 7",
        ",".join(f'"{name}"' for name in NAMES),
        '"","","ms","inst","%","","","","",""',
        '"0","match(const Problem)","0.040","2,000,000","25.0","1,936","1.0","2.25","7.5","0.1"',
        '"1","sum","0.001","500","1.0","1","1.0","0.4","0.3","0.2"',
    ]
)


def test_launches_get_what_bounds_them_and_the_longest_waits_first():
    match, last = counters.rows_of(RAW, ["S32-w2 cuda", "S32-w2 triton"])
    assert (match["case"], match["backend"], match["kernel"]) == ("S32-w2", "cuda", "match")
    assert match["µs"] == "40.0", "of a time in milliseconds"
    assert match["if all were used"] == "10.0"
    assert (match["million instructions"], match["blocks"]) == ("2", "1936")
    assert match["waits"] == "long scoreboard 7.5, wait 2.2"
    assert (last["backend"], last["waits"]) == ("triton", "")


def test_what_is_no_table_has_no_rows():
    assert counters.rows_of("==ERROR== no permission", []) == []
    assert counters.rows_of(RAW.rpartition("\n")[0].rpartition("\n")[0], []) == []


def test_launches_belong_to_the_case_that_is_named_after_them():
    said = """==PROF== Connected to process 3
==PROF== Profiling "plan_kernel": 0%....100% - 20 passes
==PROF== Profiling "match_kernel": 0%....100% - 20 passes
S32-C384-44x44-w2-float32-channels_last triton
==PROF== Profiling "salkernels_match": 0%....100% - 20 passes
S32-C384-44x44-w2-float32-channels_last cuda
==PROF== Profiling "late": 0%....100% - 20 passes
out of time before S32-C384-44x44-w3-float32-channels_last cuda
"""
    labels = counters.labels_of(said)
    assert [label.split()[1] for label in labels] == ["triton", "triton", "cuda", "?"]


def test_files_have_a_line_for_each_launch(tmp_path):
    counters.write(tmp_path, counters.rows_of(RAW, []))
    assert len((tmp_path / "counters.csv").read_text().splitlines()) == 3
    assert "| sum |" in (tmp_path / "counters.md").read_text()
