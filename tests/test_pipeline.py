"""The whole job on small inputs, with the real commands."""
import json

import numpy as np
import polars as pl

from conftest import command


def test_end_to_end(trained, data, tmp_path):
    lp, ft = (json.loads((trained / p / "metrics.jsonl").read_text().splitlines()[0]) for p in ("lp", "ft"))
    best_lp = max(r.get("val_cosine", -1) for r in map(json.loads, (trained / "lp/metrics.jsonl").read_text().splitlines()))
    assert abs(ft["val_cosine"] - best_lp) < 1e-4, "ft starts at the lp score"
    for n in (1, 2):
        command("predict.py", "--run", trained / "ft", "--tta", n, "--out", tmp_path / f"{n}.npz", "--workers", 0)
    one, two = (np.load(tmp_path / f"{n}.npz") for n in (1, 2))
    assert (one["ids"] == two["ids"]).all() and np.abs(one["embeddings"] - two["embeddings"]).max() > 1e-4, "the second view is another view"
    done = command("ensemble.py", tmp_path / "1.npz", tmp_path / "2.npz", "--out", tmp_path / "e.npz", "--submission", tmp_path / "s.csv")
    assert "plain average" in done.stdout
    table = pl.read_csv(tmp_path / "s.csv")
    assert table.columns == ["imgId_eId", "val"] and len(table) == 384 * len(one["ids"])
