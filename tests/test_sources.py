"""What people have: each kind of carrier, table, folder and archive as a small input, and the prompts that it holds."""
import base64
import io
import json
import os
import tarfile
import unicodedata
import zipfile

import clean
import numpy as np
import polars as pl
import predict
import pytest
from conftest import png
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

A, B = "a red fox, oil on canvas", "two owls in a tree"
RUN = "\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Lora hashes: \"a: b, c: d\", Version: v1.9"


@pytest.mark.parametrize("text, prompt", [
    (A + RUN, A), (f"{A}\nNegative prompt: x, y\nmore\n{RUN}", A), (f"{A}\nNegative prompt: x", A), (f"{A}\n{B}{RUN}", f"{A}\n{B}"),
    (f"{A}\r\nNegative prompt: x\r\nSteps: 20, Seed: 1", A), (RUN, ""), (f"\nNegative prompt: x{RUN}", ""),
    (f"{A} Negative prompt: x Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1", A),  # a cell on one line
    (f"{A}, Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1", A),
    (f"{A}\nApp: SD.Next, Version: aa, Pipeline: X,\nSteps: 25, Seed: 1", A), (f"{A}\nSize: 512x512, Seed: 1, Steps: 5", A),
    (f"Prompt: {A}\nWidth: 512\nHeight: 512\nSeed: 1\nSteps: 25\nNegative Prompt: x", A),
    (f"Seed: 1\nPrompt: {A}\nSteps: 25", A), (f"prompt: {A}{RUN}", A), (f"Positive prompt: {A}\nNegative prompt: x", A),
    (f"<lora:a_b:0.8> {A} <hypernet:x:1>", A), (f"{A} ::: (red:1.2) [blue|green] {{x}}",) * 2,
    (f"[{A}] at night",) * 2, ("{red|blue} fox",) * 2, ("[[fox]], owl",) * 2, (f"{A}, Steps: 12 of the stairs",) * 2,
    (f"{A}\nStyle: oil, Mood: dark",) * 2, (f"{A}, Size: large, Model: Kate",) * 2, ("Prompt: the first word",) * 2,
    (f"{A} that says Negative prompt: none",) * 2, (f"Title: Fox\n{A}\nSteps: 12 of the stairs, Seed: 1",) * 2,
    (json.dumps({"prompt": A, "negative_prompt": B}), A), (json.dumps({"sui_image_params": {"prompt": A}}), A),
    (json.dumps({"meta": {"prompt": A + RUN}}), A), (json.dumps({"c": A, "uc": B, "seed": 1}), A), (json.dumps([A, B]), A),
    (json.dumps({"Description": A, "Comment": json.dumps({"uc": B})}), A), (json.dumps({"image": {"prompt": [{"prompt": A}]}}), A),
    (json.dumps({"v4_prompt": {"caption": {"base_caption": A}}, "uc": B}), A), (json.dumps({"Prompt": A, "Seed": 1}), A),
    (json.dumps({"negative_prompt": B}), None), (json.dumps({"image": "0.png", "seed": 1}), None), ("[1, 2]", None),
    (json.dumps({"prompt": ""}), None), ("null", ""), ("{", "")])
def test_prompt_of(text, prompt):
    assert clean.prompt_of(text) == prompt


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


TEXT = {"6": node("CLIPTextEncode", text=A, clip=["4", 1]), "7": node("CLIPTextEncode", text="bad"),
        "5": node("EmptyLatentImage")}
K = node("KSampler", positive=["6", 0], negative=["7", 0], latent_image=["5", 0], seed=1)


@pytest.mark.parametrize("graph, prompt", [
    ({"3": K}, A), ({"3": K, "6": node("CLIPTextEncode", text=["9", 0]), "9": node("LLMGenerate", prompt=B, model="x")}, "LLMGenerate"),
    ({"3": K, "6": node("CLIPTextEncodeSDXL", text_g=A, text_l="tags")}, A),
    ({"3": K, "6": node("CLIPTextEncodeSD3", clip_l="tags", clip_g="g", t5xxl="")}, "g"),
    ({"3": K, "6": node("ConditioningCombine", conditioning_1=["8", 0], conditioning_2=["9", 0]),
      "8": node("CLIPTextEncode", text=A), "9": node("CLIPTextEncode", text=B)}, f"{A}, {B}"),
    ({"3": K, "6": node("ConditioningConcat", conditioning_from=["8", 0], conditioning_to=["9", 0]),
      "8": node("CLIPTextEncode", text=A), "9": node("CLIPTextEncode", text=B)}, f"{B}, {A}"),
    ({"3": K, "6": node("ControlNetApplyAdvanced", positive=["8", 0], negative=["7", 0], image=["9", 0]),
      "8": node("CLIPTextEncode", text=A)}, A),
    ({"3": node("SamplerCustomAdvanced", guider=["8", 0], latent_image=["5", 0]), "8": node("CFGGuider", positive=["6", 0], negative=["7", 0])}, A),
    ({"3": K, "6": node("CLIPTextEncode", text=["8", 0]), "8": node("Text Concatenate", delimiter=", ", clean_whitespace="true",
      text_b=["9", 0], text_a=A), "9": node("ShowText|pysssss", text=["10", 0], text_0="old"), "10": node("PrimitiveString", value=B)}, f"{A}, {B}"),
    ({"3": K, "6": node("CLIPTextEncode", text=["8", 0]), "8": node("StringReplace", string=A, find="red", replace="blue")}, "StringReplace"),
    ({"3": K, "9": node("KSampler", positive=["8", 0], latent_image=["5", 0]), "8": node("CLIPTextEncode", text=B)}, "2 prompts"),
    ({"3": K, "9": node("SaveImage", images=["10", 0]), "10": node("VAEDecode", samples=["3", 0]),  # 11 is saved nowhere
      "11": node("KSampler", positive=["8", 0], latent_image=["5", 0]), "8": node("CLIPTextEncode", text=B)}, A),
    ({"3": K, "12": node("KSampler", positive=["8", 0], latent_image=["13", 0]), "13": node("LatentUpscale", samples=["3", 0]),
      "8": node("CLIPTextEncode", text="sharp"), "9": node("SaveImage", images=["12", 0])}, A),
    ({"3": {**K, "inputs": {**K["inputs"], "latent_image": ["14", 0]}}, "14": node("VAEEncode", pixels=["15", 0]),
      "15": node("LoadImage", image="x.png")}, A),
    ({"3": K, "6": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["6", 0])}, "loop"),
    ({"3": K, "6": node("CLIPTextEncode", text=["77", 0])}, "missing"), ({"3": node("SaveImage", images=["5", 0])}, "no sampler")])
def test_comfy(graph, prompt):
    try:
        assert clean.prompt_of(json.dumps({**TEXT, **graph})) == prompt
    except clean.NoPrompt as e:
        assert prompt not in (A, B) and prompt in str(e)


def comment(text, order="be", code=b"UNICODE\0"):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = code + text.encode(f"utf-16-{order}" if code == b"UNICODE\0" else "utf8")
    return exif.tobytes()


def described(tag, text):
    exif = Image.Exif()
    exif[tag] = text
    return exif.tobytes()


def xmp(text):
    inner = f'<x xmlns:exif="e"><exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></exif:UserComment></x>'
    (info := PngInfo()).add_itxt("XML:com.adobe.xmp", inner)
    return {"pnginfo": info}


def chunks(**texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return {"pnginfo": info}


@pytest.mark.parametrize("kind, options", [
    ("PNG", chunks(parameters=A + RUN)), ("PNG", chunks(parameters=RUN, prompt=json.dumps({**TEXT, "3": K}))), ("PNG", chunks(prompt=A, seed="1")),
    ("PNG", chunks(invokeai_metadata=json.dumps({"positive_prompt": A}))), ("PNG", chunks(Dream=f'"{A}" -s 50')),
    ("PNG", chunks(**{"sd-metadata": json.dumps({"image": {"prompt": [{"prompt": A}]}})})), ("PNG", chunks(Comment="Created with GIMP", Description=A)),
    ("PNG", chunks(Description=B, Comment=json.dumps({"prompt": A}))), ("PNG", xmp('{&quot;c&quot;:&quot;' + A + '&quot;,&quot;uc&quot;:&quot;&quot;}')),
    *[(kind, {"exif": comment(A + RUN, order)}) for kind in ("JPEG", "WEBP", "AVIF", "PNG") for order in ("be", "le")],
    ("JPEG", {"exif": comment(A + RUN, code=b"ASCII\0\0\0")}), ("JPEG", {"exif": comment(json.dumps({"prompt": A}))}),
    ("WEBP", {"exif": described(0x010e, A)}), ("WEBP", {"exif": described(0x0110, "prompt:" + json.dumps({**TEXT, "3": K}))})])
def test_image_carriers(tmp_path, kind, options):
    Image.new("RGB", (32, 24), "red").save(tmp_path / f"a.{kind}", kind, **options)
    assert clean.read_source(tmp_path)["prompt"].to_list() == [A]


def put(place, files):
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return place


def lines(*records):
    return "\n".join(map(json.dumps, records))


def parquet(**columns):
    pl.DataFrame(columns).write_parquet(f := io.BytesIO())
    return f.getvalue()


PAIR = {"0.png": png("red"), "1.png": png("blue")}
ROWS = [{"image": "0.png", "prompt": A}, {"image": "1.png", "prompt": B}]
CELLS = [{"bytes": v, "path": k} for k, v in PAIR.items()]
B64 = [{"image": {"bytes": base64.b64encode(v).decode(), "path": k}, "text": t} for (k, v), t in zip(PAIR.items(), (A, B))]
NFC, NFD = (unicodedata.normalize(f, "fö") for f in ("NFC", "NFD"))
TABLES = {  # name: files (the first is INPUT), flags
    "x.csv": (f'image,prompt\n0.png,"{A}"\n1.png,{B}\n',), "utf16.csv": (f'image,prompt\n0.png,"{A}"\n1.png,{B}\n'.encode("utf-16"),),
    "semi.csv": (f"image;prompt\n0.png;{A}\n1.png;{B}\n",), "pipe.csv": (f"prompt|image\r\n{A}|0.png\r\n{B}|1.png",),
    "tab.csv": (f"image\tprompt\n0.png\t{A}\n1.png\t{B}\n",), "x.tsv": (f"image\tprompt\n0.png\t{A}\n1.png\t{B}\n",),
    "blank.csv": (f'\n\nimage,prompt\n\n0.png,"{A}"\n\n1.png,{B}\n',), "space.csv": (f'image, prompt\n0.png, "{A}"\n1.png, {B}\n',),
    "long.csv": (f'image,prompt\n0.png,"{A}"\n1.png,{B}\n2.png,one, too many\n', "2 × skipped"),
    "x.json": (json.dumps(ROWS, indent=1),), "dict.json": (json.dumps({"0.png": A, "1.png": {"caption": B}}),),
    "data.json": (json.dumps({"version": 1, "data": ROWS}),), "cols.json": (json.dumps({"image": ["0.png", "1.png"], "prompt": [A, B]}),),
    "pandas.json": (json.dumps({"image": {"0": "0.png", "1": "1.png"}, "prompt": {"0": A, "1": B}}),), "lines.json": (lines(*ROWS),),
    "x.jsonl": ("\ufeff" + lines(*ROWS) + '\n{"image": "9.png", "pro',), "nan.jsonl": (lines({**ROWS[0], "score": float("nan"), "z": [1]},
               {**ROWS[1], "score": "x", "z": {}}) + "\n[1]\nnull\n",), "list.jsonl": (json.dumps(ROWS, indent=1),),
    "utf16.jsonl": (lines(*ROWS).encode("utf-16"),), "caps.jsonl": (lines(*[{**r, "prompt": [r["prompt"], "other"]} for r in ROWS]),),
    "b64.jsonl": (lines(*B64),), "uri.jsonl": (lines(*[{"img": "data:image/png;base64," + r["image"]["bytes"], "text": r["text"]} for r in B64]),),
    "path.jsonl": (lines(*[{"image": {"path": r["image"], "bytes": None}, "prompt": r["prompt"]} for r in ROWS]),),
    "hub.parquet": (parquet(image=CELLS, text=[A, B]),), "bytes.parquet": (parquet(jpg=[*PAIR.values()], txt=[A, B]),),
    "lists.parquet": (parquet(images=[[c, c] for c in CELLS], captions=[[A, "x"], [B]]),),
    "paths.parquet": (parquet(image=[{"bytes": None, "path": p} for p in PAIR], prompt=[A, B]),),
    "odd.parquet": (parquet(image=[*PAIR], prompt=[A, B], width=[[1], [2]], image_nsfw=["x", None], source=[1, 2]),),
    "field.parquet": (parquet(image=[*PAIR], text=[{"en": A, "de": "x"}, {"en": B, "de": "x"}]), "--prompt-col", "text.en"),
    "field.jsonl": (lines(*[{"image": r["image"], "text": {"en": r["prompt"]}} for r in ROWS]), "--prompt-col", "text.en"),
    "named.parquet": (parquet(photo=[*PAIR.values()], image=[*PAIR], prompt=[A, B]), "--image-col", "photo"),
    "info.csv": ('image,prompt\n0.png,"' + A + RUN.replace('"', '""') + f'"\n1.png,{B}\n',)}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    """By itself, in a folder, and for predict.py."""
    content, *flags = TABLES[name]
    put(tmp_path, {**PAIR, name: content})
    cols = dict(zip((f[2:].replace("-", "_") for f in flags[::2]), flags[1::2])) if "--" in str(flags) else {}
    rows = clean.read_source(tmp_path / name, **cols)
    assert rows["prompt"].to_list() == [A, B]
    found = [np.asarray(clean.open_rgb(i))[5, 5].tolist() for i in clean.find_images(rows["image"])]
    assert found == [[255, 0, 0], [0, 0, 255]]
    if not cols:
        assert sorted(clean.read_source(tmp_path).drop_nulls("prompt")["prompt"]) == [A, B], "in a folder"
    assert clean.read_source(tmp_path / name, limit=1, **cols)["prompt"].to_list() == [A]
    ids, _, prompts = predict.list_images([str(tmp_path / name)], cols.get("image_col"), cols.get("prompt_col"))
    assert ids == ["0", "1"] and prompts == [A, B]
    blind = clean.read_source(tmp_path / name, need=("prompt",), **cols)
    assert blind["prompt"].to_list() == [A, B]


def zipped(files, **flags):
    with zipfile.ZipFile(out := io.BytesIO(), "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return out.getvalue()


def tarred(files, compression=""):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=f"w:{compression}") as t:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            t.addfile(member, io.BytesIO(content))
    return out.getvalue()


def encrypted():
    data = bytearray(zipped({**PAIR, "0.txt": A, "1.txt": B, "2.png": png()}))
    at = data.rindex(b"PK\1\2")
    data[at + 8] |= 1
    return bytes(data)


TOLD = png("red", **chunks(parameters=A + RUN))
TAGS = "fox, red fur, 1girl, solo"
PLACES = {  # name: files, link: target, what is said of the rest
    "sidecars": ({**PAIR, "0.txt": A, "1.json": json.dumps({"caption": B, "tags": ["x"]})},),
    "caption": ({**PAIR, "0.caption": A, "0.txt": TAGS, "1.txt": B, "1.caption": ""},),
    "own": ({"0.png": TOLD, "0.txt": TAGS, "1.png": PAIR["1.png"], "1.txt": B},),
    "infotext": ({**PAIR, "0.txt": A + RUN, "1.png.txt": B + RUN},), "cp1252": ({**PAIR, "0.txt": A, "1.txt": B.encode("utf-16")},),
    "hub": ({"README.md": "x", "data/train-0-of-2.parquet": parquet(image=CELLS[:1], text=[A]),
             "data/train-1-of-2.parquet": parquet(image=CELLS[1:], text=[B])}, "1 × .md"),
    "table": ({"im/0.png": PAIR["0.png"], "im/1.png": PAIR["1.png"], "any.csv": f'image,prompt\nim\\0.png,"{A}"\nim/1.png,{B}\n'},),
    "blank cell": ({"0.png": TOLD, "1.png": PAIR["1.png"], "t.csv": f"image,prompt\n0.png,\n1.png,{B}\n"},),
    "no prompt column": ({"0.png": TOLD, "1.png": PAIR["1.png"], "t.csv": "image,score\n0.png,1\n1.png,2\n", "1.txt": B},),
    "other table": ({**PAIR, "0.txt": A, "1.txt": B, "s.csv": "id,score\n1,2\n"}, "s.csv: no column for the image among: id, score"),
    "meta.json": ({**PAIR, "meta.json": json.dumps({"0": {"caption": A}, "1.png": B})},),
    "unicode": ({f"{NFD}.png": PAIR["0.png"], f"{NFC}.txt": A, "1.png": PAIR["1.png"], "1.txt": B},),
    "unicode table": ({f"{NFD}/0.png": PAIR["0.png"], "1.png": PAIR["1.png"], "t.jsonl": lines({"image": f"{NFC}/0.png", "text": A},
                       {"image": "1.png", "text": B})},),
    "suffixes": ({"0.JFIF": PAIR["0.png"], "1.avif": PAIR["1.png"], "0.txt": A, "1.TXT": B, "2.heic": b"x", "3": b"x"}, "1 × .heic"),
    "clutter": ({**PAIR, "0.txt": A, "1.txt": B, "._0.png": b"x", "__MACOSX/1.png": b"x", ".git/2.png": png()}, "1 × hidden folder"),
    "links": ({"a/0.png": PAIR["0.png"], "a/0.txt": A, "b/1.png": PAIR["1.png"], "b/1.txt": B}, "links"),
    "pipe": ({**PAIR, "0.txt": A, "1.txt": B}, "2 × pipe, device or broken link"),
    "x.zip": (zipped({**PAIR, "0.txt": A, "1.txt": B, "__MACOSX/._0.png": b"x"}),),
    "locked.zip": (encrypted(), "1 × encrypted member"), "evil.zip": (zipped({**PAIR, "0.txt": A, "1.txt": B, "../2.png": png()}), "1 × unsafe name"),
    "hub.zip": (zipped({"data/t.parquet": parquet(image=CELLS, text=[A, B])}),),
    "dots.tar": (tarred({"0.in.png": PAIR["0.png"], "0.out.txt": A, "1.x.png": PAIR["1.png"], "1.json": json.dumps({"caption": B})}),),
    "exact.tar": (tarred({"a.png": PAIR["0.png"], "a.txt": A, "a.b.png": PAIR["1.png"], "a.b.txt": B}),),
    "plain.tar": (tarred({"s.0.png": PAIR["0.png"], "s.0.txt": A, "s.1.png": PAIR["1.png"], "s.1.txt": B}),),
    **{f"x.tar.{c}": (tarred({**PAIR, "0.txt": A, "1.txt": B}, c),) for c in ("gz", "bz2", "xz")}}


@pytest.mark.parametrize("name", PLACES)
def test_places(tmp_path, capsys, name):
    content, *told = PLACES[name]
    place = tmp_path / name
    if isinstance(content, bytes):
        place.write_bytes(content)
    else:
        put(place, content)
    if name == "links":
        (tmp_path / name / "b/more").symlink_to(tmp_path / name / "a")
        (tmp_path / name / "a/back").symlink_to(tmp_path / name)
        place, told = tmp_path / name / "b", ["more"] * 0
    if name == "pipe":
        os.mkfifo(place / "2.png")
        (place / "3.png").symlink_to("/dev/zero")
    assert sorted(clean.read_source(place).drop_nulls("prompt")["prompt"]) == [A, B]
    said = capsys.readouterr().err
    assert all(t in said for t in told), said
    ids, paths, prompts = predict.list_images([str(place)])
    assert len(ids) == 2 and sorted(prompts) == [A, B] and all(clean.open_rgb(p).size == (32, 24) for p in paths)
