"""tests/bench/gpu.py at toy size: a borrowed GPU must not be needed twice."""
import json
import math

from conftest import command


def numbers(value):
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def test_every_part_of_gpu(tmp_path):
    command("tests/bench/gpu.py", "--tiny", "--out", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == "machine ft profile correct frozen predict loader compile project search plain".split()
    for part, result in found.items():
        assert "error" not in result, (part, result["error"])
        assert result["rows"] and all(map(math.isfinite, numbers({i: r for i, r in enumerate(result["rows"])}))), part
        assert all(row.get("ok", True) and "failed" not in row for row in result["rows"]), part
