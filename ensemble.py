"""
Average the predictions of several models, with weights learned where the truth is known if that pays.
Reads preds/*.npz (predict.py) or Kaggle CSVs of anybody's models; writes one npz, its weights as JSON, and a picture.
$ python ensemble.py                                            # every npz in preds/ except an earlier ensemble
$ python ensemble.py test_a.npz other.csv --fit val/*.npz val/other.csv --submission submission.csv
$ python ensemble.py --soup runs/seed0/ft runs/seed1/ft --out runs/soup      # average the weights of runs instead
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from clean import atomic, run
from predict import (Viewer, order_for, predict, read_preds, read_validation, refuse_existing, write_preds,
                     write_submission)
from train import find_checkpoint, load_net, save_net

BLOCK = 4096  # rows at a time: memory is the members and little else
PER_DIM_ROWS = 10_000  # that a weight per model and dimension is learned on; 5th place gained 0.0002 by such weights


# ---------------------------------------------------------------------------------------------------------- the members

def load_members(names, intersect=False):
    """Predictions joined by id, in the order of the first -> dict: ids, x [M unit rows (N, D)], keys, targets, groups.
    Different ids are an error that lists the first few; with `intersect`, the rows that all members have are used."""
    ids, truth, rows, x, keys = None, None, [], [], []
    for name in names:  # one file at a time: the targets that each carries are not held
        m = read_preds(name)
        row = {i: n for n, i in enumerate(m["ids"].tolist())}
        ids = ids or list(row)
        missing, extra = set(ids) - set(row), set(row) - set(ids)
        if (missing or extra) and not intersect:
            sys.exit(f"{name}: ids differ from those of {names[0]}: {len(missing)} missing {sorted(missing)[:3]}, "
                     f"{len(extra)} extra {sorted(extra)[:3]}; "
                     "predict the same images, or go on with those in common: --intersect")
        ids = [i for i in ids if i in row]
        width = m["embeddings"].shape[1]
        if not ids:
            sys.exit(f"{name}: has no id in common with those before it")
        if x and width != x[0].shape[1]:
            sys.exit(f"{name}: embeddings of width {width}, {names[0]} has {x[0].shape[1]}")
        if m["targets"] is not None:
            targets = unit(m["targets"])
            truth = truth or (row, targets, m["groups"])
            if (pick(targets, row, ids) - pick(truth[1], truth[0], ids)).abs().max() > 1e-3:
                sys.exit(f"{name}: its targets differ from those of a member before it; "
                         "they must be of the same pairs and text encoder")
        rows.append(row)
        x.append(unit(m["embeddings"]))
        keys.append(key_of(m))
    for n, row in enumerate(rows):
        x[n] = pick(x[n], row, ids)
    row, targets, groups = truth or (None, None, None)
    return {"ids": ids, "x": x, "keys": keys, "targets": None if targets is None else pick(targets, row, ids),
            "groups": None if groups is None else pick(groups, row, ids)}


def pick(x, row, ids):
    """Rows of x by id, not copied where they are in order already. row {id: number}"""
    order = [row[i] for i in ids]
    return x if order == list(range(len(x))) else x[order]


def unit(x):
    """Rows of an array -> unit rows, float32 tensor, in the array's own memory where it is float32."""
    x = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return x.div_(x.norm(dim=1, keepdim=True).clamp_min(1e-12))


def key_of(preds):
    """What a prediction was made by: its weights (by hash where known: a moved run is the same run) and its views."""
    return preds["checkpoint"] or preds["run"], tuple(preds["views"])


def match(keys, fit_keys, names, fit_names):
    """The --fit file of each member: the same run, and the same views if it has several. -> indices into fit_names"""
    found = []
    for key, name in zip(keys, names):
        same = [i for i, k in enumerate(fit_keys) if k[0] == key[0]]
        same = [i for i in same if fit_keys[i][1] == key[1]] or same
        if len(same) != 1:
            sys.exit(f"--fit: {len(same)} files with predictions of the run behind {name} "
                     f"({key[0]}; views: {', '.join(key[1]) or 'unknown'}) among {', '.join(fit_names)}; "
                     "make exactly one with: python predict.py --run RUN")
        found += same
    return found


# ---------------------------------------------------------------------------------------------------------- the weights

class WeightedAverage(nn.Module):
    """One weight per model (or per model and dimension), started at 1. [M of unit rows (N, D)] -> unit rows (N, D)."""

    def __init__(self, models, dims=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(models, dims))

    def forward(self, x):
        return F.normalize(sum(w * m for w, m in zip(self.weight, x)), dim=-1)


def gram(x, y):
    """All that the cosine of a weighted average depends on, since cos = w.a / sqrt(w' G w): a (N, M) cosines of the
    members, g (N, M * M) their inner products. A fit then costs N M^2 a step, not N M D, and reads no embedding."""
    a, g = [], []
    for rows in torch.arange(len(y)).split(BLOCK):
        m = torch.stack([v[rows] for v in x], 1)  # (B, M, D)
        a.append((m @ y[rows][:, :, None])[:, :, 0])
        g.append((m @ m.transpose(1, 2)).flatten(1))
    return torch.cat(a), torch.cat(g)


def cosines(w, a, g):
    """Cosine of every row under weights w (M,) -> (N,)"""
    return (a @ w) / (g @ torch.outer(w, w).flatten()).clamp_min(1e-12).sqrt()


def minimise(loss, parameters, steps=100):
    """Full-batch L-BFGS: deterministic, no learning rate. `loss()` does its own backward and returns a float tensor."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        return loss()

    optimizer.step(closure)


def fit(a, g, kind="nonneg", start=None):
    """Weights (M,) that maximise the mean cosine, absolute values summing to 1. nonneg: as squares; free: any sign."""
    v = torch.ones(a.shape[1]) if start is None else start.clone()
    v.requires_grad_()
    weights = lambda: v.square() if kind == "nonneg" else v  # noqa: E731

    def loss():
        value = -cosines(weights(), a, g).mean()
        value.backward()
        return value.detach()

    minimise(loss, [v])
    w = weights().detach()
    return w / w.abs().sum()


def fit_per_dim(x, y, start, kind="nonneg", steps=30):
    """Weights (M, D), from `start` (M,): this needs the rows themselves, in blocks, at most PER_DIM_ROWS of them."""
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:PER_DIM_ROWS].sort().values
    net = WeightedAverage(len(x), y.shape[1])
    net.weight.data = start[:, None].repeat(1, y.shape[1]) * len(x)

    def loss():
        total = 0
        for r in rows.split(BLOCK):
            value = -(net([m[r] for m in x]) * y[r]).sum() / len(rows)
            value.backward()
            total = total + value.detach()
        return total

    minimise(loss, [net.weight], steps)
    w = net.weight.detach().clamp_min(0) if kind == "nonneg" else net.weight.detach()
    return w / w.abs().sum(0).clamp_min(1e-12)


def average(x, w):
    """[M of unit rows (N, D)], weights (M,) or (M, D) -> unit rows (N, D)."""
    net = WeightedAverage(len(x))
    net.weight.data = w.reshape(len(x), -1)
    with torch.no_grad():
        return torch.cat([net([m[r] for m in x]) for r in torch.arange(len(x[0])).split(BLOCK)])


def folds_of(groups, folds, seed=0):
    """-> fold (N,) of every row. Near-identical prompts share a group, so they share a fold."""
    names, index = np.unique(groups, return_inverse=True)
    return torch.from_numpy(np.random.default_rng(seed).permutation(len(names))[index] % min(folds, len(names)))


def cross_validate(fold, learn, apply):
    """Cosine of every row under weights that were learned without its fold -> (N,)"""
    out = torch.zeros(len(fold))
    for k in fold.unique():
        inside = (fold == k).nonzero()[:, 0]
        out[inside] = apply(learn((fold != k).nonzero()[:, 0]), inside)
    return out


def without_each(a, g, score):
    """score(kept, their a, their g) with each member left out in turn -> [M floats]"""
    rows, models = a.shape
    quick, scores = rows * models < 100_000, []
    for m in tqdm(range(models), desc="leave one out", unit="member", leave=False, disable=quick or None):
        kept = [i for i in range(models) if i != m]
        pairs = g.reshape(rows, models, models)[:, kept][:, :, kept]
        scores.append(float(score(kept, a[:, kept], pairs.flatten(1))))
    return scores


def error_correlation(a, g):
    """Correlation of the members' errors x - y over rows and dimensions -> (M, M). An ensemble lives from low ones."""
    e = (g.reshape(len(a), a.shape[1], -1) - a[:, :, None] - a[:, None] + 1).mean(0)
    size = e.diag().clamp_min(1e-12).sqrt()
    return e / size.outer(size)


def mean_and_error(c):
    """-> [mean, its standard error]"""
    return [float(c.mean()), float(c.std(correction=int(len(c) > 1)) / len(c) ** .5)]


def describe(c):
    return "{:.4f} ± {:.4f}".format(*mean_and_error(c))


def draw(path, report):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    members = report["members"]
    labels = [m["name"] for m in members]
    fig, axes = plt.subplots(1, 2 if "uniform" in report else 1, figsize=(10, 0.4 * len(members) + 1.8), squeeze=False)
    axes[0, 0].barh(labels, [m["weight"] for m in members], color="#4878a8")
    axes[0, 0].set_xlabel(f"weight ({report['used']})")
    if "uniform" in report:
        bars = [(m["name"], m["cosine"], m["se"], "#9ab4cf") for m in members]
        bars.append(("uniform", *report["uniform"], "#777777"))
        if "learned" in report:
            bars.append(("learned, cross-validated", *report["learned"], "#c8692c"))
        names, means, errors, colours = zip(*bars)
        axes[0, 1].barh(names, means, xerr=errors, color=colours)
        axes[0, 1].set_xlim(max(0, min(means) - 0.05), max(means) + 0.02)
        axes[0, 1].set_xlabel(f"mean cosine ± standard error (n = {report['n']:,})")
    for ax in axes[0]:
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    with atomic(path) as f:
        fig.savefig(f, format="png", dpi=110)
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------------- the soup

def make_soup(runs, out, batch_size, workers):
    """Greedy model soup (arXiv 2203.05482): from the best run to the worst, each joins the average of the weights if
    validation gets better by it. Written as a run, OUT/ft, that predict.py uses like any other."""
    checkpoints = [find_checkpoint(r) for r in runs]
    nets, metas = zip(*map(load_net, checkpoints))
    meta = metas[0]
    for path, other in zip(checkpoints, metas):
        for key in ("tower", "head", "text_model", "data_hashes"):
            if other[key] != meta[key]:
                sys.exit(f"{path}: another {key} than {checkpoints[0]}; "
                         "a soup averages runs of one tower on one data set")
    _, paths, targets, unchanged = read_validation(meta)
    if not unchanged:
        sys.exit(f"{meta['data']}: has changed since these runs were trained on it; "
                 "a soup is chosen on their validation rows")
    viewer = Viewer(checkpoints[0], ["image"], device="cuda" if torch.cuda.is_available() else "cpu")
    net = next(iter(viewer.nets.values()))
    states = [n.state_dict() for n in nets]

    def mix(some):
        return {k: torch.stack([states[i][k].float() for i in some]).mean(0).to(v.dtype) for k, v in states[0].items()}

    def validate(state):
        net.load_state_dict(state)
        batches = predict(viewer, paths, batch_size, workers)
        return float(np.mean(np.concatenate([(y * targets[row:row + len(y)]).sum(1) for row, y, _ in batches])))

    alone = [validate(s) for s in states]
    order = np.argsort([-s for s in alone], kind="stable")
    chosen, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        score = validate(mix([*chosen, i]))
        verdict = "joins" if score > best else "stays out"
        print(f"{alone[i]:.4f} alone, {score:.4f} with those above ({verdict})  {checkpoints[i].parent}")
        if score > best:
            chosen, best = [*chosen, i], score
    everybody = validate(mix(range(len(runs))))
    print(f"best alone {alone[order[0]]:.4f} {checkpoints[order[0]].parent} · "
          f"average of all {len(runs)} {everybody:.4f} · greedy soup of {len(chosen)} {best:.4f} (n = {len(paths)})")
    nets[0].load_state_dict(mix(chosen))
    meta = {**meta, "phase": "ft", "val_cosine": best, "soup": [str(checkpoints[i].parent) for i in chosen]}
    save_net(nets[0], meta, out / "ft/best.safetensors")
    with atomic(out / "ft/metrics.jsonl", "w") as f:
        f.write(json.dumps({"step": 0, "val_cosine": best, "done": True}) + "\n")
    print(f"wrote {out}/ft; predict with: python predict.py --run {out}")


# ----------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Learned weighted average of several models' predictions.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("preds", nargs="*", metavar="PREDS", help="members: npz of predict.py or Kaggle CSVs; "
                   "none = every npz in preds/ except an earlier ensemble")
    p.add_argument("--fit", nargs="+", metavar="VAL", help="predictions of the same runs where targets are known, "
                   "to learn the weights on; unset = the members themselves")
    p.add_argument("--intersect", action="store_true", help="where ids differ, go on with those that all members have")
    p.add_argument("--soup", nargs="+", metavar="RUN", help="average the weights of these runs of one tower instead, "
                   "greedily by validation, into the run --out")
    g = p.add_argument_group("weights")
    g.add_argument("--weights", default="nonneg", help="nonneg or free: learned, used if they beat uniform in "
                   "cross-validation; uniform; or fixed: A,B,...")
    g.add_argument("--per-dim", action="store_true", help="learn a weight per model and dimension")
    g.add_argument("--folds", type=int, default=5, help="of the cross-validation")
    g.add_argument("--seed", type=int, default=0, help="of the folds")
    g = p.add_argument_group("output")
    g.add_argument("--out", help="file to write, with .json (weights) and .png beside it; "
                   "unset = preds/ensemble.npz, or runs/soup")
    g.add_argument("--submission", help="Kaggle CSV to write")
    g.add_argument("--sample-submission", help="its ids, in its order; unset = sorted ids")
    g.add_argument("--overwrite", action="store_true", help="replace these files")
    g = p.add_argument_group("soup")
    g.add_argument("--batch-size", type=int, default=64, help="images at a time")
    g.add_argument("--workers", type=int, default=2, help="processes that decode images")
    return p.parse_args(argv)


def parse_weights(text, models):
    """"nonneg", "free", "uniform" -> None; "A,B,..." -> tensor (M,)"""
    if text in ("nonneg", "free", "uniform"):
        return None
    try:
        w = torch.tensor([float(v) for v in text.split(",")])
    except ValueError:
        sys.exit(f"--weights {text}: must be nonneg, free, uniform, or numbers like 2,1,1")
    if len(w) != models:
        sys.exit(f"--weights {text}: {len(w)} numbers for {models} members")
    if not w.isfinite().all() or not w.abs().sum() > 0:
        sys.exit(f"--weights {text}: the numbers must be finite and not all 0")
    return w / w.abs().sum()


def main():
    args = parse_args()
    out = Path(args.out or ("runs/soup" if args.soup else "preds/ensemble.npz"))
    beside = [out.with_suffix(".json"), out.with_suffix(".png")]
    refuse_existing([out / "ft/best.safetensors"] if args.soup else [out, *beside, args.submission], args.overwrite)
    if args.folds < 2:
        sys.exit(f"--folds {args.folds}: must be at least 2")
    if args.per_dim and args.weights not in ("nonneg", "free"):
        sys.exit(f"--per-dim --weights {args.weights}: is for learned weights, nonneg or free")
    if args.soup:
        return make_soup(args.soup, out, args.batch_size, args.workers)

    # the members, and the predictions to learn from: those of --fit, or the members' own
    names = args.preds or sorted(str(p) for p in Path("preds").glob("*.npz") if read_preds(p)["run"] != "ensemble")
    if not names:
        sys.exit("preds/: no predictions there; make some with: python predict.py")
    fixed = parse_weights(args.weights, len(names))
    test = val = load_members(names, args.intersect)
    order = order_for(args.sample_submission, test["ids"]) if args.submission or args.sample_submission else None
    if args.fit:
        found = match(test["keys"], [key_of(read_preds(n)) for n in args.fit], names, args.fit)
        val = load_members([args.fit[i] for i in found], args.intersect)
        if val["targets"] is None:
            sys.exit(f"--fit {' '.join(args.fit)}: no targets there; "
                     "predict a validation split: python predict.py --run RUN")
    x, y, models = val["x"], val["targets"], len(names)
    members = [{"name": Path(name).stem, "file": name, "run": key[0], "views": list(key[1])}
               for name, key in zip(names, test["keys"])]
    report = {"members": members}
    uniform = torch.full((models,), 1 / models)
    weights, used = (uniform, "uniform") if fixed is None else (fixed, "fixed")
    kind = args.weights + (" per dimension" if args.per_dim else "")
    pays = False  # to learn weights

    if y is None:
        print(f"no targets known: {used} weights (learn them with --fit VAL.npz ...)")
    else:
        # every member, the plain average, and what learning is worth on rows it has not seen
        a, g = gram(x, y)
        groups = np.arange(len(y)) if val["groups"] is None else val["groups"]
        fold = folds_of(groups, args.folds, args.seed)
        width = max(len("plain average"), *(len(m["name"]) for m in members))
        for member, c in zip(members, a.unbind(1)):
            member["cosine"], member["se"] = mean_and_error(c)
            print(f"{member['name']:<{width}}  {describe(c)}")
        plain = cosines(uniform, a, g)
        print(f"{'plain average':<{width}}  {describe(plain)}")
        report |= {"n": len(y), "uniform": mean_and_error(plain)}
        if fixed is not None:
            print(f"{'fixed weights':<{width}}  {describe(cosines(fixed, a, g))}  (n = {len(y):,})")
        elif args.weights != "uniform" and models > 1 and len(fold.unique()) > 1:
            def learn(rows):
                w = fit(a[rows], g[rows], args.weights)
                return fit_per_dim([m[rows] for m in x], y[rows], w, args.weights) if args.per_dim else w

            def apply(w, rows):
                if args.per_dim:
                    return (average([m[rows] for m in x], w) * y[rows]).sum(-1)
                return cosines(w, a[rows], g[rows])

            learned = cross_validate(fold, learn, apply)
            report["learned"] = mean_and_error(learned)
            gain, error = mean_and_error(learned - plain)
            pays = gain > 0
            print(f"{'learned weights':<{width}}  {describe(learned)}  ({kind}; {len(fold.unique())} folds by group, "
                  f"n = {len(y):,}; over plain {gain:+.5f} ± {error:.5f})")
            if pays:
                weights, used = learn(slice(None)), kind
            print(f"used: {used} weights, because the learned ones {'beat' if pays else 'do not beat'} "
                  "the plain average in cross-validation")

    if y is not None and models > 1:
        # what each is worth to the others: the score of one weight per model, with it and without
        def rest(kept, a, g):
            if pays:
                return cross_validate(fold, lambda rows: fit(a[rows], g[rows], args.weights),
                                      lambda w, rows: cosines(w, a[rows], g[rows])).mean()
            w = fixed[kept] if fixed is not None and fixed[kept].any() else torch.ones(len(kept))
            return cosines(w, a, g).mean()

        score = float(rest(list(range(models)), a, g))
        print("\nmember: weight · what the average loses without it · correlation of its errors with the others'")
        for member, w, without, errors in zip(members, weights, without_each(a, g, rest), error_correlation(a, g)):
            member |= {"leave_one_out": score - without, "error_correlation": errors.tolist()}
            print(f"{member['name']:<{width}}  {w.mean():.3f} · {score - without:+.5f} · "
                  + " ".join(f"{c:.2f}" for c in errors))

    # apply, and write
    embeddings = average(test["x"], weights).numpy()
    for member, w in zip(members, weights):
        member["weight"] = w.mean().item()
        if w.ndim:
            member["weight_per_dim"] = w.tolist()
    report["used"] = used
    if args.submission:
        write_submission(args.submission, test["ids"], embeddings, order)
        print(f"wrote {args.submission} ({len(test['ids']):,} images)")
    with atomic(out.with_suffix(".json"), "w") as f:
        json.dump(report, f, indent=1)
    draw(out.with_suffix(".png"), report)
    targets = None if test["targets"] is None else test["targets"].numpy()
    write_preds(out, ids=np.array(test["ids"]), embeddings=embeddings, targets=targets, groups=test["groups"],
                run="ensemble", views=np.array(names))
    print(f"wrote {out} ({len(test['ids']):,} images, {used} weights), " + ", ".join(p.name for p in beside))


if __name__ == "__main__":
    run(main)
