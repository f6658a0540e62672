"""Are the values right? LDS and brittleness of every method, by retraining.

Settings: an MLP on Fashion-MNIST, a small GPT on WikiText-2, a ResNet-9 on CIFAR-10. One whose data
are not there is left out, with a line that says what to set. Models are retrained on random halves
of the examples (LDS), and without the examples that a method ranks first for a query (brittleness).
The parts "mislabelled" (flipped labels) and "lemma" (what gradients hold in their eigenbasis) train
one model. Retrained models are kept in --folder, so that a run goes on after a kill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import gpt, mlp, paper, resnet9
from bench.accuracy.lemma import lemma_part
from bench.accuracy.methods import Subject, methods_of
from bench.accuracy.parts import brittleness_part, lds_part, mislabelled_part
from bench.accuracy.setting import Data, Setting, trained_model
from bench.harness import results
from bench.harness.cases import options, prepare

SETTINGS = {one.SETTING.name: one.SETTING for one in (mlp, gpt, resnet9)}
PARTS = ("lds", "brittleness", "mislabelled", "lemma")


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__ or "", "quick", "threads", "json")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--folder", type=Path, default=results.ROOT / "build" / "accuracy", help="of the models"
    )
    parser.add_argument("--halves", type=int, help="of the training data (default: the setting's)")
    parser.add_argument("--seeds", type=int, help="of each half (default: the setting's)")
    parser.add_argument("--asked", type=int, help="queries of the brittleness test")
    parser.add_argument(
        "--paper", action="store_true", help="the paper's settings, on a GPU if there is one"
    )
    args = parser.parse_args(argv)
    unknown = sorted(set(args.settings) - set(SETTINGS))
    if unknown:
        parser.error(f"SETTING: expected some of {', '.join(SETTINGS)}, got {unknown[0]}")
    prepare(args.threads)
    device = torch.device("cuda" if args.paper and torch.cuda.is_available() else "cpu")
    for setting in (paper.SETTINGS if args.paper else SETTINGS).values():
        if args.settings and setting.name not in args.settings:
            continue
        try:
            data = setting.load().to(device)
        except FileNotFoundError as missing:
            print(f"\n{setting.title} is left out: {missing}")
            continue
        print(f"\n{setting.title}: {len(data.x):,} examples, {len(data.queries)} queries")
        chosen = setting.smaller() if args.quick else setting
        chosen = dataclasses.replace(
            chosen,
            halves=args.halves or chosen.halves,
            seeds=args.seeds or chosen.seeds,
            asked=args.asked or chosen.asked,
        )
        for record in evaluate(chosen, data, args.folder / setting.name, args.part, args.quick):
            if args.json:
                results.append("accuracy", record)
    return 0


def evaluate(
    setting: Setting, data: Data, folder: Path, parts: Sequence[str], quick: bool
) -> Iterator[dict[str, Any]]:
    """Print the tables of one setting; the record of each part as soon as it is there."""
    subject = Subject(setting, data, trained_model(setting, data))
    found = []
    if {"lds", "brittleness"} & set(parts):
        for method in methods_of(setting, quick or "lds" not in parts):
            for one in method(subject):
                print(f"  scores: {one.method}, D {one.dim}", flush=True)
                found.append(one)
    if "lds" in parts:
        yield lds_part(subject, found, folder)
    if "brittleness" in parts:
        yield brittleness_part(subject, found, folder)
    if "mislabelled" in parts and data.y.dim() == 1:
        yield mislabelled_part(subject)
    if "lemma" in parts:
        yield lemma_part(subject)


if __name__ == "__main__":
    raise SystemExit(main())
