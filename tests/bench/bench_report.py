"""
How fast a report of 2,000 cards opens, sorts and filters in headless Chromium, and how large it is.

$ python tests/bench/bench_report.py
"""
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
import predict  # noqa: E402
from test_predict import browse  # noqa: E402

CARDS = 2000
MEASURE = """
const opened = performance.getEntriesByType('navigation')[0].loadEventEnd;
return [['open', opened], ...[['filter', 'zebra 7'], ['filter', ''], ['sort', 'best']].map(([id, value]) => {
  const start = performance.now();
  $(id).value = value;
  $(id).oninput();
  document.body.offsetHeight;
  return [id, performance.now() - start];
})]"""


def photo(seed):
    """A thumbnail as large as those of photographs are: noise"""
    image = Image.effect_noise((336, 336), 20 + 3 * seed).convert("RGB").filter(ImageFilter.BoxBlur(1 + seed % 4))
    image.save(data := io.BytesIO(), "JPEG", quality=95)
    return predict.thumbnail(data)


def main():
    os.chdir(tempfile.mkdtemp())
    prompts = [f"a photograph of a small green zebra {i} beside a large table, film grain" for i in range(CARDS)]
    near = [[(0.8, prompts[i - j]) for j in range(5)] for i in range(CARDS)]
    photos, cosines = [photo(seed) for seed in range(50)], np.random.default_rng(0).random(CARDS)
    with open("report.html", "wb") as f:
        predict.write_report(f, "2,000 cards", {}, prompts, (photos * CARDS)[:CARDS], cosines, 0.4, prompts, near)
    print(f"{os.path.getsize('report.html') / CARDS / 1e3:.1f} KB a card")
    for _ in range(5):
        with browse(Path("report.html").read_text()) as run:
            print(*(f"{name} {ms:.0f} ms" for name, ms in run(MEASURE)), sep=", ")


if __name__ == "__main__":
    main()
