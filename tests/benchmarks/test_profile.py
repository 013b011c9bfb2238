import pytest

from benchmarks.performance import profile_table
from benchmarks.profile import SHAPES, records

CSV = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","unknown"
"","","us","register/thread",""
"0","sweep","412.5","255","1"
"1","sweep","1,168.25","255","1"
"2","sweep","89.5","255","1"
"3","sweep","24","255","1"
"4","sweep","361","128","1"
"""


def test_a_profile_becomes_one_column_for_each_shape(tmp_path):
    file = tmp_path / "profile.csv"
    file.write_text(CSV)
    table = profile_table(list(records(file, {"triton": "3.6.0"})))
    assert "| what | unit | 4, 32, 8192 | 1, 32, 65536 | 1, 32, 4096 | 1, 32, 1024 | 1, 32, 16384, K 256 |" in table
    assert "| time | us | 412.5 | 1168 | 89.5 | 24 | 361 |" in table
    assert "| registers per thread | register/thread | 255 | 255 | 255 | 255 | 128 |" in table
    assert "unknown" not in table


def test_a_profile_of_other_kernels_is_refused(tmp_path):
    file = tmp_path / "profile.csv"
    file.write_text("\n".join(CSV.splitlines()[:-4]))
    with pytest.raises(ValueError, match=f"has 1 kernels; expected {len(SHAPES)}"):
        list(records(file, {"triton": "3.6.0"}))
