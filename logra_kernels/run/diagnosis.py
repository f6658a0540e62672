"""What a doctor found: findings with their numbers, and what to do about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from logra_kernels.run.coverage import Coverage, lines_of

FORMAT = "logra_kernels.diagnosis"
VERSION = 1


# {a finding's name: (its severity, what to do)}
ADVICE = {
    "averaged-loss": (
        "error",
        "sum the loss over examples and tokens (reduction='sum'), and divide by nothing that "
        "depends on the batch; models that are given labels= average: compute the loss from their "
        "logits",
    ),
    "batch-dependence": (
        "error",
        "look for what mixes examples: attention without a mask, statistics over the batch; or, "
        "for coarse kernels, load the model in float32 or with attn_implementation='eager'",
    ),
    "batch-norm": ("error", "call model.eval() before logging"),
    "chance": (
        "error",
        "make the loss a function of the batch alone: model.eval(), no functional dropout with "
        "training=True, no sampling",
    ),
    "doubled-bos": (
        "warning",
        "the model never saw that in training: take the token out of the text, or tokenise what a "
        "chat template made with add_special_tokens=False",
    ),
    "dropout": ("error", "call model.eval() before logging, so that rows do not depend on chance"),
    "duplicates": (
        "warning",
        "remove them: copies have equal scores, and fill a ranking's first places",
    ),
    "few-parameters": (
        "warning",
        "watch more layers by type_filter and name_filter (--modules); what is left out, and why, "
        "is in print(run.watch(...))",
    ),
    "masked-tokens": (
        "warning",
        "look at mask and labels: a token counts where the mask is 1 and its label is not -100",
    ),
    "more-columns-than-rows": (
        "warning",
        "lower the rank, or log more examples; keep the damping well above 0, for it decides what "
        "the data do not",
    ),
    "not-finite": (
        "error",
        "run the model in bfloat16 or float32; on_nonfinite='skip' leaves such examples out",
    ),
    "overflow": ("warning", "run the model in bfloat16 or float32"),
    "padding": (
        "error",
        "give the model the attention mask, and position_ids where padding is on the left; or pad "
        "on the right",
    ),
    "stored-range": (
        "error",
        "store rows as float32; multiply every loss by the same power of two where that is too "
        "coarse as well",
    ),
    "tied-weights": (
        "warning",
        "leave the module out by name_filter, or give it a weight of its own",
    ),
    "underflow": (
        "error",
        "run the model in bfloat16 or float32, or multiply every loss by the same power of two",
    ),
    "zero-modules": (
        "warning",
        "leave the module out by name_filter; a LoRA factor whose partner is zero gets a gradient "
        "only after some training",
    ),
    "zero-rows": (
        "error",
        "look at the mask and the labels of these examples, or leave them out",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that ruins attribution.

    Args:
        name: of the kind of finding, a key of ADVICE.
        severity: "error": rows are not the examples' own gradients, or are lost. "warning": rows
            are right, but scores may mislead.
        seen: what was seen, a sentence with its numbers.
        advice: what to do.
        numbers: the numbers of `seen`, JSON values.
    """

    name: str
    severity: str
    seen: str
    advice: str
    numbers: Mapping[str, Any]


def finding(name: str, seen: str, **numbers: Any) -> Finding:
    """A finding with the advice and severity of its name."""
    severity, advice = ADVICE[name]
    return Finding(name, severity, seen, advice, numbers)


@dataclass(frozen=True)
class GradientRange:
    """The smallest |g| above zero and the largest of a module, over the examples that were run."""

    module: str
    smallest: float
    largest: float


@dataclass(frozen=True)
class Diagnosis:
    """What a doctor found; str() is a readable report.

    Args:
        findings: errors first; empty if nothing was found.
        unchecked: {finding's name: why it was not looked for}.
        examples: how many examples were run alone and in their batches.
        read: how many examples were read.
        dtype: the coarsest that a watched module computes in.
        tolerance: how far rows of that dtype may differ, relative to their norm.
        coverage: what is watched.
        gradients: the range of each module's gradients.
    """

    findings: tuple[Finding, ...]
    unchecked: Mapping[str, str]
    examples: int
    read: int
    dtype: str
    tolerance: float
    coverage: Coverage
    gradients: tuple[GradientRange, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "findings": [
                {**vars(found), "numbers": dict(found.numbers)} for found in self.findings
            ],
            "unchecked": dict(self.unchecked),
            "examples": self.examples,
            "read": self.read,
            "dtype": self.dtype,
            "tolerance": self.tolerance,
            "coverage": self.coverage.as_dict(),
            "gradients": [dict(vars(module)) for module in self.gradients],
        }

    def __str__(self) -> str:
        lines = [f"{self.examples} examples run, {self.read:,} read, {self.dtype}"]
        lines.append(lines_of(self.coverage.as_dict())[0])
        if self.gradients:
            largest = [module.largest for module in self.gradients]
            lines.append(f"largest |g| of a module: {min(largest):.1e} to {max(largest):.1e}")
        for found in self.findings:
            lines += [f"{found.severity}: {found.name}: {found.seen}", f"  {found.advice}"]
        lines += [f"not checked: {name}: {why}" for name, why in self.unchecked.items()]
        return "\n".join([*lines, *([] if self.findings else ["nothing found"])])
