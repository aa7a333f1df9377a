"""
Average the predictions of several models, with weights learned where the truth is known if that pays.
Reads preds/*.npz (predict.py) or Kaggle CSVs of anybody's models; writes one npz, its weights as JSON, and a chart.

$ python ensemble.py                                            # every npz in preds/ except an earlier ensemble
$ python ensemble.py test_a.npz other.csv --fit val/*.npz val/other.csv --submission submission.csv
$ python ensemble.py --soup runs/a/ft runs/b/ft --out runs/soup    # average the weights of runs instead (also WiSE-FT:
                                                                   # --soup runs/a/lp runs/a/ft)
The cosine of a weighted average is w.a / sqrt(w' G w), with a the members' cosines and G their inner products, so
learning never touches the embeddings.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from clean import atomic, make_parser
from predict import (TTAModel, describe, order_for, predict, read_preds, read_validation, refuse_existing, write_preds,
                     write_submission)
from train import find_checkpoint, load_model, pick_device, save_model

BLOCK = 4096   # rows at a time: memory is the members and little else
FOLDS = 5      # of the cross-validation, by group
MIN_ROWS = 100  # fewer rows of known truth are too few to learn weights on


# -------------------------------------------------------------------------------------------------------- the members

def load_members(names):
    """Predictions joined by id, in the order of the first -> dict: ids, x [M unit rows (N, D)], keys (what each was made
    by), targets or None, groups or None. Exits in one line where ids, widths or targets differ."""
    ids, truth, groups, x, keys = None, None, None, [], []
    for name in names:  # one file at a time: the targets that each carries are not held
        m = read_preds(name)
        row = {i: n for n, i in enumerate(m["ids"].tolist())}
        ids = ids or list(row)
        missing, extra = set(ids) - set(row), set(row) - set(ids)
        if missing or extra:
            sys.exit(f"{name}: ids differ from those of {names[0]}: {len(missing)} missing {sorted(missing)[:3]}, "
                     f"{len(extra)} extra {sorted(extra)[:3]}; predict the same images")
        order = [row[i] for i in ids]
        x.append(unit(m["embeddings"], order))
        if x[-1].shape != x[0].shape:
            sys.exit(f"{name}: embeddings of width {x[-1].shape[1]}, {names[0]} has {x[0].shape[1]}")
        if m["targets"] is not None:
            targets = unit(m["targets"], order)
            if truth is not None and (targets - truth).abs().max() > 1e-3:
                sys.exit(f"{name}: its targets differ from those of a member before it; "
                         "they must be of the same pairs and text encoder")
            truth = targets if truth is None else truth
            groups = m["groups"][order] if groups is None and m["groups"] is not None else groups
        keys.append((m["checkpoint"] or m["run"], tuple(m["views"])))
    return {"ids": ids, "x": x, "keys": keys, "targets": truth, "groups": groups}


def unit(x, order):
    """Rows of an array, in `order` -> unit rows, float32 tensor; in the array's own memory where it can be."""
    x = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    x = x if order == list(range(len(x))) else x[order]
    return x.div_(x.norm(dim=1, keepdim=True).clamp_min(1e-12))


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


# -------------------------------------------------------------------------------------------------------- the weights

def gram(x, y):
    """[M of unit rows (N, D)], targets (N, D) -> a (N, M) cosines of the members, g (N, M * M) their inner products."""
    a, g = [], []
    for rows in torch.arange(len(y)).split(BLOCK):
        m = torch.stack([v[rows] for v in x], 1)  # (B, M, D)
        a.append((m @ y[rows][:, :, None])[:, :, 0])
        g.append((m @ m.transpose(1, 2)).flatten(1))
    return torch.cat(a), torch.cat(g)


def cosines(w, a, g):
    """Cosine of every row under weights w (M,) -> (N,)"""
    return (a @ w) / (g @ torch.outer(w, w).flatten()).clamp_min(1e-12).sqrt()


def fit(a, g, steps=100):
    """Weights (M,) >= 0 that sum to 1 and maximise the mean cosine, as squares by L-BFGS: no learning rate to choose."""
    v = torch.ones(a.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -cosines(v.square(), a, g).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    w = v.detach().square()
    return w / w.sum()


def average(x, w):
    """[M of unit rows (N, D)], weights (M,) -> unit rows (N, D)"""
    blocks = torch.arange(len(x[0])).split(BLOCK)
    return torch.cat([torch.nn.functional.normalize(sum(a * m[rows] for a, m in zip(w, x)), dim=-1) for rows in blocks])


def folds_of(groups, seed=0):
    """-> fold (N,) of every row. Near-identical prompts share a group, so they share a fold."""
    names, index = np.unique(groups, return_inverse=True)
    return torch.from_numpy(np.random.default_rng(seed).permutation(len(names))[index] % min(FOLDS, len(names)))


def cross_validate(fold, a, g):
    """Cosine of every row under weights that were learned without its fold -> (N,)"""
    out = torch.zeros(len(fold))
    for k in fold.unique():
        out[fold == k] = cosines(fit(a[fold != k], g[fold != k]), a[fold == k], g[fold == k])
    return out


def parse_weights(text, models):
    """"learned", "uniform" -> None; "A,B,..." -> tensor (M,) whose absolute values sum to 1"""
    if text in ("learned", "uniform"):
        return None
    try:
        w = torch.tensor([float(v) for v in text.split(",")])
    except ValueError:
        sys.exit(f"--weights {text}: must be learned, uniform, or numbers like 2,1,1")
    if len(w) != models or not w.isfinite().all() or not w.abs().sum() > 0:
        sys.exit(f"--weights {text}: {len(w)} numbers for {models} members; they must be as many, finite and not all 0")
    return w / w.abs().sum()


def choose_weights(report, val, text):
    """What each member, the plain average and learned weights are worth on rows of known truth, and what is lost without
    each member, printed and put into `report`. -> weights (M,), what they are: learned ones only where, cross-validated,
    they win by two standard errors over at least MIN_ROWS rows."""
    models, members = len(val["x"]), report["members"]
    fixed = parse_weights(text, models)
    weights, used = (torch.full((models,), 1 / models), "uniform") if fixed is None else (fixed, "fixed")
    if val["targets"] is None:
        print(f"no targets known: {used} weights (learn them with --fit VAL.npz ...)")
        return weights, used
    a, g = gram(val["x"], val["targets"])
    plain, n = cosines(weights, a, g), len(a)
    for member, c in zip(members, a.unbind(1)):
        member["cosine"], member["se"] = mean_and_error(c)
        print(f"{member['name']}  {describe(c.numpy())}")
    report |= {"n": n, used: mean_and_error(plain)}
    print(f"{'plain average' if fixed is None else 'fixed weights'}  {describe(plain.numpy())}  (n = {n:,})")
    fold = folds_of(np.arange(n) if val["groups"] is None else val["groups"])
    if text == "learned" and models > 1 and len(fold.unique()) > 1:
        learned = cross_validate(fold, a, g)
        report |= {"learned": mean_and_error(learned), "gain": mean_and_error(learned - plain)}
        gain, error = report["gain"]
        pays = n >= MIN_ROWS and gain > 2 * error
        print(f"learned weights  {describe(learned.numpy())}  ({len(fold.unique())} folds by group; "
              f"over plain {gain:+.5f} ± {error:.5f})")
        print(f"used: {'learned' if pays else used} weights, because the learned ones {'beat' if pays else 'do not beat'} "
              f"the plain average by two standard errors over at least {MIN_ROWS} rows")
        weights, used = (fit(a, g), "learned") if pays else (weights, used)
    for m, member in enumerate(members) if models > 1 else ():
        kept = [i for i in range(models) if i != m]
        rest = a[:, kept], g.reshape(n, models, models)[:, kept][:, :, kept].flatten(1)
        w = fit(*rest) if used == "learned" else weights[kept] if weights[kept].any() else torch.ones(models - 1)
        member["leave_one_out"] = float(cosines(weights, a, g).mean() - cosines(w, *rest).mean())
        print(f"{member['name']}: weight {weights[m]:.3f}, the average loses {member['leave_one_out']:+.5f} without it")
    return weights, used


def mean_and_error(c):
    """-> [mean, its standard error]"""
    return [float(c.mean()), float(c.std(correction=int(len(c) > 1)) / len(c) ** .5)]


def draw(path, report):
    from matplotlib.figure import Figure  # without pyplot, which wants a display
    members, fig = report["members"], Figure(figsize=(10, 0.4 * len(report["members"]) + 1.8), layout="tight")
    axes = fig.subplots(1, 2 if "n" in report else 1, squeeze=False)[0]
    axes[0].barh([m["name"] for m in members], [m["weight"] for m in members], color="#4878a8")
    axes[0].set_xlabel(f"weight ({report['used']})")
    if "n" in report:
        bars = {m["name"]: (m["cosine"], m["se"]) for m in members}
        bars |= {k: report[k] for k in ("uniform", "fixed", "learned") if k in report}
        means, errors = zip(*bars.values())
        axes[1].barh(list(bars), means, xerr=errors, color=["#9ab4cf"] * len(members) + ["#777777", "#c8692c"])
        axes[1].set(xlim=(max(0, min(means) - 0.05), max(means) + 0.02),
                    xlabel=f"mean cosine ± standard error (n = {report['n']:,}; learned: cross-validated)")
    for ax in axes:
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    with atomic(path) as f:
        fig.savefig(f, format="png", dpi=110)


# ----------------------------------------------------------------------------------------------------------- the soup

def make_soup(runs, out):
    """Greedy model soup (arXiv 2203.05482): from the best run to the worst, each joins the average of the weights if
    validation gets better by it. Written as a run, OUT/ft, that predict.py uses like any other."""
    checkpoints = [find_checkpoint(r) for r in runs]
    models, metas = zip(*map(load_model, checkpoints))
    for path, other in zip(checkpoints, metas):
        for key in ("backbone", "head", "dim", "text_model", "data_hashes"):
            if other[key] != metas[0][key]:
                sys.exit(f"{path}: another {key} than {checkpoints[0]}; a soup averages runs of one backbone on one data set")
    _, paths, targets, unchanged = read_validation(metas[0])
    if not unchanged:
        sys.exit(f"{metas[0]['data']}: has changed since these runs were trained on it; "
                 "a soup is chosen on their validation rows")
    scorer, states = TTAModel(checkpoints[0], "auto", pick_device()), [m.state_dict() for m in models]

    def mix(some):
        return {k: torch.stack([states[i][k].float() for i in some]).mean(0).to(v.dtype) for k, v in states[0].items()}

    def validate(state):
        scorer.model.load_state_dict(state)
        y, _ = predict(scorer, paths, ["image"], SimpleNamespace(batch_size=64, workers=2))
        return float((y * targets).sum(1).mean())

    alone = [validate(s) for s in states]
    order = np.argsort([-s for s in alone], kind="stable").tolist()
    chosen, best = order[:1], alone[order[0]]
    for i in order[1:]:
        score = validate(mix([*chosen, i]))
        print(f"{alone[i]:.4f} alone, {score:.4f} with those above ({'joins' if score > best else 'stays out'})  {runs[i]}")
        if score > best:
            chosen, best = [*chosen, i], score
    print(f"best alone {alone[order[0]]:.4f} {runs[order[0]]} · average of all {len(runs)} {validate(mix(order)):.4f} · "
          f"greedy soup of {len(chosen)} {best:.4f} (n = {len(paths)})")
    models[0].load_state_dict(mix(chosen))
    save_model(models[0], {**metas[0], "phase": "ft", "val_cosine": best, "soup": [runs[i] for i in chosen]},
               out / "ft/best.safetensors")
    with atomic(out / "ft/metrics.jsonl", "w") as f:
        f.write(json.dumps({"step": 0, "val_cosine": best, "done": True}) + "\n")
    print(f"wrote {out}/ft; predict with: python predict.py --run {out}")


# --------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    p = make_parser(__doc__)
    p.add_argument("preds", nargs="*", metavar="PREDS", help="members: npz of predict.py or Kaggle CSVs; "
                   "none = every npz in preds/ except an earlier ensemble")
    p.add_argument("--fit", nargs="+", metavar="VAL", help="predictions of the same runs where targets are known, "
                   "to learn the weights on; unset = the members themselves")
    p.add_argument("--weights", default="learned", help="learned, used if they beat the plain average in "
                   "cross-validation by two standard errors; uniform; or fixed: A,B,...")
    p.add_argument("--soup", nargs="+", metavar="RUN", help="average the weights of these runs of one backbone instead, "
                   "greedily by validation, into the run --out")
    p.add_argument("--out", help="file to write, with .json (weights) and .png beside it; "
                   "unset = preds/ensemble.npz, or runs/soup")
    p.add_argument("--submission", help="Kaggle CSV to write")
    p.add_argument("--sample-submission", help="its ids, in its order; unset = sorted ids")
    p.add_argument("--overwrite", action="store_true", help="replace these files")
    return p.parse_args(argv)


def main():
    args = parse_args()
    out = Path(args.out or ("runs/soup" if args.soup else "preds/ensemble.npz"))
    files = [out / "ft/best.safetensors"] if args.soup else [out, out.with_suffix(".json"), out.with_suffix(".png"),
                                                             args.submission]
    refuse_existing(files, args.overwrite)
    if args.soup:
        return make_soup(args.soup, out)

    # the members, and the predictions to learn from: those of --fit, or the members' own
    names = args.preds or sorted(str(p) for p in Path("preds").glob("*.npz") if read_preds(p)["run"] != "ensemble")
    if not names:
        sys.exit("preds/: no predictions there; make some with: python predict.py")
    parse_weights(args.weights, len(names))
    test = val = load_members(names)
    order = order_for(args.sample_submission, test["ids"]) if args.submission or args.sample_submission else None
    if args.fit:
        keys = [(m["checkpoint"] or m["run"], tuple(m["views"])) for m in map(read_preds, args.fit)]
        val = load_members([args.fit[i] for i in match(test["keys"], keys, names, args.fit)])
        if val["targets"] is None:
            sys.exit(f"--fit {' '.join(args.fit)}: no targets there; "
                     "predict a validation split: python predict.py --run RUN")
    report = {"members": [{"name": Path(name).stem, "file": name, "run": run, "views": list(views)}
                          for name, (run, views) in zip(names, test["keys"])]}
    weights, report["used"] = choose_weights(report, val, args.weights)

    # apply, and write
    embeddings = average(test["x"], weights).numpy()
    for member, w in zip(report["members"], weights.tolist()):
        member["weight"] = w
    if args.submission:
        write_submission(args.submission, test["ids"], embeddings, order)
    with atomic(out.with_suffix(".json"), "w") as f:
        json.dump(report, f, indent=1)
    draw(out.with_suffix(".png"), report)
    targets = None if test["targets"] is None else test["targets"].numpy()
    write_preds(out, ids=np.array(test["ids"]), embeddings=embeddings, targets=targets, groups=test["groups"],
                run="ensemble", views=np.array(names))
    print(f"wrote {out} ({len(test['ids']):,} images, {report['used']} weights), {out.stem}.json, {out.stem}.png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; nothing was written")
