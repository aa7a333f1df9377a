"""What people have: each kind of carrier, table, folder and archive as a small input, and the prompts that it holds."""
import base64
import csv
import html
import io
import json
import os
import random
import unicodedata

import clean
import numpy as np
import polars as pl
import predict
import pytest
from conftest import png, put
from PIL import Image, ImageCms, ImageColor
from PIL.PngImagePlugin import PngInfo

A, B, CJK = "a red fox, oil on canvas", "two owls in a tree", "一只红狐狸在雪地里奔跑，油画风格"
RUN = '\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Lora hashes: "a: b, c: d", Version: v1.9'


@pytest.mark.parametrize("text, prompt", [
    (A + RUN, A), (f"{A}\nNegative prompt: x, y\nmore\n{RUN}", A), (f"{A}\nNegative prompt: x", A),
    (f"{A}\n{B}{RUN}", f"{A}\n{B}"),
    (f"{A}\r\nNegative prompt: x\r\nSteps: 20, Seed: 1", A), (RUN, ""), (f"\nNegative prompt: x{RUN}", ""),
    (f"{A} Negative prompt: x Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1", A),  # a cell on one line
    (f"{A}, Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1", A),
    (f"{A}\nApp: SD.Next, Version: aa, Pipeline: X,\nSteps: 25, Seed: 1", A),
    (f"{A}\nSize: 512x512, Seed: 1, Steps: 5", A),
    (f"Prompt: {A}\nWidth: 512\nHeight: 512\nSeed: 1\nSteps: 25\nNegative Prompt: x", A),
    (f"Seed: 1\nPrompt: {A}\nSteps: 25", A), (f"prompt: {A}{RUN}", A), (f"Positive prompt: {A}\nNegative prompt: x", A),
    (f"<lora:a_b:0.8> {A} <hypernet:x:1>", A), (f"{A} ::: (red:1.2) [blue|green] {{x}}",) * 2,
    (f"[{A}] at night",) * 2, ("{red|blue} fox",) * 2, ("[[fox]], owl",) * 2, (f"{A}, Steps: 12 of the stairs",) * 2,
    (f"{A}\nStyle: oil, Mood: dark",) * 2, (f"{A}, Size: large, Model: Kate",) * 2, ("Prompt: the first word",) * 2,
    (f"{A} that says Negative prompt: none",) * 2, (f"Title: Fox\n{A}\nSteps: 12 of the stairs, Seed: 1",) * 2,
    (json.dumps({"prompt": A, "negative_prompt": B}), A), (json.dumps({"sui_image_params": {"prompt": A}}), A),
    (json.dumps({"meta": {"prompt": A + RUN}}), A), (json.dumps({"c": A, "uc": B, "seed": 1}), A),
    (json.dumps([A, B]), A),
    (json.dumps({"Description": A, "Comment": json.dumps({"uc": B})}), A),
    (json.dumps({"image": {"prompt": [{"prompt": A}]}}), A),
    (json.dumps({"v4_prompt": {"caption": {"base_caption": A}}, "uc": B}), A),
    (json.dumps({"Prompt": A, "Seed": 1}), A),
    (f"{A} Negative prompt: x Steps: 20, Sampler: Euler a", A), (f"{A}\\nNegative prompt: x\\nSteps: 20, Seed: 1", A),
    (f"{A}, Steps: 1, Steps: 2, Steps: 3",) * 2, (f"{A}\nSteps: 4, Size: 2x2, cookies",) * 2,
    (str({"prompt": A, "seed": 1}), A), (str([A, "x"]), A), (json.dumps({"parameters": A + RUN}), A),
    (json.dumps({"negative_prompt": B}), None), (json.dumps({"image": "0.png", "seed": 1}), None), ("[1, 2]", None),
    (json.dumps({"prompt": ""}), None), ("null", ""), ("{", "")])
def test_prompt_of(text, prompt):
    assert clean.prompt_of(text) == prompt


def node(kind, **inputs):  # a list [id, output] is a link; "=6" is short for ["6", 0]
    linked = {k: [v[1:], 0] if isinstance(v, str) and v.startswith("=") else v for k, v in inputs.items()}
    return {"class_type": kind, "inputs": linked}


def text(prompt):
    return node("CLIPTextEncode", text=prompt, clip="=4")


K = node("KSampler", positive="=6", negative="=7", latent_image="=5", seed=1)
GRAPH = {"3": K, "6": text(A), "7": text("bad hands"), "5": node("EmptyLatentImage")}


@pytest.mark.parametrize("graph, prompt", [
    ({}, A), ({"6": node("CLIPTextEncodeSDXL", text_g=A, text_l="tags")}, A), ({"6": text("=77")}, "missing"),
    ({"6": node("CLIPTextEncodeSD3", clip_l="tags", clip_g="g", t5xxl="")}, "g"),
    *[({"6": text("=9"), "9": node(kind, **{key: B})}, kind) for kind, key in (
        ("LLMNode", "prompt"), ("LoadTextFile", "value"), ("Prompt Expansion", "text"), ("Text to Uppercase", "text"))],
    ({"6": node("GLIGENTextBoxApply", conditioning_to="=8", text="galaxy"), "8": text(A)}, A),
    ({"6": node("ConditioningMultiCombine", **{f"conditioning_{i}": f"={20 + i}" for i in range(12)}),
      **{str(20 + i): text(f"p{i}") for i in range(12)}}, ", ".join(f"p{i}" for i in range(12))),
    ({"9": node("KSampler", positive="=8", latent_image="=5"), "8": node("ConditioningZeroOut", conditioning="=6")}, A),
    ({"6": node("ConditioningCombine", conditioning_1="=8", conditioning_2="=9"), "8": text(A), "9": text(B)},
     f"{A}, {B}"),
    ({"6": node("ConditioningConcat", conditioning_from="=8", conditioning_to="=9"), "8": text(B), "9": text(A)},
     f"{A}, {B}"),
    ({"6": node("ControlNetApplyAdvanced", positive="=8", negative="=7", image="=9"), "8": text(A)}, A),
    ({"3": node("SamplerCustomAdvanced", guider="=8", latent_image="=5"), "8": node("CFGGuider", positive="=6")}, A),
    ({"6": text("=8"), "8": node("Text Concatenate", delimiter=", ", clean_whitespace="true", text_b="=9", text_a=A),
      "9": node("ShowText|pysssss", text="=10", text_0="old"), "10": node("PrimitiveString", value=B)}, f"{A}, {B}"),
    ({"6": text("=8"), "8": node("StringReplace", string=A, find="red", replace="blue")}, "StringReplace"),
    ({"9": {**K, "inputs": {**K["inputs"], "positive": ["8", 0]}}, "8": text(B)}, "2 prompts"),
    ({"9": node("SaveImage", images="=10"), "10": node("VAEDecode", samples="=3"),  # what 11 makes is saved nowhere
      "11": node("KSampler", positive="=8", latent_image="=5"), "8": text(B)}, A),
    ({"12": node("KSampler", positive="=8", latent_image="=13"), "13": node("LatentUpscale", samples="=3"),
      "8": text("sharp"), "9": node("SaveImage", images="=12")}, A),
    ({"9": node("KSampler", positive="=8", latent_image="=16"), "8": text("sharp"), "16": node("VAEEncode", pixels="=15"),
      "15": node("LoadImage", image="x.png")}, A),  # an image of its own is no composition
    ({"5": node("VAEEncode", pixels="=15"), "15": node("LoadImage", image="x.png")}, A),
    ({"6": node("ConditioningCombine", conditioning_1="=6", conditioning_2="=6")}, "loop"),
    ({"3": node("SaveImage", images="=5")}, "no sampler")])
def test_comfy(graph, prompt):
    try:
        assert clean.prompt_of(json.dumps({**GRAPH, **graph})) == prompt
    except clean.NoPrompt as e:
        assert prompt not in (A, B) and prompt in str(e)


def exif(text, tag=0x9286, code=b"UNICODE\0", order="be"):
    found = Image.Exif()
    if tag == 0x9286:
        text = code + text.encode(f"utf-16-{order}" if code == b"UNICODE\0" and order != "8" else "utf8")
    (found.get_ifd(0x8769) if tag == 0x9286 else found)[tag] = text
    return {"exif": found.tobytes()}


def chunks(xmp=None, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    if xmp:
        info.add_itxt("XML:com.adobe.xmp", f"<exif:UserComment><rdf:Alt><rdf:li>{html.escape(xmp)}</rdf:li></rdf:Alt>")
    return {"pnginfo": info}


INVOKE = {"sd-metadata": json.dumps({"image": {"prompt": [{"prompt": A}]}})}


@pytest.mark.parametrize("kind, options", [
    *[("PNG", chunks(**texts)) for texts in (
        {"parameters": A + RUN}, {"parameters": RUN, "prompt": json.dumps(GRAPH)}, {"prompt": A, "seed": "1"}, INVOKE,
        {"invokeai_metadata": json.dumps({"positive_prompt": A})}, {"Dream": f'"{A}" -s 50'},
        {"Comment": "Created with GIMP", "Description": A}, {"Description": B, "Comment": json.dumps({"prompt": A})},
        {"xmp": json.dumps({"c": A, "uc": ""})})],
    *[(kind, exif(A + RUN, order=order)) for kind in ("JPEG", "WEBP", "AVIF", "PNG") for order in ("be", "le")],
    *[("JPEG", exif(CJK, order=order)) for order in ("be", "le")], ("JPEG", exif(A, code=b"UNICODE\0", order="8")),
    ("JPEG", {"comment": (A + RUN).encode()}), ("JPEG", exif(A + RUN, code=b"ASCII\0\0\0")),
    ("JPEG", exif(json.dumps({"prompt": A}))),
    ("WEBP", exif(A, 0x010e)), ("WEBP", exif("prompt:" + json.dumps(GRAPH), 0x0110))])
def test_image_carriers(tmp_path, kind, options):
    Image.new("RGB", (32, 24), "red").save(tmp_path / f"a.{kind}", kind, **options)
    assert clean.read_source(tmp_path)["prompt"].to_list() in ([A], [CJK])


def test_colour_profiles_and_large_extras():
    """A profile whose red is blue; text and profiles that Pillow refuses."""
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"s\0R\0G", b"x\0R\0G")
    swapped = swapped.replace(b"rXYZ", b"_XYZ").replace(b"bXYZ", b"rXYZ").replace(b"_XYZ", b"bXYZ")
    large, noise = PngInfo(), np.random.default_rng(0).bytes(2 << 20)
    large.add_text("parameters", noise.hex(), zip=True)
    for mode, kind, options, seen in [
            *[(mode, kind, {"icc_profile": swapped, "lossless": True, "quality": 95}, "blue") for mode, kind in (
                ("RGB", "PNG"), ("RGB", "JPEG"), ("RGBA", "WEBP"), ("P", "PNG"))],
            ("RGB", "PNG", {"icc_profile": b"broken"}, "red"), ("RGB", "PNG", {"icc_profile": noise}, "red"),
            ("RGB", "PNG", {"pnginfo": large}, "red"), ("CMYK", "JPEG", {"icc_profile": swapped}, "red")]:
        Image.new("RGB", (16, 16), "red").convert(mode).save(file := io.BytesIO(), kind, **options)
        found = np.asarray(clean.open_rgb(file), int)[8, 8]
        assert np.abs(found - ImageColor.getrgb(seen)).max() < 8, (mode, kind, found)


def lines(*records):
    return "\n".join(map(json.dumps, records))


def parquet(**columns):
    pl.DataFrame(columns).write_parquet(f := io.BytesIO())
    return f.getvalue()


PAIR = {"0.png": png("red"), "1.png": png("blue")}
ROWS = [{"image": "0.png", "prompt": A}, {"image": "1.png", "prompt": B}]
CELLS = [{"bytes": v, "path": k} for k, v in PAIR.items()]
B64 = [{"image": {"bytes": base64.b64encode(PAIR[k]).decode(), "path": k}, "text": t} for k, t in zip(PAIR, (A, B))]
NFC, NFD = (unicodedata.normalize(f, "fö") for f in ("NFC", "NFD"))
LINES = lines(*ROWS)
CSV = f'image,prompt\n0.png,"{A}"\n1.png,{B}\n'
TABLES = {  # name: content, flags
    "x.csv": [CSV], "utf16.csv": [CSV.encode("utf-16")], "blank.csv": ["\n\n" + CSV.replace("\n", "\n\n")],
    "semi.csv": [f"image;prompt\n0.png;{A}\n1.png;{B}\n"], "pipe.csv": [f"prompt|image\r\n{A}|0.png\r\n{B}|1.png"],
    "tab.csv": [f"image\tprompt\n0.png\t{A}\n1.png\t{B}\n"], "x.tsv": [f"image\tprompt\n0.png\t{A}\n1.png\t{B}\n"],
    "space.csv": [f'image, prompt\n0.png, "{A}"\n1.png, {B}\n'], "long.csv": [CSV + "2.png,one, too many\n"],
    "escape.csv": [f'image,note,prompt\n0.png,"x \\"y\\", z","{A}"\n1.png,x,{B}\n'],
    "quotes.tsv": [f'image\tnote\tprompt\n0.png\t"x\t{A}\n1.png\t"y" z\t{B}\n'],
    "info.csv": ["image,prompt\n0.png,\"" + A + RUN.replace('"', '""') + f'"\n1.png,{B}\n'],
    "x.json": [json.dumps(ROWS, indent=1)], "dict.json": [json.dumps({"0.png": A, "1.png": {"caption": B}})],
    "data.json": [json.dumps({"version": 1, "data": ROWS})], "lines.json": [LINES],
    "list.jsonl": [json.dumps(ROWS, indent=1)],
    "split.json": [json.dumps({"columns": ["image", "prompt"], "data": [["0.png", A], ["1.png", B]]})],
    "index.json": [json.dumps({"a": ROWS[0], "b": ROWS[1]})],
    "excel.csv": [f"sep=;\nimage;prompt\n0.png;{A}\n1.png;{B}\n"],
    "coco.json": [json.dumps({"images": [{"id": i, "file_name": f"{i}.png"} for i in (0, 1)],
                              "annotations": [{"image_id": i, "caption": c} for i, c in enumerate((A, B))]})],
    "surrogate.jsonl": [LINES + '\n{"image": "2.png", "prompt": "\\ud83d"}\n'],
    "columns.json": [json.dumps({"image": [*PAIR], "prompt": [A, B]})],
    "pandas.json": [json.dumps({"image": dict(zip("01", PAIR)), "prompt": {"0": A, "1": B}})],
    "cut.jsonl": ["\ufeff" + LINES + '\n{"image": "9.png", "pro'], "utf16.jsonl": [LINES.encode("utf-16")],
    "nan.jsonl": [lines({**ROWS[0], "s": float("nan"), "z": [1]}, {**ROWS[1], "s": "x", "z": {}}) + "\n[1]\nnull\n"],
    "captions.jsonl": [lines(*[{**r, "prompt": [r["prompt"], "other"]} for r in ROWS])],
    "base64.jsonl": [lines(*B64)],
    "uri.jsonl": [lines(*[{"img": "data:image/png;base64," + r["image"]["bytes"], "text": r["text"]} for r in B64])],
    "path.jsonl": [lines(*[{"image": {"path": r["image"], "bytes": None}, "prompt": r["prompt"]} for r in ROWS])],
    "field.jsonl": [lines(*[{"image": r["image"], "text": {"en": r["prompt"]}} for r in ROWS]), "prompt_col",
                    "text.en"],
    "hub.parquet": [parquet(image=CELLS, text=[A, B])], "bytes.parquet": [parquet(jpg=[*PAIR.values()], txt=[A, B])],
    "lists.parquet": [parquet(images=[[c, c] for c in CELLS], captions=[[A, "x"], [B]])],
    "paths.parquet": [parquet(image=[{"bytes": None, "path": p} for p in PAIR], prompt=[A, B])],
    "odd.parquet": [parquet(image=[*PAIR], prompt=[A, B], width=[[1], [2]], image_nsfw=["x", None], source=[1, 2])],
    "field.parquet": [parquet(image=[*PAIR], text=[{"en": A, "de": ""}, {"en": B, "de": ""}]), "prompt_col", "text.en"],
    "named.parquet": [parquet(photo=[*PAIR.values()], image=[*PAIR], prompt=[A, B]), "image_col", "photo"]}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    """By itself, in a folder, and for predict.py."""
    content, *flag = TABLES[name]
    path, columns = put(tmp_path, {**PAIR, name: content}) / name, dict([flag] if flag else [])
    rows = clean.read_source(path, limit=2, **columns)
    assert rows["prompt"].to_list() == [A, B]
    found = [clean.open_rgb(i).getpixel((5, 5)) for i in clean.find_images(rows["image"])]
    assert found == [(255, 0, 0), (0, 0, 255)]
    assert sorted(clean.read_source(tmp_path, **columns).drop_nulls("prompt")["prompt"])[-2:] == [A, B], "in a folder"
    assert clean.read_source(path, limit=1, **columns)["prompt"].to_list() == [A]
    assert clean.read_source(path, need=("prompt",), **columns)["prompt"].to_list()[:2] == [A, B]
    ids, _, prompts = predict.list_images([str(path)], limit=2, **columns)
    assert ids == ["0", "1"] and prompts == [A, B]


def test_csv_is_what_the_csv_module_reads(tmp_path):
    """400 random tables, of separators, quotation marks, backslashes and line ends."""
    rng = random.Random(0)
    for n in range(400):
        rows = [[f"{i}.png", *("".join(rng.choices("ab c,;|\t\"'\\\n\r1é“.", k=9 + i)) for _ in range(n % 3))]
                for i in range(1, rng.randint(2, 7))]
        if n == 0:  # a backslash before a separator escapes nothing here
            rows = [["0.png", '"', "\n\\,"], ["1.png", '."', "\\\r\t"]]
        out = csv.writer(text := io.StringIO(newline=""), quoting=n % 2, lineterminator=["\n", "\r\n"][n % 5 > 1])
        out.writerows([["image", "prompt", "more"][:len(rows[0])], *rows])
        path = put(tmp_path, {"a.csv": text.getvalue()}) / "a.csv"
        known = [*csv.DictReader(io.StringIO(text.getvalue(), newline=""))]
        found = clean.read_csv(path, None, None, ("image",), None)
        assert [*found.iter_rows(named=True)] == [{k: r[k] for k in found.columns} for r in known], text.getvalue()


RED, BLUE = PAIR.values()
TOLD = png("red", **chunks(parameters=A + RUN))
TXT = {**PAIR, "0.txt": A, "1.txt": B}
TAGS = "fox, red fur, 1girl, solo"
PLACES = {  # name: files of a folder or archive; what is said of those that are not read
    "sidecars": [{**PAIR, "0.txt": A, "1.json": json.dumps({"caption": B, "tags": ["x"]})}],
    "caption": [{**PAIR, "0.caption": A, "0.txt": TAGS, "1.txt": B, "1.caption": ""}],
    "weak json": [{"0.png": TOLD, "0.json": json.dumps({"description": "x", "text": "y"}), "1.png": BLUE, "1.txt": B}],
    "two tables": [{**PAIR, "a.jsonl": lines({"image": "0.png", "text": {"en": A}}), "0.txt": A, "1.txt": B},
                   "a.jsonl: the column text has the fields en; pick one: --prompt-col text.en"],
    "own": [{"0.png": TOLD, "0.txt": TAGS, "1.png": BLUE, "1.txt": B}],
    "infotext": [{**PAIR, "0.txt": A + RUN, "1.png.txt": B + RUN}], "utf16": [{**TXT, "1.txt": B.encode("utf-16")}],
    "hub": [{"README.md": "x", "data/train-0-of-2.parquet": parquet(image=CELLS[:1], text=[A]),
             "data/train-1-of-2.parquet": parquet(image=CELLS[1:], text=[B])}, "1 × .md"],
    "table": [{"im/0.png": RED, "im/1.png": BLUE, "a.csv": f'image,prompt\nim\\0.png,"{A}"\nim/1.png,{B}\n'}],
    "blank cell": [{"0.png": TOLD, "1.png": BLUE, "t.csv": f"image,prompt\n0.png,\n1.png,{B}\n"}],
    "no prompt column": [{"0.png": TOLD, "1.png": BLUE, "t.csv": "image,score\n0.png,1\n1.png,2\n", "1.txt": B}],
    "embedded": [{"t.parquet": parquet(image=[{"bytes": TOLD, "path": "0.png"}]), "1.png": BLUE, "1.txt": B}],
    "other table": [{**TXT, "s.csv": "id,score\n1,2\n"}, "s.csv: no column for the image among: id, score"],
    "odd\n\x1b]0;names": [{"a\nb/0.png": RED, "a\nb/0.txt": A, "\x1b[2J.png": BLUE, "\x1b[2J.txt": B}],
    "meta.json": [{**PAIR, "meta.json": json.dumps({"0": {"caption": A}, "1.png": B})}],
    "unicode": [{f"{NFD}.png": RED, f"{NFC}.txt": A, "1.png": BLUE, "1.txt": B}],
    "unicode table": [{f"{NFD}/0.png": RED, "1.png": BLUE,
                       "t.jsonl": lines({"image": f"{NFC}/0.png", "text": A}, {"image": "1.png", "text": B})}],
    "suffixes": [{"0.JFIF": RED, "1.avif": BLUE, "0.txt": A, "1.TXT": B, "2.jxl": b"x", "3": b"x"},
                 "1 × .jxl (pip install pillow-jxl-plugin)"],
    "clutter": [{**TXT, "._0.png": b"x", "__MACOSX/1.png": b"x", ".git/2.png": png()}, "1 × hidden folder"],
    "links/b": [{"../a/0.png": RED, "../a/0.txt": A, "1.png": BLUE, "1.txt": B}],
    "pipe": [TXT, "3 × pipe, device or broken link"], "x.zip": [{**TXT, "__MACOSX/._0.png": b"x"}],
    "locked.zip": [{**TXT, "2.png": png()}, "1 × encrypted member"],
    "bomb": [{**TXT, "b.json": "[" + "[]," * 9_000_000 + "0]"}, "1 × unreadable or too large .json"],
    "evil.zip": [{**TXT, "../2.png": png()}, "1 × unsafe name"],
    "hub.zip": [{"data/t.parquet": parquet(image=CELLS, text=[A, B])}],
    "dots.tar": [{"0.in.png": RED, "0.out.txt": A, "1.x.png": BLUE, "1.json": json.dumps({"caption": B})}],
    "exact.tar": [{"a.png": RED, "a.txt": A, "a.b.png": BLUE, "a.b.txt": B}],
    "ambiguous.tar": [{**TXT, "s.a.png": png(), "s.b.txt": "one red text", "s.c.txt": "another red text"}],
    "plain.tar": [{"s.0.png": RED, "s.0.txt": A, "s.1.png": BLUE, "s.1.txt": B}],
    **{f"x.tar.{c}": [TXT] for c in ("gz", "bz2", "xz")}}


@pytest.mark.parametrize("name", PLACES)
def test_places(tmp_path, capsys, name):
    (content, *told), place = PLACES[name], tmp_path / name
    put(place, content)
    if name == "locked.zip":  # its last member, or so it says
        data = bytearray(place.read_bytes())
        data[data.rindex(b"PK\1\2") + 8] |= 1
        place.write_bytes(data)
    if name == "links/b":
        (place / "more").symlink_to(tmp_path / "links/a")
        (tmp_path / "links/a/back").symlink_to(place)
    if name == "pipe":
        (place / "loop").symlink_to("loop")
        os.mkfifo(place / "2.png")
        (place / "3.png").symlink_to("/dev/zero")
    assert sorted(clean.read_source(place).drop_nulls("prompt")["prompt"]) == [A, B]
    said = capsys.readouterr().err
    assert all(t in said for t in told), said
    ids, paths, prompts = predict.list_images([str(place)])
    assert name == "ambiguous.tar" or len(ids) == 2 and sorted(prompts) == [A, B] and all(clean.open_rgb(p).size == (32, 24) for p in paths)
