"""A projection made from a part of the corpus, which is run through the model before logging."""

from collections.abc import Iterable, Iterator
from itertools import islice

from tqdm import tqdm

from logra_kernels.lm.corpus import Example, batches
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.progress import Progress, track
from logra_kernels.run import FinitePolicy, Pilot

# What is piloted where nothing is said: this share of the corpus, within these bounds.
PILOT_SHARE, FEWEST_EXAMPLES, MOST_EXAMPLES = 0.1, 32, 2000


def pilot_size(total: int, asked: int | float | None = None) -> int:
    """How many of a corpus's examples are piloted.

    Args:
        total: the corpus's examples.
        asked: a number (an integer) or a share (a float) of them; None: a tenth, of which at most
            2,000 and at least 32, or the whole corpus if it has fewer.

    Raises:
        ValueError: a share outside (0, 1], or a number that the corpus has not.
    """
    if asked is None:
        tenth = round(PILOT_SHARE * total)
        return min(total, max(FEWEST_EXAMPLES, min(tenth, MOST_EXAMPLES)))
    if isinstance(asked, float):
        if not 0 < asked <= 1:
            raise ValueError(f"pilot: expected a share above 0 and at most 1, got {asked}")
        return max(1, round(asked * total))
    if not 1 <= asked <= total:
        raise ValueError(f"pilot: expected 1 to {total}, the examples of the corpus, got {asked}")
    return asked


def evenly_spaced(corpus: Iterable[Example], total: int, size: int) -> Iterator[Example]:
    """Every (total/size)-th of a corpus's `total` examples, from the first on; `size` of them."""
    reading = iter(corpus)
    reached = 0
    for number in range(size):
        place = number * total // size
        yield from islice(reading, place - reached, place - reached + 1)
        reached = place + 1


def pilot_corpus(
    gradients: LMGradients,
    corpus: Iterable[Example],
    init: str,
    *,
    rank: int | tuple[int, int] | None = None,
    coordinates: int | None = None,
    moments: str = "expand",
    size: int | float | None = None,
    batch_tokens: int = 1024,
    batch_size: int | None = None,
    on_nonfinite: str = "raise",
    progress: Progress = None,
) -> None:
    """Give a model's watched modules a projection made from evenly spaced examples of a corpus.

    The examples are spread over all of it, since a corpus is often sorted; they are in memory
    meanwhile. The same corpus and options make the same projection. Nothing is stored.

    Args:
        gradients: the model and its watched modules; if anything fails, they keep the projection
            that they have.
        corpus: what is to be logged; it is read twice, to count its examples and to choose.
        init, rank, coordinates, moments: as in `Run.pilot`.
        size: as `asked` of `pilot_size`.
        batch_tokens, batch_size, on_nonfinite: as in `log_corpus`.
        progress: True draws bars on stderr; a callback is told (examples passed, of how many).

    Raises:
        ValueError: another init, an option that is missing or not its own, a size that the corpus
            has not, or a gradient that is not finite.
    """
    finite = FinitePolicy(on_nonfinite)
    pilot = Pilot(gradients.watched, init, rank, coordinates, moments)
    bar = tqdm(corpus, desc="count", unit="ex", disable=progress is not True, dynamic_ncols=True)
    total = sum(1 for _ in bar)
    examples = list(evenly_spaced(corpus, total, pilot_size(total, size)))
    with pilot.running():
        done = track(progress, len(examples), "pilot", "ex")
        for batch in batches(examples, batch_tokens=batch_tokens, batch_size=batch_size):
            capture = gradients.passed(batch, tokens_alone=True)
            pilot.add(capture, [example.id for example in batch], finite)
            done(len(batch))
