"""
Average the predictions of several models with learned weights.
Reads preds/*.npz (predict.py); writes one npz of the same form and, if asked, a Kaggle submission.
$ python ensemble.py                                            # every npz in preds/ except an earlier ensemble
$ python ensemble.py preds/a.npz preds/b.npz --out preds/ensemble.npz
$ python ensemble.py test_a.npz test_b.npz --fit val_a.npz val_b.npz --submission submission.csv
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clean import run
from predict import read_preds, read_sample, write_preds, write_submission


class WeightedAverage(nn.Module):
    """One weight per model, started at 1. (M, N, D) unit rows -> (N, D) unit rows."""

    def __init__(self, models):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(models))

    def forward(self, x):
        return F.normalize((self.weight[:, None, None] * x).sum(0), dim=-1)


def fit(x, y, steps=200):
    """Weights that maximise the mean cosine. x (M, N, D), y (N, D) -> WeightedAverage. Deterministic: full batch, LBFGS."""
    net = WeightedAverage(len(x))
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -(net(x) * y).sum(-1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return net


def cross_validate(x, y, groups, folds=5, seed=0):
    """Cosine of every row under weights fitted without its group. -> (N,). Near-identical prompts share a group, so they share a fold."""
    names = np.unique(groups)
    fold = dict(zip(names[np.random.default_rng(seed).permutation(len(names))].tolist(), np.arange(len(names)) % folds))
    fold = np.array([fold[g] for g in groups.tolist()])
    score = torch.zeros(len(y))
    for k in np.unique(fold):
        with torch.no_grad():
            score[fold == k] = (fit(x[:, fold != k], y[fold != k]).requires_grad_(False)(x[:, fold == k]) * y[fold == k]).sum(-1) if (fold != k).any() else 0
    return score


def align(members, names):
    """Members joined by id, in the order of the first. -> ids, x (M, N, D). Different ids are an error that lists the first few."""
    ids = members[0]["ids"].tolist()
    rows = []
    for name, member in zip(names, members):
        position = {i: n for n, i in enumerate(member["ids"].tolist())}
        missing, extra = [i for i in ids if i not in position], [i for i in position if i not in set(ids)]
        if missing or extra:
            sys.exit(f"{name}: ids differ from those of {names[0]}: {len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}; predict the same images")
        if member["embeddings"].shape[1] != members[0]["embeddings"].shape[1]:
            sys.exit(f"{name}: embeddings of width {member['embeddings'].shape[1]}, {names[0]} has {members[0]['embeddings'].shape[1]}")
        rows.append([position[i] for i in ids])
    return ids, torch.stack([F.normalize(torch.from_numpy(m["embeddings"][r]).float(), dim=-1) for m, r in zip(members, rows)])


def describe(score):
    return f"{score.mean():.4f} ± {score.std() / len(score) ** .5:.4f}"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Learned weighted average of several models' predictions.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("preds", nargs="*", metavar="PREDS.npz", help="members to average; none = every npz in preds/ except an earlier ensemble")
    p.add_argument("--fit", nargs="+", default=None, metavar="VAL.npz", help="predictions with targets of the same runs to learn the weights on; unset = the members themselves")
    p.add_argument("--out", default="preds/ensemble.npz", help="file to write")
    p.add_argument("--submission", default=None, help="Kaggle CSV to write")
    p.add_argument("--sample-submission", default=None, help="its ids, in its order; unset = sorted ids")
    p.add_argument("--overwrite", action="store_true", help="replace --out and --submission")
    p.add_argument("--folds", type=int, default=5, help="of the cross-validation")
    p.add_argument("--seed", type=int, default=0, help="of the folds")
    return p.parse_args(argv)


def main():
    args = parse_args()
    names = args.preds or sorted(str(p) for p in Path("preds").glob("*.npz") if str(np.load(p, allow_pickle=False).get("run", "")) != "ensemble")
    if not names:
        sys.exit("preds/: no predictions there; make some with: python predict.py")
    for path in filter(None, (args.out, args.submission)):
        if Path(path).exists() and not args.overwrite:
            sys.exit(f"{path}: already there; choose another name, or replace it with --overwrite")
    members = [read_preds(n) for n in names]
    ids, x = align(members, names)
    targets = members[0]["targets"]

    # where the weights are learned: on the members themselves, or on the validation predictions of the same runs
    if args.fit:
        by_run = {read_preds(n)["run"]: n for n in args.fit}
        lacking = [n for n, m in zip(names, members) if m["run"] not in by_run]
        if lacking:
            sys.exit(f"--fit: no validation predictions of the run behind {lacking[0]}; predict them with: python predict.py --run RUN")
        fit_names = [by_run[m["run"]] for m in members]
        fit_members = [read_preds(n) for n in fit_names]
        _, fx = align(fit_members, fit_names)
    else:
        fit_members, fx = members, x
    y = fit_members[0]["targets"]

    if y is None:
        print("no targets known: plain average (learn weights with --fit VAL.npz ...)")
        net = WeightedAverage(len(names))
    else:
        y = torch.from_numpy(np.ascontiguousarray(y)).float()
        groups = fit_members[0]["groups"]
        groups = np.arange(len(y)) if groups is None else groups
        for name, member in zip(names, fx):
            print(f"{describe((member * y).sum(-1))}  {name}")
        with torch.no_grad():
            plain = (WeightedAverage(len(fx))(fx) * y).sum(-1)
        learned = cross_validate(fx, y, groups, args.folds, args.seed)
        print(f"{describe(plain)}  plain average\n{describe(learned)}  learned weights, {args.folds}-fold cross-validated by group (n = {len(y)})")
        net = fit(fx, y)
        print("weights: " + ", ".join(f"{w:.3f} {Path(n).stem}" for w, n in zip((net.weight / net.weight.sum()).tolist(), names)))

    with torch.no_grad():
        embeddings = net(x).numpy()
    if args.submission:
        write_submission(args.submission, ids, embeddings, read_sample(args.sample_submission) if args.sample_submission else None)
        print(f"wrote {args.submission} ({len(ids)} images)")
    write_preds(args.out, ids=np.array(ids), embeddings=embeddings, targets=targets, groups=members[0]["groups"], run="ensemble", views=np.array(names))
    print(f"wrote {args.out} ({len(ids)} images)")


if __name__ == "__main__":
    run(main)
