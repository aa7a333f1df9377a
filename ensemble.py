"""
Average the predictions of several models, with weights learned where the truth is known if that pays.
Reads preds/*.npz (predict.py) or Kaggle CSVs of anybody's models; writes one npz, its weights as JSON, and a chart.

$ python ensemble.py                                               # every npz in preds/ except an earlier ensemble
$ python ensemble.py test_a.npz other.csv --fit val/*.npz val/other.csv --submission submission.csv
$ python ensemble.py --soup runs/a/ft runs/b/ft --out runs/soup    # average weights of runs (lp and ft: WiSE-FT)
"""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from clean import FEW_ROWS, chart_label, check_rows, make_parser, print_next, require, run, sweep, warn_few
from predict import (OF_ROWS, TTAModel, claim, describe, find_rows, mean_and_error, measures, order_for, predict,
                     read_preds, read_validation, write_all, write_preds, write_submission)
from train import MEASURES, find_checkpoint, load_model, measures_of, pick_device, save_model

BLOCK = 4096  # rows at a time: memory is the members and little else
FEW_GROUPS = 10  # of prompts: fewer tell no standard error
FOLDS = 5  # of the cross-validation, by group
SOUP = "best.safetensors", "metrics.jsonl"


def key_of(preds):
    return preds["checkpoint"] or preds["run"], tuple(preds["views"])


def group_files(folder):
    """The npz files of a folder, grouped by their ids -> files to average, files to fit on or None. Targets of the
    largest group (validation first) serve the largest other one (without targets first). Names what is left out."""
    groups, keys, rated = {}, {}, set()
    for name in sorted(str(p) for p in Path(folder).glob("*.npz")):
        try:
            m = read_preds(name)
        except SystemExit as e:  # somebody's other file
            print(f"left out: {e}")
            continue
        if m["run"] != "ensemble":
            keys[name] = key_of(m)
            key = m["targets"] is not None, m["embeddings"].shape[1], frozenset(m["ids"].tolist())
            groups.setdefault(key, []).append(name)
            rated |= {key} if m["weight"] is not None else set()  # of a validation split
    if not groups:
        sys.exit(f"{folder}/: no predictions there; make some with: python predict.py")
    ranked = sorted(((k[0] + (k in rated), len(names), names) for k, names in groups.items()), key=lambda g: g[:2])
    known, _, names = ranked.pop()
    other, _, others = min(ranked, key=lambda g: (g[0], -g[1]), default=(1, 0, ()))
    served = [name for name in others if partner(keys[name], [keys[n] for n in names]) is not None]
    fit = list({keys[n]: n for n in names}.values()) if known and served else None  # of equal ones, one
    if known and (served or not other):  # images without targets are those to predict, even if nothing serves them
        names = served or others
    what = "averaging" if len(names) > 1 else "nothing to average with"
    print(f"{what} {', '.join(names)}" + (f"; weights from {', '.join(fit)}" if fit else ""))
    if left := sorted(keys.keys() - {*names, *(fit or ())}):
        print(f"left out, because of other images or no targets for its run: {', '.join(left)}")
    return names, fit


def load_members(names):
    """Predictions joined by id -> dict: ids, x [M unit (N, D)], runs, keys [(checkpoint or run, views)], names,
    targets, and OF_ROWS (N,), of which trained says whose prompts any member was trained on"""
    ids, truth, about, x, runs, keys = None, None, {"trained": False}, [], [], []
    for name in names:  # one file at a time: the targets that each carries are not held
        m = read_preds(name)
        ids = ids or m["ids"].tolist()
        order = find_rows(ids, m["ids"].tolist(), name)
        x.append(torch.from_numpy(m["embeddings"][order]))
        if x[-1].shape != x[0].shape:
            sys.exit(f"{name}: embeddings of width {x[-1].shape[1]}, {names[0]} of {x[0].shape[1]}")
        if m["targets"] is not None:
            targets = torch.from_numpy(m["targets"][order])
            truth = targets if truth is None else truth
            if (targets - truth).abs().max() > 1e-3:
                sys.exit(f"{name}: targets differ from those of a member before it")
            about = {k: m[k][order] for k in OF_ROWS if m[k] is not None} | about
            about["trained"] = about["trained"] | (False if m["trained"] is None else m["trained"][order])
        runs.append(m["run"])
        keys.append(key_of(m))
    about = {**dict.fromkeys(OF_ROWS), **about}
    return {"ids": ids, "x": x, "runs": runs, "keys": keys, "names": names, "targets": truth, **about}


def partner(key, fit_keys):
    """Index of the --fit file of a member: of the same run, and of the same views if there, else of about as many; or
    None"""
    run = [i for i, k in enumerate(fit_keys) if k[0] == key[0]]
    return min(run, key=lambda i: (fit_keys[i] != key, abs(len(fit_keys[i][1]) - len(key[1]))), default=None)


def match(keys, fit_keys, names, fit_names):
    """The one --fit file of each member -> indices into fit_names"""
    found = []
    for key, name in zip(keys, names):
        i = partner(key, fit_keys)
        same = 0 if i is None else fit_keys.count(fit_keys[i])
        if same != 1:
            sys.exit(f"--fit: {same} files are of the run of {name} ({key[0]}), not one: {', '.join(fit_names)}")
        found.append(i)
    return found


def gram(x, y):
    """[M of unit rows (N, D)], targets (N, D) -> a (N, M) cosines of the members, g (N, M * M) their inner products."""
    a, g = [], []
    for rows in torch.arange(len(y)).split(BLOCK):
        m = torch.stack([v[rows] for v in x], 1)  # (B, M, D)
        a.append((m @ y[rows][:, :, None])[:, :, 0])
        g.append((m @ m.transpose(1, 2)).flatten(1))
    return torch.cat(a), torch.cat(g)


def cosines(w, a, g):
    """Of every row under weights w (M,): w.a / sqrt(w' G w) -> (N,). So learning never touches the embeddings."""
    return (a @ w) / (g @ torch.outer(w, w).flatten()).clamp_min(1e-12).sqrt()


def fit(a, g, rows=None, steps=100):
    """Weights (M,) >= 0 that sum to 1 and maximise the mean cosine, by weights of rows (N,), as squares by L-BFGS."""
    rows = torch.ones(len(a)) if rows is None else rows
    v = torch.ones(a.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        loss = -(rows @ cosines(v.square(), a, g)) / rows.sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return F.normalize(v.detach(), dim=0).square()  # which sum to 1


def average(x, w):  # [M of unit rows (N, D)], weights (M,) -> unit rows (N, D)
    blocks = torch.arange(len(x[0])).split(BLOCK)
    return torch.cat([F.normalize(sum(a * m[rows] for a, m in zip(w, x)), dim=-1) for rows in blocks])


def folds_of(groups, seed=0):
    """-> fold (N,) of every row. Near-identical prompts share a group, so they share a fold."""
    names, index = np.unique(groups, return_inverse=True)
    return torch.from_numpy(np.random.default_rng(seed).permutation(len(names))[index] % min(FOLDS, len(names)))


def cross_validate(fold, a, g, rows=None):
    """Cosine of every row under weights that were learned without its fold -> (N,)"""
    rows, out = torch.ones(len(a)) if rows is None else rows, torch.zeros(len(fold))
    for k in fold.unique():
        out[fold == k] = cosines(fit(a[fold != k], g[fold != k], rows[fold != k]), a[fold == k], g[fold == k])
    return out


def parse_weights(text, models):
    """"learned", "uniform" -> None; "A,B,..." -> tensor (M,) whose absolute values sum to 1"""
    if text in ("learned", "uniform"):
        return None
    try:
        w = torch.tensor([float(v) for v in text.split(",")], dtype=torch.float64)
    except ValueError:
        w = torch.empty(0)
    if len(w) != models or not 0 < w.abs().sum() < torch.inf:
        sys.exit(f"--weights {text}: must be learned, uniform, or {models} finite numbers, not all 0")
    return (w / w.abs().sum()).float()


def choose_weights(report, val, text, select_by):
    """What members, average and learned weights are worth where targets are known, printed and put into `report`.
    -> weights (M,), what they are: learned only if they win by two standard errors in cross-validation, by the measure
    `select_by`, where the rows have weights."""
    models, members = len(val["x"]), report["members"]
    weights, used = parse_weights(text, models), "fixed"
    if weights is None:
        weights, used = torch.full((models,), 1 / models), "uniform"
    if val["targets"] is None or np.all(val["trained"]):
        why = "no targets known" if val["targets"] is None else "all prompts were trained on"
        print(f"{why}: {used} weights (learn them with --fit VAL.npz ...)")
        return weights, used
    a, g = gram(val["x"], val["targets"])
    groups = np.arange(len(a)) if val["groups"] is None else val["groups"]
    kinds = measures(len(a), val["weight"], val["source"])
    kind = select_by if select_by in kinds else "cosine"
    rows = kinds[kind]
    if np.any(val["trained"]):
        new = ~val["trained"]
        print(f"{(~new).sum():,} rows whose prompts were trained on count for nothing here")
        a, g, groups, rows = a[new], g[new], groups[new], rows[new]
    n, plain = len(a), cosines(weights, a, g)
    report |= {"n": n, used: mean_and_error(plain, groups, rows), "measure": kind, "scored_on": val["names"]}
    print(f"mean cosine{f' ({kind})' * (kind != 'cosine')} over the {n:,} rows of {', '.join(val['names'])}:")
    for member, name, c in zip(members, val["names"], a.unbind(1)):
        member["cosine"], (member["score"], member["se"]) = float(c.mean()), mean_and_error(c, groups, rows)
        print(f"{Path(name).stem}  {describe(c, groups, rows)}")
    label = "plain average" if used == "uniform" else "fixed weights"
    print(f"{label}  {describe(plain, groups, rows)}  (n = {n:,})")
    warn_few(n)
    fold = folds_of(groups)
    if text == "learned" and models > 1 and fold.any():
        rows = torch.from_numpy(rows).float()
        learned = cross_validate(fold, a, g, rows)
        report |= {k: mean_and_error(v, groups, rows) for k, v in (("learned", learned), ("gain", learned - plain))}
        gain, error = report["gain"]
        pays = n >= FEW_ROWS and len(np.unique(groups)) >= FEW_GROUPS and gain > 2 * error
        weights, used = (fit(a, g, rows), "learned") if pays else (weights, used)
        gains = f"{fold.max() + 1} folds by group; over plain {gain:+.5f} ± {error:.5f}"
        print(f"learned weights  {describe(learned, groups, rows)}  ({gains})")
        print(f"used: {used} weights, because the learned ones {'beat' if pays else 'do not beat'} the plain average "
              f"by two standard errors over at least {FEW_ROWS} rows of {FEW_GROUPS} groups")
    for m, member in enumerate(members) if models > 1 else ():
        kept = [i for i in range(models) if i != m]
        rest = a[:, kept], g.reshape(n, models, models)[:, kept][:, :, kept].flatten(1)
        w = fit(*rest, rows) if used == "learned" else weights[kept] if weights[kept].any() else torch.ones(models - 1)
        lost = mean_and_error(cosines(weights, a, g) - cosines(w, *rest), None, rows)[0]
        member["leave_one_out"] = round(lost, 9) + 0.0  # no -0
        print(f"{member['name']}: weight {weights[m]:.3f}, the average loses {member['leave_one_out']:+.5f} without it")
    return weights, used


def draw(file, report):
    """Cosines with their standard errors where targets are known, else the weights, written to file -> Figure"""
    from matplotlib.figure import Figure  # without pyplot, which wants a display
    members, mixes = report["members"], [k for k in ("uniform", "fixed", "learned") if k in report]
    labels = [chart_label(m["name"]) + f"  (weight {m['weight']:.3f})" * bool(mixes) for m in members]
    labels += [k.replace("uniform", "plain average").replace("learned", "learned (cross-validated)") for k in mixes]
    ax = Figure(figsize=(8, 0.5 * len(labels) + 1.3), layout="constrained").subplots()
    if mixes:
        scores = np.array([(m["score"], m["se"]) for m in members] + [report[k] for k in mixes])
        for y, (value, error) in enumerate(scores):
            ax.errorbar(value, y, xerr=error, fmt="o", capsize=3, color="#0072B2" if y < len(members) else "#D55E00")
            ax.annotate(f"{value:.4f} ± {error:.4f}", (value, y), (0, 6), textcoords="offset points", ha="center")
        low, high = (scores[:, 0] - scores[:, 1]).min(), scores.sum(1).max()
        pad = max(0.05 - (high - low), 0.4 * (high - low)) / 2  # never so narrow that noise looks like a difference
        label = f"mean cosine ({report['measure']}) ± standard error, n = {report['n']:,}"
        ax.set(xlim=(low - pad, high + pad), xlabel=label)
    else:
        bars = ax.barh(range(len(members)), [m["weight"] for m in members], color="#0072B2")
        ax.bar_label(bars, fmt="%.3f", padding=5)
        ax.set(xmargin=0.2, xlabel="weight")
    ax.set_yticks(range(len(labels)), labels, parse_math=False)
    ax.set(title=f"used: {report['used']} weights", ylim=(len(labels) - 0.5, -0.7))
    ax.spines[["top", "right"]].set_visible(False)
    ax.figure.savefig(file, format="png", metadata={"Software": "ensemble.py"})  # so claim knows it as ours
    return ax.figure


def make_soup(runs, checkpoints, best_path, log_path, locks, select_by):
    """Greedy model soup (arXiv 2203.05482): from the best run on, each joins if validation, by `select_by`, gains."""
    models, metas = zip(*map(load_model, checkpoints))
    for path, meta in zip(checkpoints, metas):
        if wrong := [k for k in ("backbone", "head", "dim", "text_model", "data_hashes") if meta[k] != metas[0][k]]:
            sys.exit(f"{path}: another {wrong[0]} than {checkpoints[0]}; a soup needs the same")
    pairs, paths, targets, unchanged = read_validation(metas[0])
    kinds = {name: torch.from_numpy(w) for name, w in measures_of(pairs).items()}
    kind = f"val_{select_by}" if f"val_{select_by}" in kinds else "val_cosine"
    if not unchanged:
        sys.exit(f"{metas[0]['data']}: has changed since the training; a soup needs its validation rows")
    scorer, states = TTAModel(checkpoints[0], "auto", pick_device()), [m.state_dict() for m in models]
    def mix(some):
        return {k: torch.stack([states[i][k].float() for i in some]).mean(0).to(v.dtype) for k, v in states[0].items()}
    def validate(some):
        scorer.model.load_state_dict(mix(some))
        y, _ = predict(scorer, paths, ["image"], SimpleNamespace(batch_size=64, workers=2))
        scores = torch.from_numpy((y * targets).sum(1)).double()
        return {name: float(w @ scores) for name, w in kinds.items()}
    alone = [validate([i]) for i in range(len(runs))]
    order = sorted(range(len(runs)), key=lambda i: -alone[i][kind])
    chosen, best = order[:1], alone[order[0]]
    print(f"mean cosine ({kind[4:]}) over the {len(paths):,} validation rows of {metas[0]['data']}:")
    for i in order[1:]:
        score = validate([*chosen, i])
        joins = score[kind] > best[kind]
        print(f"{alone[i][kind]:.4f} alone, {score[kind]:.4f} with those above "
              f"({'joins' if joins else 'stays out'})  {runs[i]}")
        chosen, best = ([*chosen, i], score) if joins else (chosen, best)
    print(f"best alone {alone[order[0]][kind]:.4f} {runs[order[0]]} · average of all {len(runs)} "
          f"{validate(order)[kind]:.4f} · greedy soup of {len(chosen)} {best[kind]:.4f} (n = {len(paths)})")
    models[0].load_state_dict(mix(chosen))
    meta = metas[0] | {"phase": "ft", **best, "soup": [runs[i] for i in chosen]}
    log = json.dumps({"step": 0, **best, "done": True}) + "\n"
    sweep(Path(best_path).parent, f".{SOUP[0]}")  # save_model writes beside f.name, as atomic does
    write_all(locks, {best_path: lambda f: save_model(models[0], meta, f.name),
                      log_path: lambda f: f.write(log.encode())})
    print_next("predict.py", "--run", Path(best_path).parent, "--tta", 2)


def parse_args(argv=None):
    p = make_parser(__doc__)
    p.add_argument("preds", nargs="*", help="npz files or Kaggle CSVs; none = every npz in preds/ but ensembles")
    p.add_argument("--fit", nargs="+", help="predictions of the same runs with known targets; unset = the members")
    p.add_argument("--weights", default="learned", help="learned (used where they pay), uniform, or fixed: A,B,...")
    p.add_argument("--select-by", choices=MEASURES, default="both", help="mean that weights and soups are chosen by")
    p.add_argument("--soup", nargs="+", metavar="RUN", help="average the weights of these runs instead, greedily")
    p.add_argument("--out", help="file to write, with .json and .png; unset = preds/ensemble.npz, or runs/soup")
    p.add_argument("--submission", help="Kaggle CSV to write")
    p.add_argument("--sample-submission", help="its ids, in its order; unset = sorted ids")
    p.add_argument("--overwrite", action="store_true", help="replace these files")
    return p.parse_args(argv)


def main():
    args = parse_args()
    out = Path(args.out or ("runs/soup" if args.soup else "preds/ensemble.npz"))
    if args.soup:
        checkpoints, paths = [find_checkpoint(r) for r in args.soup], [f"{out}/ft/{n}" for n in SOUP]
        with claim(paths, args.overwrite, checkpoints) as locks:
            return make_soup(args.soup, checkpoints, *paths, locks, args.select_by)
    names = args.preds
    if not names:
        names, found = group_files("preds")
        args.fit = args.fit or found
    paths = [out, *(f"{out.parent / out.stem}.{end}" for end in ("json", "png")), args.submission]
    with claim(paths, args.overwrite, [*names, *(args.fit or ()), args.sample_submission]) as locks:
        combine(args, names, *paths, locks)


def combine(args, names, out, json_path, png_path, submission, locks):
    require("matplotlib.figure", "matplotlib")
    parse_weights(args.weights, len(names))  # a mistake there ends it before anything slow
    test = val = load_members(names)  # to apply the weights to, and to learn them on
    order = order_for(args.sample_submission, test["ids"])
    if args.fit:
        keys = [key_of(m) for m in map(read_preds, args.fit)]
        val = load_members([args.fit[i] for i in match(test["keys"], keys, names, args.fit)])
        if val["targets"] is None:
            sys.exit(f"--fit {' '.join(args.fit)}: no targets there; make them with: python predict.py")
    report = {"members": [{"name": Path(name).stem, "file": name, "run": run, "views": list(views)}
                          for name, (run, views) in zip(names, test["keys"])]}
    weights, report["used"] = choose_weights(report, val, args.weights, args.select_by)

    embeddings = average(test["x"], weights).numpy()
    if test["targets"] is not None and not np.all(test["trained"]):
        own = (test["targets"].numpy() * embeddings).sum(1)
        new = ~np.broadcast_to(test["trained"], len(own))
        own, groups = own[new], None if test["groups"] is None else test["groups"][new]
        report["output"] = dict(zip(("cosine", "se", "n"), [*mean_and_error(own, groups), len(own)]))
        same = report["used"] == "learned" and {*val["ids"]} == {*test["ids"]}
        learned = " (the rows that its weights were learned on)" * same
        print(f"this average on the {len(own):,} rows of {', '.join(names)}{learned}: cosine {describe(own, groups)}")
    report["members"] = [member | {"weight": w} for member, w in zip(report["members"], weights.tolist())]
    check_rows(embeddings, f"--weights {args.weights}")
    write_all(locks, {
        submission: lambda f: write_submission(f, test["ids"], embeddings, order),
        json_path: lambda f: f.write(json.dumps(report, indent=1).encode()),
        png_path: lambda f: draw(f, report),
        str(out): lambda f: write_preds(f, ids=test["ids"], embeddings=embeddings, run="ensemble", views=names,
                                        **{k: test[k] for k in ("targets", *OF_ROWS) if test[k] is not False})})
    print(f"{len(test['ids']):,} images, {report['used']} weights")
    best = test["runs"][int(weights.argmax())]
    if test["targets"] is not None and os.path.exists(best):
        print_next("predict.py", "path/to/images", "--run", best, "--tta", 2)
    elif test["targets"] is None and not submission:
        fit = ["--fit", *args.fit] if args.fit else []
        print_next("ensemble.py", *names, *fit, "--out", out, "--overwrite", "--submission", "submission.csv")


if __name__ == "__main__":
    run(main, "nothing was written")
